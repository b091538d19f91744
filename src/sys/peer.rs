//! The process and user at the other end of a Unix socket.

use std::io;
use std::os::fd::AsFd;

pub(crate) use super::system::peer::peer_pidfd;
use super::system::peer::{credentials, Credentials};

/// The process, user and group at the other end of a connected Unix socket.
///
/// The kernel recorded them when the peer connected, or, for a listener, when it called listen. User and group are
/// translated into the reader's user namespace. Those without a number there are 65534.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerCred {
    /// The process, or `None` if its PID namespace is not visible here.
    pub pid: Option<u32>,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl PeerCred {
    /// Returns whether the peer runs as the same effective user as this process, or as root. This is the library's
    /// default rule.
    pub fn is_same_user_or_root(&self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Asks the kernel for the peer of `socket`.
pub(crate) fn peer(socket: impl AsFd) -> io::Result<PeerCred> {
    let Credentials { pid, uid, gid } = credentials(socket)?;
    Ok(PeerCred { pid: u32::try_from(pid).ok().filter(|&pid| pid != 0), uid, gid })
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
    fn the_end_of_a_peer_can_be_waited_for() {
        let (left, _right) = UnixStream::pair().unwrap();
        let Some(pidfd) = peer_pidfd(&left) else { return };
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 0, "this process lives");
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
