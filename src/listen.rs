//! Creating sockets: the options that programs set before bind, and how a Unix path is bound.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;

use rustix::fs::{access, flock, Access, FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{self, sockopt, AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::geteuid;

use crate::logging;
use crate::sys;

/// A socket before bind, for [`Sockets::build_listen_tcp`](crate::Sockets::build_listen_tcp) and
/// [`Sockets::build_socket_udp`](crate::Sockets::build_socket_udp): set options, [`bind`](Self::bind),
/// [`listen`](Self::listen) if it is a TCP socket, and convert it `into()` the std type.
///
/// It is close-on-exec and nonblocking from the start (socket(2), ip(7), tcp(7)). Every setter returns the error of the
/// system call.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let starting = ecdysis::Ecdysis::builder().start()?;
/// let listener = starting.build_listen_tcp("[::1]:0".parse()?, |socket, addr| {
///     socket.set_only_v6(true)?;
///     socket.set_reuse_address(true)?;
///     socket.bind(addr)?;
///     socket.listen(1024)?;
///     Ok(socket.into())
/// })?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    start: Start,
}

impl Socket {
    pub(crate) fn new(addr: SocketAddr, kind: SocketType, start: Start) -> io::Result<Self> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        Ok(Self { fd: open(family, kind)?, start })
    }

    /// SO_REUSEADDR: allows bind even if connections of a former listener are in TIME_WAIT. `listen_tcp` sets it.
    pub fn set_reuse_address(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_socket_reuseaddr(&self.fd, on)?)
    }

    /// SO_REUSEPORT: allows several sockets on one address, over which the kernel spreads connections. (macOS and most
    /// BSDs allow the sockets but do not spread connections. On illumos it is an error.)
    pub fn set_reuse_port(&self, on: bool) -> io::Result<()> {
        sys::net::set_reuse_port(&self.fd, on)
    }

    /// IPV6_V6ONLY: the socket accepts only IPv6. Without it, a socket on `[::]` also accepts IPv4.
    pub fn set_only_v6(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_ipv6_v6only(&self.fd, on)?)
    }

    /// TCP_NODELAY, which accepted connections inherit.
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&self.fd, on)?)
    }

    /// SO_KEEPALIVE, which accepted connections inherit.
    pub fn set_keepalive(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_socket_keepalive(&self.fd, on)?)
    }

    /// SO_SNDBUF in bytes; the kernel doubles it and keeps it within its limits.
    pub fn set_send_buffer_size(&self, bytes: usize) -> io::Result<()> {
        Ok(sockopt::set_socket_send_buffer_size(&self.fd, bytes)?)
    }

    /// SO_RCVBUF in bytes; the kernel doubles it and keeps it within its limits.
    pub fn set_recv_buffer_size(&self, bytes: usize) -> io::Result<()> {
        Ok(sockopt::set_socket_recv_buffer_size(&self.fd, bytes)?)
    }

    /// IP_FREEBIND: allows bind to an address that no interface has yet. An error on systems other than Linux.
    pub fn set_freebind(&self, on: bool) -> io::Result<()> {
        sys::net::set_freebind(&self.fd, on)
    }

    /// Binds to an address (bind(2)).
    pub fn bind(&self, addr: SocketAddr) -> io::Result<()> {
        Ok(net::bind(&self.fd, &addr)?)
    }

    /// Starts listening with this backlog, at most the system's limit (somaxconn, listen(2)).
    ///
    /// While the parent still serves, a new socket starts to listen only at the commit. If it listened earlier, its
    /// clients would wait, and would be reset if the upgrade failed. Until then accept(2) on it fails with `EINVAL`,
    /// and [`Shutdown`](crate::Shutdown) waits.
    pub fn listen(&self, backlog: i32) -> io::Result<()> {
        self.start.listen(&self.fd, backlog)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.fd
    }
}

impl From<Socket> for TcpListener {
    fn from(socket: Socket) -> Self {
        socket.fd.into()
    }
}

impl From<Socket> for UdpSocket {
    fn from(socket: Socket) -> Self {
        socket.fd.into()
    }
}

fn open(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    Ok(sys::net::socket(family, kind, sys::Mode::Nonblocking)?)
}

/// When a new socket starts to listen: immediately, or at the commit. In the latter case this stores the backlog.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start(Option<Arc<AtomicI32>>);

impl Start {
    pub(crate) fn at_commit() -> Self {
        Self(Some(Arc::new(AtomicI32::new(Self::UNSET))))
    }

    /// A value that no program would use as a backlog.
    const UNSET: i32 = i32::MIN;

