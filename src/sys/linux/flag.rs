//! A flag that polls as readable while it is raised: an eventfd(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{eventfd, EventfdFlags};

use crate::sys::stdio::above_stdio;

#[derive(Debug)]
pub(crate) struct Flag(OwnedFd);

impl Flag {
    pub(crate) fn new(raised: bool) -> io::Result<Self> {
        let fd = eventfd(raised.into(), EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(above_stdio(fd)?))
    }

    pub(crate) fn raise(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(crate) fn lower(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Returns the descriptor to which a signal handler writes eight bytes to raise the flag.
    pub(crate) fn writable(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
