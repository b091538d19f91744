//! Making sockets: the options that programs set before bind, and what bind means for a Unix path.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{fchmod, Mode};
use rustix::io::Errno;
use rustix::net::{self, sockopt, AddressFamily, SocketAddrUnix, SocketType};

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
pub struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(addr: SocketAddr, kind: SocketType) -> io::Result<Self> {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        Ok(Self(open(family, kind)?))
    }

    /// SO_REUSEADDR: bind although connections of a former listener are in TIME_WAIT. Set by `listen_tcp`.
    pub fn set_reuse_address(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_socket_reuseaddr(&self.0, on)?)
    }

    /// SO_REUSEPORT: several sockets on one address, among which the kernel spreads connections.
    pub fn set_reuse_port(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_socket_reuseport(&self.0, on)?)
    }

    /// IPV6_V6ONLY: the socket accepts IPv6 only. Without it, one on `[::]` also accepts IPv4.
    pub fn set_only_v6(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_ipv6_v6only(&self.0, on)?)
    }

    /// TCP_NODELAY, which accepted connections inherit.
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&self.0, on)?)
    }

    /// SO_KEEPALIVE, which accepted connections inherit.
    pub fn set_keepalive(&self, on: bool) -> io::Result<()> {
        Ok(sockopt::set_socket_keepalive(&self.0, on)?)
    }

    /// SO_SNDBUF in bytes; the kernel doubles it and keeps it within its limits.
    pub fn set_send_buffer_size(&self, bytes: usize) -> io::Result<()> {
        Ok(sockopt::set_socket_send_buffer_size(&self.0, bytes)?)
    }

    /// SO_RCVBUF in bytes; the kernel doubles it and keeps it within its limits.
    pub fn set_recv_buffer_size(&self, bytes: usize) -> io::Result<()> {
        Ok(sockopt::set_socket_recv_buffer_size(&self.0, bytes)?)
    }

    /// IP_FREEBIND: bind to an address that no interface has yet. An error on other systems than Linux.
    pub fn set_freebind(&self, on: bool) -> io::Result<()> {
        Ok(sys::net::set_freebind(&self.0, on)?)
    }

    /// Binds to an address (bind(2)).
    pub fn bind(&self, addr: SocketAddr) -> io::Result<()> {
        Ok(net::bind(&self.0, &addr)?)
    }

    /// Starts listening with this backlog, which the system's limit (somaxconn) caps (listen(2)).
    pub fn listen(&self, backlog: i32) -> io::Result<()> {
        Ok(net::listen(&self.0, backlog)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.0
    }
}

impl From<Socket> for TcpListener {
    fn from(socket: Socket) -> Self {
        socket.0.into()
    }
}

impl From<Socket> for UdpSocket {
    fn from(socket: Socket) -> Self {
        socket.0.into()
    }
}

fn open(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    Ok(sys::net::socket(family, kind, sys::Mode::Nonblocking)?)
}

/// listen(2) reduces it to the system's limit (somaxconn).
pub(crate) const MAX_BACKLOG: i32 = i32::MAX;

/// Device and inode of a file.
pub(crate) type FileId = (u64, u64);

/// Binds a Unix socket to a path, or to the abstract name after an `@`. A stale file, on which no process listens, is
/// replaced; a live one is an error. The file has `mode` from the start; without it the umask decides, as with std.
/// Returns the file's identity as well, so that a stop can tell whether the file still belongs to this socket.
pub(crate) fn bind_unix(path: &Path, kind: SocketType, mode: Option<Mode>) -> io::Result<(OwnedFd, Option<FileId>)> {
    let socket = open(AddressFamily::UNIX, kind)?;
    if let Some(mode) = mode {
        // Before bind, which creates the file with the socket's mode: other users can connect at no moment.
        fchmod(&socket, mode)?;
    }
    let address = unix_address(path)?;
    if is_abstract(path) {
        net::bind(&socket, &address)?;
        return Ok((socket, None));
    }
    match net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            let _replacing = remove_stale(path, kind)?;
            net::bind(&socket, &address)?;
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

/// The kernel's form of a path, or of an abstract name that follows an `@`.
pub(crate) fn unix_address(path: &Path) -> rustix::io::Result<SocketAddrUnix> {
    match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => sys::net::abstract_address(name),
        None => SocketAddrUnix::new(path),
    }
}

fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(b"@")
}

pub(crate) fn file_id(path: &Path) -> io::Result<FileId> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// Removes the socket file of a process that has ended. Hold the returned lock until the path is bound again.
///
/// Two starting processes may find the same stale file, and the slower one must not remove what the faster one has
/// bound meanwhile. So the right to remove it is an abstract socket named after the file's inode, and under that lock
/// the file is looked at again.
fn remove_stale(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
    let found = file_id(path)?;
    let lock = open(AddressFamily::UNIX, SocketType::STREAM)?;
    let name = format!("ecdysis/stale/{}/{}", found.0, found.1);
    net::bind(&lock, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;

    let file = fs::symlink_metadata(path)?;
    if (file.dev(), file.ino()) != found || !file.file_type().is_socket() {
        return Err(in_use());
    }
    // With a socket of another type, for which a live socket answers EPROTOTYPE: a connection to a control socket could
    // stop the server that it belongs to, and a socket that is bound and does not listen yet would seem stale.
    let other = if kind == SocketType::DGRAM { SocketType::STREAM } else { SocketType::DGRAM };
    let probe = open(AddressFamily::UNIX, other)?;
    match net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path)?,
        _ => return Err(in_use()),
    }
    Ok(lock)
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
