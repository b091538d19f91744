//! Who is at the other end of a Unix socket.
//!
//! rustix has this call too, but its answer has no room for process 0, and 0 is what the kernel says for a
//! process in another PID namespace: two containers, just what a takeover is for.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};

/// The process, user and group at the other end of a connected Unix socket.
///
/// They are those of the moment in which it connected, or, for a listener, called listen. The kernel vouches for them.
/// User and group are translated into the user namespace of the reader; the ones that have no number there are
/// all 65534.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerCred {
    /// The process, or `None` if it lives in a PID namespace that cannot be seen from here.
    pub pid: Option<u32>,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl PeerCred {
    /// Whether the peer runs as the same effective user as this process, or as root: the rule that the library
    /// goes by unless it is given another.
    pub fn is_same_user_or_root(&self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Asks the kernel who is at the other end of `socket`.
pub(crate) fn peer(socket: impl AsFd) -> io::Result<PeerCred> {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open, since it is borrowed; `cred` is a live value of the type that SO_PEERCRED
    // fills in, every bit pattern of it is valid, and `size` is its true size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&mut cred as *mut libc::ucred).cast(),
            &mut size,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(PeerCred { pid: u32::try_from(cred.pid).ok().filter(|&pid| pid != 0), uid: cred.uid, gid: cred.gid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (left, _right) = UnixStream::pair().unwrap();
        let cred = peer(&left).unwrap();
        assert_eq!(cred.pid, Some(std::process::id()));
        assert_eq!(cred.uid, rustix::process::geteuid().as_raw());
        assert_eq!(cred.gid, rustix::process::getegid().as_raw());
        assert!(cred.is_same_user_or_root());
    }

    #[test]
    fn somebody_else_is_not_the_same_user() {
        let me = rustix::process::geteuid().as_raw();
        assert!(PeerCred { pid: None, uid: 0, gid: 0 }.is_same_user_or_root());
        assert!(!PeerCred { pid: None, uid: me + 1, gid: 0 }.is_same_user_or_root());
    }

    #[test]
    fn what_is_no_unix_socket_is_an_error() {
        assert!(peer(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
