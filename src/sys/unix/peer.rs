//! The process and user at the other end of a Unix socket, with each system's call.

use std::io;
#[cfg(not(target_os = "linux"))]
use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, OwnedFd};

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
use crate::sys::sockopt;

/// The process, 0 if it is not known, and its effective user and group.
pub(crate) struct Credentials {
    pub(crate) pid: libc::pid_t,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Asks the kernel for the peer of `socket`. Only some systems report the process.
#[cfg(not(any(target_os = "linux", target_os = "illumos", target_os = "solaris")))]
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let fd = socket.as_fd().as_raw_fd();
    let (mut uid, mut gid) = (u32::MAX, u32::MAX);
    // SAFETY: writes two numbers (getpeereid(3)).
    if unsafe { libc::getpeereid(fd, &mut uid, &mut gid) } != 0 {
        return Err(io::Error::last_os_error());
    }
    #[cfg(target_vendor = "apple")]
    let pid = sockopt::get(&socket, libc::SOL_LOCAL, libc::LOCAL_PEERPID, 0).unwrap_or(0);
    #[cfg(not(target_vendor = "apple"))]
    let pid = 0;
    Ok(Credentials { pid, uid, gid })
}

/// Asks the kernel for the peer of `socket`.
#[cfg(any(target_os = "illumos", target_os = "solaris"))]
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let mut cred = std::ptr::null_mut();
    // SAFETY: getpeerucred(3C) creates an object, which ucred_free frees after its last use.
    unsafe {
        if libc::getpeerucred(socket.as_fd().as_raw_fd(), &mut cred) != 0 {
            return Err(io::Error::last_os_error());
        }
        let (pid, uid, gid) = (libc::ucred_getpid(cred), libc::ucred_geteuid(cred), libc::ucred_getegid(cred));
        libc::ucred_free(cred);
        Ok(Credentials { pid, uid, gid })
    }
}

/// Linux has no getpeereid(3). This replaces it when these fallbacks are tested on Linux.
#[cfg(target_os = "linux")]
pub(crate) fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let nobody = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let libc::ucred { pid, uid, gid } = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, nobody)?;
    Ok(Credentials { pid, uid, gid })
}

/// Returns `None`, because these systems have no descriptor that reports the end of a peer.
pub(crate) fn peer_pidfd(_socket: impl AsFd) -> Option<OwnedFd> {
    None
}
