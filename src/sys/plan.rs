//! The plan for the child of a spawn: created before the child exists, and kept while it may read it.

use std::ffi::{c_char, CString};
use std::mem;
use std::os::fd::RawFd;
use std::ptr;
use std::rc::Rc;

use super::attributes::{Attributes, Scheduling};
use super::system::clone::Stack;
use super::Parentage;

/// Everything that the child needs, created before it exists.
pub(crate) struct Plan {
    pub(crate) program: CString,
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    /// The child's directory, and whether it may start in the parent's if it cannot enter that. Empty if there is none.
    pub(crate) directory: (CString, IfMissing),
    /// The descriptors that survive the execve, besides stdin, stdout and stderr.
    pub(crate) keep: Vec<RawFd>,
    /// The descriptor on which the child reports a failure before the new program runs. One of `keep`.
    pub(crate) status: RawFd,
    /// The attributes with which the new program starts.
    pub(crate) attributes: Attributes,
    /// The future parent of the child.
    pub(crate) parent: Parentage,
}

/// What to do if the directory is gone or cannot be entered: fail, or stay in the current one. Staying needs no
/// permission, whereas entering needs search permission for every part of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfMissing {
    Fail,
    Stay,
}

/// The memory that the child reads before its execve, and its stack.
pub(super) struct Memory {
    pub(super) plan: Plan,
    /// The pointers into `plan` that execve needs, with a null at the end.
    pub(super) argv: Vec<*const c_char>,
    pub(super) envp: Vec<*const c_char>,
    /// The attributes of the spawning thread that differ from the plan.
    pub(super) restore: Scheduling,
    pub(super) stack: Stack,
}

/// Frees the memory only when no child uses it any more.
pub(super) struct SharedMemory(pub(super) Rc<Memory>);

impl SharedMemory {
    pub(super) fn new(plan: Plan) -> Self {
        let pointers = |strings: &[CString]| {
            let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
            pointers.push(ptr::null());
            pointers
        };
        Self(Rc::new(Memory {
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
        // A child that is stuck before its execve, and has survived even SIGKILL, still reads this, so it is leaked.
        if self.0.stack.is_in_use() {
            mem::forget(self.0.clone());
        }
    }
}