    pub(crate) fn listen(&self, fd: impl AsFd, backlog: i32) -> io::Result<()> {
        match &self.0 {
            None => Ok(net::listen(fd, backlog)?),
            Some(cell) => {
                cell.store(backlog, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Returns the backlog, if the socket must listen later.
    pub(crate) fn pending(&self) -> Option<i32> {
        self.0.as_ref().map(|cell| cell.load(Ordering::Relaxed)).filter(|backlog| *backlog != Self::UNSET)
    }
}

/// The backlog of listeners. listen(2) reduces it to the system's limit (somaxconn).
pub(crate) const MAX_BACKLOG: i32 = i32::MAX;

/// Device and inode of a file.
pub(crate) type FileId = (u64, u64);

/// A bound socket, and the identity of its file, so that a stop can check whether the file still belongs to it.
pub(crate) type Bound = (OwnedFd, Option<FileId>);

/// Binds a Unix socket to a path, or to the abstract name after an `@`. A stale file, on which no process listens, is
/// replaced; a live one is an error. The file has `mode` from the start; without one, the umask decides, as in std.
pub(crate) fn bind_unix(path: &Path, kind: SocketType, mode: Option<Mode>) -> io::Result<Bound> {
    let socket = open(AddressFamily::UNIX, kind)?;
    if is_abstract(path) {
        net::bind(&socket, &unix_address(path)?)?;
        return Ok((socket, None));
    }
    match sys::net::bind_path(&socket, path, mode) {
        Err(Errno::ADDRINUSE) => {
            let _lock = ReplaceLock::take(path)?;
            remove_stale(path, kind)?;
            sys::net::bind_path(&socket, path, mode)?;
        }
        other => other?,
    }
    Ok((socket, Some(file_id(path)?)))
}

/// Connects to a Unix stream socket, nonblocking. `None` if no process listens there.
pub(crate) fn connect_unix(path: &Path) -> io::Result<Option<OwnedFd>> {
    let socket = open(AddressFamily::UNIX, SocketType::STREAM)?;
    match net::connect(&socket, &unix_address(path)?) {
        Ok(()) => Ok(Some(socket)),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Returns the kernel's form of a path, or of an abstract name after an `@`.
pub(crate) fn unix_address(path: &Path) -> io::Result<SocketAddrUnix> {
    match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => sys::net::abstract_address(name),
        None => Ok(SocketAddrUnix::new(path)?),
    }
}

fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(b"@")
}

pub(crate) fn file_id(path: &Path) -> io::Result<FileId> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// Whether this process cannot create or remove a file at `path`. access(2) checks the real user, which a service that
/// drops its privileges permanently changes as well.
pub(crate) fn is_out_of_reach(path: &Path) -> bool {
    let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    matches!(access(directory, Access::WRITE_OK | Access::EXEC_OK), Err(Errno::ACCESS | Errno::PERM))
}

/// The right to replace a stale socket file, until it is dropped.
///
/// Two starting processes may find the same stale file. Then the slower one could remove the file that the faster one
/// has just bound, and clients could no longer reach the faster one. So a process holds a lock while it checks the
/// file, removes it and binds.
///
/// The lock is on a file of mode 0600, which only its owner can open. With an abstract socket, any local user could
/// take the lock and so prevent the start; with a lock on the directory, any user who can read it.
struct ReplaceLock {
    path: PathBuf,
    _file: fs::File,
}

impl ReplaceLock {
    /// Returns `None` if no such file can be created, for example because another user has taken the name. A start
    /// without the lock is better than no start.
    fn take(socket: &Path) -> io::Result<Option<Self>> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let open = fs::File::options().write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = match open.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((metadata, file)) if metadata.uid() == geteuid().as_raw() && metadata.is_file() => file,
            other => {
                let why = other.map_or_else(|e| e.to_string(), |_| "it belongs to another user".into());
                logging::warn!("replacing a stale socket file without a lock path={} error={why}", path.display());
                return Ok(None);
            }
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // If this file was removed in the meantime, another process has bound the path. Otherwise it may be about
            // to.
            Err(Errno::WOULDBLOCK) => return Err(io::ErrorKind::AddrInUse.into()),
            other => other?,
        }
        if file_id(&path).ok() != Some((file.metadata()?.dev(), file.metadata()?.ino())) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(Some(Self { path, _file: file }))
    }
}

impl Drop for ReplaceLock {
    fn drop(&mut self) {
        // Remove the file before it is closed, while this process still holds the lock.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the socket file of a process that has ended.
fn remove_stale(path: &Path, kind: SocketType) -> io::Result<()> {
    let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use());
    }
    // Connect with another socket type, for which a live socket returns EPROTOTYPE. A real connection to a control
    // socket could stop its server, and a socket that is bound but does not listen yet would seem stale.
    let other = if kind == SocketType::DGRAM { SocketType::STREAM } else { SocketType::DGRAM };
    let probe = open(AddressFamily::UNIX, other)?;
    match net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        _ => Err(in_use()),
    }
}

/// Removes the file at `path` if it still has this identity.
pub(crate) fn unlink_if_ours(path: &Path, ours: FileId) -> io::Result<()> {
    match file_id(path) {
        Ok(id) if id == ours => fs::remove_file(path),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use tempfile::TempDir;

    /// Returns a directory with the socket file of a process that has ended.
    fn stale() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        (directory, path)
    }

    fn bind(path: &Path) -> io::Result<Bound> {
        bind_unix(path, SocketType::STREAM, None)
    }

    #[test]
    fn locks_that_any_user_can_take_do_not_prevent_a_start() {
        let (directory, path) = stale();
        let file = file_id(&path).unwrap();
        let abstract_lock = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let name = format!("ecdysis/stale/{}/{}", file.0, file.1);
        net::bind(&abstract_lock, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap()).unwrap();
        let readable = fs::File::open(directory.path()).unwrap();
        flock(&readable, FlockOperation::NonBlockingLockExclusive).unwrap();
        let (_socket, bound) = bind(&path).unwrap();
        assert_eq!(bound, Some(file_id(&path).unwrap()));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "the lock's file is gone");
    }

    #[test]
    fn one_process_at_a_time_replaces_a_stale_file() {
        let (_directory, path) = stale();
        let lock = ReplaceLock::take(&path).unwrap().unwrap();
        assert_eq!(fs::metadata(&lock.path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(lock);
        let bound = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse, "bound, so not stale");
        drop(bound);
        bind(&path).unwrap();
    }

    #[test]
    fn a_lock_file_of_another_user_does_not_prevent_a_start() {
        if !geteuid().is_root() {
            return;
        }
        let (_directory, path) = stale();
        let lock = path.with_extension("sock.lock");
        fs::write(&lock, "").unwrap();
        std::os::unix::fs::chown(&lock, Some(54_321), None).unwrap();
        bind(&path).unwrap();
        assert!(lock.exists(), "and is not removed");
    }
}
