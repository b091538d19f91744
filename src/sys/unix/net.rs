//! Sockets and pipes that get close-on-exec and their blocking mode by a second call.
//!
//! Another thread may fork between the two calls. The library's own child still sets close-on-exec on the descriptor,
//! because it sweeps all of them. A process that other code starts at that moment inherits it, as it inherits
//! descriptors that std creates.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs;
use rustix::io::{fcntl_setfd, ioctl_fionbio, Errno, FdFlags, Result};
use rustix::net::{bind, AddressFamily, RecvFlags, ReturnFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::sockopt;
use crate::sys::stdio::above_stdio;
use crate::sys::Mode;

/// For send(2) and sendmsg(2): a closed peer causes an error, not a signal. On Apple's systems SO_NOSIGPIPE does this,
/// once per socket.
#[cfg(not(target_vendor = "apple"))]
pub(crate) const NOSIGNAL: SendFlags = SendFlags::NOSIGNAL;
#[cfg(target_vendor = "apple")]
pub(crate) const NOSIGNAL: SendFlags = SendFlags::empty();

/// For recvmsg(2). [`received`] sets close-on-exec on received descriptors.
pub(crate) const CMSG_CLOEXEC: RecvFlags = RecvFlags::empty();

/// On systems other than Linux an accepted socket inherits O_NONBLOCK, so the mode is set in both cases.
fn prepare(fd: OwnedFd, mode: Mode) -> Result<OwnedFd> {
    let fd = above_stdio(fd)?;
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    ioctl_fionbio(&fd, mode == Mode::Nonblocking)?;
    Ok(fd)
}

fn prepare_socket(fd: OwnedFd, mode: Mode) -> Result<OwnedFd> {
    let fd = prepare(fd, mode)?;
    #[cfg(target_vendor = "apple")]
    rustix::net::sockopt::set_socket_nosigpipe(&fd, true)?;
    Ok(fd)
}

pub(crate) fn socket(family: AddressFamily, kind: SocketType, mode: Mode) -> Result<OwnedFd> {
    prepare_socket(rustix::net::socket(family, kind, None)?, mode)
}

/// Creates two connected Unix sockets.
pub(crate) fn socketpair(kind: SocketType, mode: Mode) -> Result<(OwnedFd, OwnedFd)> {
    let (left, right) = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None)?;
    Ok((prepare_socket(left, mode)?, prepare_socket(right, mode)?))
}

/// accept(2) without the peer's address, which std would request.
pub(crate) fn accept(listener: impl AsFd, mode: Mode) -> Result<OwnedFd> {
    prepare_socket(rustix::net::accept(listener)?, mode)
}

/// Creates a nonblocking pipe, and returns its reading and its writing end.
pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe()?;
    Ok((prepare(read, Mode::Nonblocking)?, prepare(write, Mode::Nonblocking)?))
}

/// Makes room in a pipe for this many bytes, if the system supports it.
pub(crate) fn grow_pipe(_pipe: &OwnedFd, _bytes: usize) {}

/// Prepares a descriptor that was received over a socket.
pub(crate) fn received(fd: OwnedFd) -> Result<OwnedFd> {
    let fd = above_stdio(fd)?;
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

pub(crate) fn family(socket: impl AsFd) -> Result<AddressFamily> {
    Ok(rustix::net::getsockname(socket)?.address_family())
}

pub(crate) fn is_listening(socket: impl AsFd) -> Result<bool> {
    let listening = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, 0);
    listening.map(|listening| listening != 0).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))
}

/// IP_FREEBIND, which only Linux has.
pub(crate) fn set_freebind(_socket: impl AsFd, _on: bool) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "only Linux has IP_FREEBIND"))
}

/// SO_REUSEPORT.
pub(crate) fn set_reuse_port(socket: impl AsFd, on: bool) -> io::Result<()> {
    #[cfg(any(target_os = "illumos", target_os = "solaris"))]
    {
        let _ = (socket, on);
        Err(io::Error::new(io::ErrorKind::Unsupported, "SO_REUSEPORT is not supported on this system"))
    }
    #[cfg(not(any(target_os = "illumos", target_os = "solaris")))]
    Ok(rustix::net::sockopt::set_socket_reuseport(socket, on)?)
}

/// Returns the abstract name of an address. Only Linux has these.
#[cfg(feature = "systemd_sockets")]
pub(crate) fn abstract_name(_address: &SocketAddrUnix) -> Option<&[u8]> {
    None
}

/// Returns the address of an abstract name. Only Linux has these.
pub(crate) fn abstract_address(_name: &[u8]) -> io::Result<SocketAddrUnix> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "only Linux has abstract socket names"))
}

/// Binds a Unix socket to a path. The file has `mode` from the start, or the mode that the umask leaves.
///
/// On these systems a socket has no mode before bind, and changing it later would leave a moment in which other users
/// can connect. So with a mode, the file is created in a directory that no other user can enter, and then linked to its
/// path, which fails if the path exists, like bind. getsockname(2) returns the name in that directory.
pub(crate) fn bind_path(socket: &OwnedFd, path: &Path, mode: Option<fs::Mode>) -> Result<()> {
    let Some(mode) = mode else { return bind(socket, &SocketAddrUnix::new(path)?) };
    // Look first, because a socket can be bound only once, and the caller binds this one again after it has replaced a
    // stale file.
    if fs::lstat(path).is_ok() {
        return Err(Errno::ADDRINUSE);
    }
    let private = PrivateDirectory::create(path)?;
    let file = private.file();
    bind(socket, &SocketAddrUnix::new(&file)?)?;
    fs::chmod(&file, mode)?;
    match fs::link(&file, path) {
        Err(Errno::EXIST) => Err(Errno::ADDRINUSE),
        other => other,
    }
}

/// A directory of mode 0700 for one file. Dropping it removes both.
struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    fn create(beside: &Path) -> Result<Self> {
        let name = format!(".{:08x}", RandomState::new().build_hasher().finish() as u32);
        let path = beside.with_file_name(name);
        fs::mkdir(&path, fs::Mode::RWXU)?;
        Ok(Self(path))
    }

    fn file(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        let _ = fs::unlink(self.file());
        let _ = fs::rmdir(&self.0);
    }
}

/// Receives one message. Returns its length, or a larger number than the buffer's size if the message did not fit.
pub(crate) fn receive_record(socket: impl AsFd, buffer: &mut [u8]) -> Result<usize> {
    let size = buffer.len();
    let mut into = [io::IoSliceMut::new(buffer)];
    let message = rustix::net::recvmsg(socket, &mut into, &mut Default::default(), RecvFlags::empty())?;
    Ok(if message.flags.contains(ReturnFlags::TRUNC) { size + 1 } else { message.bytes })
}
