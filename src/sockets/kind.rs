//! Checks of a descriptor before it is handed over under a key: its kind, and the length of its name.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::{sockopt, AddressFamily, SocketType};

use crate::key::{Key, Kind};
use crate::sys;

/// The longest name that a program may choose, in bytes.
const MAX_NAME: usize = 255;

pub(super) fn check_name(key: &Key) -> io::Result<()> {
    if key.raw_name().len() > MAX_NAME {
        let reason = format!("the name is longer than {MAX_NAME} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(())
}

/// Checks that `fd` is of this kind. Otherwise it would fail only much later, in the accept loop. A listener that is
/// `pending` does not listen yet.
pub(super) fn check_kind(kind: Kind, fd: BorrowedFd<'_>, pending: bool) -> io::Result<()> {
    const IP: &[AddressFamily] = &[AddressFamily::INET, AddressFamily::INET6];
    const UNIX: &[AddressFamily] = &[AddressFamily::UNIX];
    const ANY: &[AddressFamily] = &[AddressFamily::INET, AddressFamily::INET6, AddressFamily::UNIX];
    let (families, socket_type, listening) = match kind {
        Kind::Tcp => (IP, SocketType::STREAM, true),
        Kind::Udp => (IP, SocketType::DGRAM, false),
        Kind::Unix => (UNIX, SocketType::STREAM, true),
        Kind::Seqpacket => (UNIX, SocketType::SEQPACKET, true),
        Kind::UnixDatagram | Kind::DatagramPair => (UNIX, SocketType::DGRAM, false),
        Kind::Stream => (ANY, SocketType::STREAM, false),
        // Not a socket. Bytes are checked when they are read.
        Kind::Bytes | Kind::Fd | Kind::Late | Kind::Drain | Kind::DrainStatus => return Ok(()),
    };
    if sockopt::socket_type(fd)? == socket_type
        && families.contains(&sys::net::family(fd)?)
        && sys::net::is_listening(fd)? == (listening && !pending)
    {
        return Ok(());
    }
    let wanted = if listening { "a listening socket" } else { "a socket" };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not {wanted} of kind {}", kind.word())))
}
