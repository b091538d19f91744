//! Ends of links that stay open while this process lives.
//!
//! A closed link means that the other process is dead. So a process must not close the end that it writes, regardless
//! of its decisions and of values that the program drops, before the other process has closed its own end.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::sys::poll::{wait_hangup, Deadline};

static HELD: Mutex<Vec<Arc<OwnedFd>>> = Mutex::new(Vec::new());

/// Keeps `fd` open until the other end is closed. The event loop polls for that.
pub(crate) fn hold_open(fd: impl Into<Arc<OwnedFd>>) {
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(fd.into());
}

/// Closes the ends whose other end is closed, and returns the rest.
pub(crate) fn held_open() -> Vec<Arc<OwnedFd>> {
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    held.retain(|fd| wait_hangup(fd, Deadline::after(Duration::ZERO)) == Ok(false));
    held.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn an_end_is_held_until_the_other_one_is_closed() {
        let is_open = |reader: &OwnedFd| wait_hangup(reader, Deadline::after(Duration::ZERO)) == Ok(false);
        let (reader, writer) = pipe().unwrap();
        let writer = Arc::new(writer);
        let is_held = || held_open().iter().any(|held| Arc::ptr_eq(held, &writer));
        hold_open(writer.clone());
        assert!(is_open(&reader) && is_held());
        drop(reader);
        assert!(!is_held());
    }
}
