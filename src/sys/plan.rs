//! What the child of a spawn needs, made before it exists, and kept while it may read it.

use std::ffi::{c_char, CString};
use std::mem;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;

use super::attributes::{Attributes, Scheduling};
use super::system::clone::Stack;

/// Everything the child needs, made before it exists.
pub(crate) struct Plan {
    pub(crate) program: CString,
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    /// Where the child starts, and whether it may start where the parent stands if that cannot be entered.
    pub(crate) directory: Option<(CString, IfMissing)>,
    /// What survives the execve, besides stdin, stdout and stderr.
    pub(crate) keep: Vec<RawFd>,
    /// Where the child reports a failure before the new program runs. One of `keep`.
    pub(crate) status: RawFd,
    /// What the new program starts with.
    pub(crate) attributes: Attributes,
    /// Whose child it is to be.
    pub(crate) parent: Parentage,
}

/// Whether a directory that is gone, or may not be entered, is an error or means "stay where we are". To stay needs no
/// right; to enter by name needs the right to search every part of the path.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfMissing {
    Fail,
    Stay,
}

/// Whose child a new process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parentage {
    /// Ours.
    Us,
    /// Our own parent's, where the kernel allows it; that reaps it then. For a service manager which at a stop waits for
    /// its own children only.
    OurParent,
}

/// What the child reads before its execve, and the stack it runs on.
pub(super) struct Memory {
    pub(super) plan: Plan,
    /// The pointers that execve takes, into `plan`, null at the end.
    pub(super) argv: Vec<*const c_char>,
    pub(super) envp: Vec<*const c_char>,
    /// What the thread that spawns has other than the plan says.
    pub(super) restore: Scheduling,
    pub(super) stack: Stack,
}

// SAFETY: the raw pointers lead into `plan`, which moves with them and which nobody changes.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Frees the memory only when no child uses it any more.
pub(super) struct SharedMemory(pub(super) Arc<Memory>);

impl SharedMemory {
    pub(super) fn new(plan: Plan) -> Self {
        let pointers = |strings: &[CString]| {
            let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
            pointers.push(ptr::null());
            pointers
        };
        Self(Arc::new(Memory {
            argv: pointers(&plan.argv),
            envp: pointers(&plan.envp),
            restore: plan.attributes.scheduling.to_restore(),
            plan,
            stack: Stack::new(),
        }))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // A child that is stuck before its execve, and survived even SIGKILL, still reads this: then it is leaked.
        if self.0.stack.is_in_use() {
            mem::forget(self.0.clone());
        }
    }
}
