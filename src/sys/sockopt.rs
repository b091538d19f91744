//! Options of sockets that rustix does not have, or has in a form that cannot hold every answer.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// Any bytes are a value.
///
/// # Safety
///
/// It has no padding and no invalid bit patterns.
pub(super) unsafe trait Plain {}
// SAFETY: numbers, and structures of numbers of the same size.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u32; N] {}
#[cfg(target_os = "linux")]
// SAFETY: as above.
unsafe impl Plain for libc::ucred {}

/// Returns the value of an option (getsockopt(2)). Where the answer is shorter, the rest of `value` stays.
pub(super) fn get<T: Plain>(socket: impl AsFd, level: i32, name: i32, mut value: T) -> io::Result<T> {
    let mut size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, since it is borrowed; the kernel writes at most `size` bytes into `value`, which is
    // that large and for which any bytes are valid.
    let result = unsafe {
        let place = (&raw mut value).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, place, &mut size)
    };
    match result {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
