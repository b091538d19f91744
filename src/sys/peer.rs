//! Who is at the other end of a Unix socket.
//!
//! rustix has this call too, but its answer has no room for process 0, and 0 is what the kernel says for a
//! process in another PID namespace: two containers, just what a takeover is for.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

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
    let nobody = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let cred = option(socket, libc::SO_PEERCRED, nobody)?;
    Ok(PeerCred { pid: u32::try_from(cred.pid).ok().filter(|&pid| pid != 0), uid: cred.uid, gid: cred.gid })
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
impl Plain for libc::ucred {}

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
