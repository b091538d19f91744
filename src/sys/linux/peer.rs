//! Who is at the other end of a Unix socket.
//!
//! rustix has this call too, but its answer has no room for process 0, and 0 is what the kernel says for a
//! process in another PID namespace: two containers, just what a takeover is for.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

pub(crate) use libc::ucred as Credentials;

/// Asks the kernel who is at the other end of `socket`.
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    option(socket, libc::SO_PEERCRED, Credentials { pid: 0, uid: u32::MAX, gid: u32::MAX })
}

/// A descriptor that gets readable when the process at the other end of `socket` ends. `None` where the kernel, older
/// than 6.5, does not have it, or that process has ended.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> Option<OwnedFd> {
    /// asm-generic/socket.h, on all architectures but one.
    const SO_PEERPIDFD: i32 = 77;
    if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        return None;
    }
    let fd = option(socket, SO_PEERPIDFD, -1).ok().filter(|&fd: &i32| fd >= 0)?;
    // SAFETY: the kernel has made this descriptor for this call (SO_PEERPIDFD), so nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The value of a socket option that is as large as `value` and a plain number or a struct of them.
fn option<T: Plain>(socket: impl AsFd, name: i32, mut value: T) -> io::Result<T> {
    let mut size = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, since it is borrowed; the kernel writes at most `size` bytes into `value`, which
    // is that large and for which any bytes are valid, because `Plain` says so.
    let result = unsafe {
        let place = (&raw mut value).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, name, place, &mut size)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Any bytes are a value.
trait Plain {}
impl Plain for i32 {}
impl Plain for Credentials {}
