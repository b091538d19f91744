//! The process and user at the other end of a Unix socket, with each system's call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

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
    let pid = {
        let (mut pid, mut size): (libc::pid_t, _) = (0, size_of::<libc::pid_t>() as libc::socklen_t);
        // SAFETY: writes at most this many bytes to a number of that size (getsockopt(2)).
        let result =
            unsafe { libc::getsockopt(fd, libc::SOL_LOCAL, libc::LOCAL_PEERPID, (&raw mut pid).cast(), &mut size) };
        if result == 0 {
            pid
        } else {
            0
        }
    };
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
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: writes at most this many bytes to a struct of that size (getsockopt(2)).
    let result = unsafe {
        let place = (&raw mut cred).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, place, &mut size)
    };
    match result {
        0 => Ok(Credentials { pid: cred.pid, uid: cred.uid, gid: cred.gid }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns no descriptor that polls as readable when the process at the other end of `socket` ends, because there is
/// none.
pub(crate) fn peer_pidfd(_socket: impl AsFd) -> Option<OwnedFd> {
    None
}
