//! There is no way to wake only one of many threads: callers wait with poll(2).

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

#[derive(Debug)]
pub(crate) enum Watch {}

impl Watch {
    pub(crate) fn new(_listener: BorrowedFd<'_>, _gate: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        Err(Errno::NOSYS)
    }

    pub(crate) fn wait(&self) {
        match *self {}
    }
}
