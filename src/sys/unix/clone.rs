//! There is no clone that shares memory, and no pidfd: spawn.rs forks, and checks periodically for the end of a child.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;

use rustix::io::Errno;
use rustix::process::Pid;

use crate::sys::Parentage;

/// Whether a child can share the memory of its parent on this system.
pub(crate) const WORKS: bool = false;

pub(crate) struct Stack;

/// A child, with what exists on Linux.
pub(crate) type Cloned = (c_int, Option<OwnedFd>, Parentage);

impl Stack {
    pub(crate) fn new() -> Self {
        Self
    }

    pub(crate) fn is_in_use(&self) -> bool {
        false
    }

    /// # Safety
    ///
    /// There are no conditions. The implementation for Linux has some.
    pub(crate) unsafe fn clone(
        &self,
        _parent: Parentage,
        _child: extern "C" fn(*mut c_void) -> c_int,
        _argument: *mut c_void,
    ) -> io::Result<Cloned> {
        Err(Errno::NOSYS.into())
    }

    pub(crate) fn release_at_exec(&self) {}
}

pub(crate) fn pidfd(_pid: Pid) -> Option<OwnedFd> {
    None
}

pub(crate) fn kill(_pidfd: &OwnedFd) -> rustix::io::Result<()> {
    Err(Errno::NOSYS)
}

pub(crate) fn reap(_pidfd: &OwnedFd) -> rustix::io::Result<bool> {
    Err(Errno::NOSYS)
}

pub(crate) fn exit_status(_pidfd: &OwnedFd) -> Option<ExitStatus> {
    None
}
