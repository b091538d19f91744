//! Sockets and pipes that get close-on-exec and their blocking mode by a second call.
//!
//! Another thread may fork between the two calls. Our own spawn then still marks the descriptor, because the child sweeps
//! all of them; a process that other code starts at that moment inherits it, as it inherits those that std makes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs;
use rustix::io::{fcntl_setfd, ioctl_fionbio, Errno, FdFlags, Result};
use rustix::net::{bind, AddressFamily, RecvFlags, ReturnFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::stdio::above_stdio;
use crate::sys::Mode;

/// For send(2) and sendmsg(2): a peer that is gone is an error, not a signal. On Apple's systems SO_NOSIGPIPE says so
/// once for each socket.
#[cfg(not(target_vendor = "apple"))]
pub(crate) const NOSIGNAL: SendFlags = SendFlags::NOSIGNAL;
#[cfg(target_vendor = "apple")]
pub(crate) const NOSIGNAL: SendFlags = SendFlags::empty();

/// For recvmsg(2). [`received`] sets close-on-exec on what is received.
pub(crate) const CMSG_CLOEXEC: RecvFlags = RecvFlags::empty();

/// Elsewhere than on Linux an accepted socket inherits O_NONBLOCK, so the mode is set in either case.
fn dress(fd: OwnedFd, mode: Mode) -> Result<OwnedFd> {
    let fd = above_stdio(fd)?;
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    ioctl_fionbio(&fd, mode == Mode::Nonblocking)?;
    Ok(fd)
}

fn dress_socket(fd: OwnedFd, mode: Mode) -> Result<OwnedFd> {
    let fd = dress(fd, mode)?;
    #[cfg(target_vendor = "apple")]
    rustix::net::sockopt::set_socket_nosigpipe(&fd, true)?;
    Ok(fd)
}

pub(crate) fn socket(family: AddressFamily, kind: SocketType, mode: Mode) -> Result<OwnedFd> {
    dress_socket(rustix::net::socket(family, kind, None)?, mode)
}

/// Two connected Unix sockets.
pub(crate) fn socketpair(kind: SocketType, mode: Mode) -> Result<(OwnedFd, OwnedFd)> {
    let (left, right) = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None)?;
    Ok((dress_socket(left, mode)?, dress_socket(right, mode)?))
}

/// accept(2) without the peer's address, which std's would ask for.
pub(crate) fn accept(listener: impl AsFd, mode: Mode) -> Result<OwnedFd> {
    dress_socket(rustix::net::accept(listener)?, mode)
}

/// A nonblocking pipe: the end to read, the end to write.
pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe()?;
    Ok((dress(read, Mode::Nonblocking)?, dress(write, Mode::Nonblocking)?))
}

/// Makes room in a pipe for so many bytes, where the system can.
pub(crate) fn grow_pipe(_pipe: &OwnedFd, _bytes: usize) {}

/// Dresses a descriptor that came over a socket.
pub(crate) fn received(fd: OwnedFd) -> Result<OwnedFd> {
    let fd = above_stdio(fd)?;
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

pub(crate) fn family(socket: impl AsFd) -> Result<AddressFamily> {
    Ok(rustix::net::getsockname(socket)?.address_family())
}

pub(crate) fn is_listening(socket: impl AsFd) -> Result<bool> {
    let (mut listening, mut size) = (0_i32, 4);
    // SAFETY: the kernel writes at most four bytes into a number of four bytes (getsockopt(2)).
    let result = unsafe {
        let place = (&raw mut listening).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN, place, &mut size)
    };
    match result {
        0 => Ok(listening != 0),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
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

/// The abstract name of an address, which only Linux has.
#[cfg(feature = "systemd_sockets")]
pub(crate) fn abstract_name(_address: &SocketAddrUnix) -> Option<&[u8]> {
    None
}

/// The address of an abstract name, which only Linux has.
pub(crate) fn abstract_address(_name: &[u8]) -> io::Result<SocketAddrUnix> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "only Linux has abstract socket names"))
}

/// Binds a Unix socket to a path. The file has `mode` from the start, or what the umask leaves.
///
/// A socket has no mode of its own before bind here, and to change it afterwards leaves a moment in which other users can
/// connect. So with a mode the file is made in a directory that nobody else can enter, and then linked to its path: that
/// fails if the path exists, as bind does. The name that getsockname(2) returns is the one in that directory.
pub(crate) fn bind_path(socket: &OwnedFd, path: &Path, mode: Option<fs::Mode>) -> Result<()> {
    let Some(mode) = mode else { return bind(socket, &SocketAddrUnix::new(path)?) };
    let private = PrivateDirectory::create(path)?;
    let file = private.file();
    bind(socket, &SocketAddrUnix::new(&file)?)?;
    fs::chmod(&file, mode)?;
    match fs::link(&file, path) {
        Err(Errno::EXIST) => Err(Errno::ADDRINUSE),
        other => other,
    }
}

/// A directory of mode 0700 for one file. Removed with it when dropped.
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
