//! The process and user at the other end of a Unix socket.
//!
//! rustix has this call too, but its result cannot represent process 0, which the kernel returns for a process in
//! another PID namespace. That is common for a takeover between two containers.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

pub(crate) use libc::ucred as Credentials;

/// Asks the kernel for the peer of `socket`.
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    option(socket, libc::SO_PEERCRED, Credentials { pid: 0, uid: u32::MAX, gid: u32::MAX })
}

/// Returns a descriptor that becomes readable when the process at the other end of `socket` ends. `None` if the kernel
/// is older than 6.5, or that process has ended.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> Option<OwnedFd> {
    /// From asm-generic/socket.h, for all architectures except one.
    const SO_PEERPIDFD: i32 = 77;
    if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        return None;
    }
    let fd = option(socket, SO_PEERPIDFD, -1).ok().filter(|&fd: &i32| fd >= 0)?;
    // SAFETY: the kernel has created this descriptor for this call (SO_PEERPIDFD), so nothing else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns the value of a socket option that has the size of `value` and consists of plain numbers.
fn option<T: Plain>(socket: impl AsFd, name: i32, mut value: T) -> io::Result<T> {
    let mut size = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, because it is borrowed. The kernel writes at most `size` bytes to `value`, which
    // has that size, and `Plain` guarantees that any bytes are valid for it.
    let result = unsafe {
        let place = (&raw mut value).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, name, place, &mut size)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Any bytes are a valid value.
trait Plain {}
impl Plain for i32 {}
impl Plain for Credentials {}
