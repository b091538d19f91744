//! The process and user at the other end of a Unix socket.
//!
//! rustix has this call too, but its result cannot represent process 0, which the kernel returns for a process in
//! another PID namespace. That is common for a takeover between two containers.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

pub(crate) use libc::ucred as Credentials;
use libc::{SOL_SOCKET, SO_PEERCRED};

use crate::sys::sockopt;
use crate::sys::stdio::above_stdio;

/// Asks the kernel for the peer of `socket`.
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    sockopt::get(socket, SOL_SOCKET, SO_PEERCRED, Credentials { pid: 0, uid: u32::MAX, gid: u32::MAX })
}

/// Returns a descriptor that becomes readable when the process at the other end of `socket` ends. `None` if the kernel
/// is older than 6.5, or that process has ended.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> Option<OwnedFd> {
    /// From asm-generic/socket.h, for all architectures except one.
    const SO_PEERPIDFD: i32 = 77;
    if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        return None;
    }
    let fd = sockopt::get(socket, SOL_SOCKET, SO_PEERPIDFD, -1).ok().filter(|&fd: &i32| fd >= 0)?;
    // SAFETY: the kernel has created this descriptor for this call (SO_PEERPIDFD), so nothing else owns it.
    above_stdio(unsafe { OwnedFd::from_raw_fd(fd) }).ok()
}
