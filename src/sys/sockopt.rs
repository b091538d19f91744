//! Socket options that rustix does not have, or whose result it cannot represent in every case.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// Any bytes are a valid value.
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

/// Returns the value of an option (getsockopt(2)). If the kernel's value is shorter, the rest of `value` is unchanged.
pub(super) fn get<T: Plain>(socket: impl AsFd, level: i32, name: i32, mut value: T) -> io::Result<T> {
    let mut size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, because it is borrowed. The kernel writes at most `size` bytes to `value`, which
    // has that size and for which any bytes are valid.
    let result = unsafe {
        let place = (&raw mut value).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, place, &mut size)
    };
    match result {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
