//! Keeps the library's descriptors off the numbers 0 to 2.
//!
//! A process may close stdin, stdout and stderr. The kernel assigns the lowest free number, so the next socket would
//! become "stderr", and every message that some code prints would go to a client.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::fcntl_dupfd_cloexec;

/// Returns `fd`, or a close-on-exec duplicate with a number above 2 if `fd` has the number of a standard stream.
pub(crate) fn above_stdio(fd: OwnedFd) -> rustix::io::Result<OwnedFd> {
    if fd.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(fd);
    }
    fcntl_dupfd_cloexec(&fd, libc::STDERR_FILENO + 1)
}
