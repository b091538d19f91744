//! Waking a thread that is blocked in a read of a TCP connection.

use std::os::fd::{BorrowedFd, RawFd};

/// Whether a TCP connection whose receiving side is shut down still delivers what arrives. Elsewhere it is discarded.
pub(crate) const STILL_RECEIVES: bool = cfg!(target_os = "linux");

/// Makes a blocked read(2) of connection `fd` return, and every later one that finds nothing to read (shutdown(2)).
///
/// `fd` must be open and be this connection, or another one is woken: call this under a lock that the reading thread takes
/// before it lets go of the connection.
pub(crate) fn wake_reader(fd: RawFd) {
    if fd >= 0 {
        // SAFETY: shutdown(2) touches no memory, and -1, which `BorrowedFd` excludes, is ruled out.
        let connection = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = rustix::net::shutdown(connection, rustix::net::Shutdown::Read);
    }
}
