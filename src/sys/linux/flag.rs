//! A flag that polls as readable while it is raised: an eventfd(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{eventfd, EventfdFlags};

use super::calls;
use crate::sys::stdio::above_stdio;

#[derive(Debug)]
pub(crate) struct Flag(OwnedFd);

impl Flag {
    pub(crate) fn new(raised: bool) -> io::Result<Self> {
        let fd = eventfd(raised.into(), EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(above_stdio(fd)?))
    }

    /// Async-signal-safe, and leaves errno alone, because a signal handler calls this.
    pub(crate) fn raise(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: `one` has eight bytes, as an eventfd requires.
        let _ = unsafe { calls::write(self.0.as_raw_fd(), one.as_ptr(), one.len()) };
    }

    pub(crate) fn lower(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
