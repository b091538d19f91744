//! A flag that polls as readable while it is raised: a pipe that contains data.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::net;

#[derive(Debug)]
pub(crate) struct Flag {
    read: OwnedFd,
    write: OwnedFd,
}

impl Flag {
    pub(crate) fn new(raised: bool) -> io::Result<Self> {
        let (read, write) = net::pipe()?;
        let flag = Self { read, write };
        if raised {
            flag.raise();
        }
        Ok(flag)
    }

    pub(crate) fn raise(&self) {
        // A full pipe is a raised flag.
        let _ = rustix::io::write(&self.write, &[1]);
    }

    pub(crate) fn lower(&self) {
        while rustix::io::read(&self.read, &mut [0; 512]) == Ok(512) {}
    }

    /// Returns the descriptor to which a signal handler writes eight bytes to raise the flag.
    pub(crate) fn writable(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}
