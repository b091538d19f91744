//! Waiting for a descriptor, or for the end of accepting.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::gate::Gate;
use crate::sys::poll::{poll, Deadline};

/// Why [`Shutdown::readable`](crate::Shutdown::readable) returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The descriptor is readable, or its peer has closed.
    Ready,
    /// Accepting is over, and the descriptor is not readable.
    Over,
    /// The timeout has passed.
    TimedOut,
}

/// See [`Shutdown::readable`](crate::Shutdown::readable).
pub(super) fn readable(gate: &Gate, fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<Readable> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&gate.over, PollFlags::IN)];
    match poll(&mut fds, timeout.map_or(Deadline::NEVER, Deadline::after))? {
        0 => Ok(Readable::TimedOut),
        _ if !fds[0].revents().is_empty() => Ok(Readable::Ready),
        _ => Ok(Readable::Over),
    }
}
