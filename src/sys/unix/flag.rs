//! A flag that polls as readable while it is raised: a pipe that contains data.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::{calls, net};

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

    /// Async-signal-safe, and leaves errno alone, because a signal handler calls this.
    pub(crate) fn raise(&self) {
        // A full pipe is a raised flag.
        // SAFETY: one byte.
        let _ = unsafe { calls::write(self.write.as_raw_fd(), [1].as_ptr(), 1) };
    }

    pub(crate) fn lower(&self) {
        while rustix::io::read(&self.read, &mut [0; 512]) == Ok(512) {}
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}
