//! Attributes that a process inherits from the thread that starts it. The next generation gets those that the first one
//! had.

use std::io;

use super::system::mask::{change, Mask};
pub(crate) use super::system::scheduling::Scheduling;

/// The attributes with which a generation was started, and with which every later one will be started.
#[derive(Clone, Debug)]
pub(crate) struct Attributes {
    pub(super) mask: Mask,
    pub(super) scheduling: Scheduling,
}

impl Attributes {
    /// Returns those of the calling thread, which is the main thread of a program that has just started.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        let mask = change(libc::SIG_BLOCK, Mask::none()).map_err(io::Error::from_raw_os_error)?;
        Ok(Self { mask, scheduling: Scheduling::of_this_thread() })
    }
}
