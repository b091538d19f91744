//! Ends of links that stay open while this process lives.
//!
//! A process takes the end of a link for the death of the other one. So a process never closes the end that it writes,
//! whatever it has decided and whichever value the program drops, until the other process has closed its own end.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::sys::poll::{wait_hangup, Deadline};

static HELD: Mutex<Vec<Arc<OwnedFd>>> = Mutex::new(Vec::new());

/// Keeps `fd` open until the other end is closed, and closes those whose other end is.
pub(crate) fn hold_open(fd: impl Into<Arc<OwnedFd>>) {
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    held.push(fd.into());
    held.retain(|fd| wait_hangup(fd, Deadline::after(Duration::ZERO)) == Ok(false));
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn an_end_is_held_until_the_other_one_is_closed() {
        let is_open = |reader: &OwnedFd| wait_hangup(reader, Deadline::after(Duration::ZERO)) == Ok(false);
        let (reader, writer) = pipe().unwrap();
        let copy = writer.try_clone().unwrap();
        hold_open(writer);
        assert!(is_open(&reader));
        drop(reader);
        // The next one to be held closes it, and so it is closed itself when nothing else holds it.
        let (other, to_other) = pipe().unwrap();
        hold_open(to_other);
        assert!(wait_hangup(&copy, Deadline::after(Duration::ZERO)).unwrap());
        assert!(is_open(&other));
        let numbers = |held: &Mutex<Vec<Arc<OwnedFd>>>| held.lock().unwrap().len();
        let before = numbers(&HELD);
        drop(other);
        let (_last, to_last) = pipe().unwrap();
        hold_open(to_last);
        assert_eq!(numbers(&HELD), before, "one was closed, one is held");
    }
}
