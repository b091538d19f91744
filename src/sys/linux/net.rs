//! Sockets and pipes that have close-on-exec and the right blocking mode from the start.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs;
use rustix::io::Result;
use rustix::net::sockopt;
use rustix::net::{
    accept_with, bind, socket_with, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};

use crate::sys::stdio::above_stdio;
use crate::sys::Mode;

/// For send(2) and sendmsg(2): a closed peer causes an error, not a signal.
pub(crate) const NOSIGNAL: SendFlags = SendFlags::NOSIGNAL;

/// For recvmsg(2): sets close-on-exec on received descriptors.
pub(crate) const CMSG_CLOEXEC: RecvFlags = RecvFlags::CMSG_CLOEXEC;

fn flags(mode: Mode) -> SocketFlags {
    match mode {
        Mode::Blocking => SocketFlags::CLOEXEC,
        Mode::Nonblocking => SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
    }
}

pub(crate) fn socket(family: AddressFamily, kind: SocketType, mode: Mode) -> Result<OwnedFd> {
    above_stdio(socket_with(family, kind, flags(mode), None)?)
}

/// Creates two connected Unix sockets.
pub(crate) fn socketpair(kind: SocketType, mode: Mode) -> Result<(OwnedFd, OwnedFd)> {
    let (left, right) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags(mode), None)?;
    Ok((above_stdio(left)?, above_stdio(right)?))
}

/// accept4(2) without the peer's address, which std would request.
pub(crate) fn accept(listener: impl AsFd, mode: Mode) -> Result<OwnedFd> {
    above_stdio(accept_with(listener, flags(mode))?)
}

/// Creates a nonblocking pipe, and returns its reading and its writing end.
pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((above_stdio(read)?, above_stdio(write)?))
}

/// Makes room in a pipe for this many bytes, if the system supports it.
pub(crate) fn grow_pipe(pipe: &OwnedFd, bytes: usize) {
    let _ = fcntl_setpipe_size(pipe, bytes);
}

/// Prepares a descriptor that was received over a socket. Here [`CMSG_CLOEXEC`] has already done it.
pub(crate) fn received(fd: OwnedFd) -> Result<OwnedFd> {
    above_stdio(fd)
}

pub(crate) fn family(socket: impl AsFd) -> Result<AddressFamily> {
    sockopt::socket_domain(socket)
}

pub(crate) fn is_listening(socket: impl AsFd) -> Result<bool> {
    sockopt::socket_acceptconn(socket)
}

/// IP_FREEBIND.
pub(crate) fn set_freebind(socket: impl AsFd, on: bool) -> io::Result<()> {
    match family(&socket)? {
        AddressFamily::INET6 => Ok(sockopt::set_ipv6_freebind(socket, on)?),
        _ => Ok(sockopt::set_ip_freebind(socket, on)?),
    }
}

/// SO_REUSEPORT.
pub(crate) fn set_reuse_port(socket: impl AsFd, on: bool) -> io::Result<()> {
    Ok(sockopt::set_socket_reuseport(socket, on)?)
}

/// Returns the abstract name of an address, if it has one.
#[cfg(feature = "systemd_sockets")]
pub(crate) fn abstract_name(address: &SocketAddrUnix) -> Option<&[u8]> {
    address.abstract_name()
}

/// Returns the address of an abstract name (unix(7)).
pub(crate) fn abstract_address(name: &[u8]) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(name)?)
}

/// Binds a Unix socket to a path. The file has `mode` from the start, or the mode that the umask leaves.
pub(crate) fn bind_path(socket: &OwnedFd, path: &Path, mode: Option<fs::Mode>) -> Result<()> {
    if let Some(mode) = mode {
        // Set the mode before bind, which creates the file with the socket's mode, so that other users can never
        // connect.
        fs::fchmod(socket, mode)?;
    }
    bind(socket, &SocketAddrUnix::new(path)?)
}

/// Receives one message. Returns its length, which is larger than the buffer if the message did not fit.
pub(crate) fn receive_record(socket: impl AsFd, buffer: &mut [u8]) -> Result<usize> {
    rustix::net::recv(socket, buffer, RecvFlags::TRUNC).map(|(_, length)| length)
}
