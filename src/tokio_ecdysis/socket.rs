//! What the closures of `build_listen_tcp` and its like get, in socket2's words, which programs for 1.1.1 use.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// [`ecdysis::Socket`](crate::Socket), to which it derefs, but bound as a socket of socket2 is:
/// `socket.bind(&addr.into())`.
///
/// For options that have no setter here: `socket2::SockRef::from(&socket).set_tos(16)`.
#[derive(Debug)]
pub struct Socket(crate::Socket);

impl Socket {
    pub(super) fn new(socket: crate::Socket) -> Self {
        Self(socket)
    }

    /// Binds to an address (bind(2)).
    pub fn bind(&self, address: &SockAddr) -> io::Result<()> {
        self.0.bind(address.0)
    }
}

impl Deref for Socket {
    type Target = crate::Socket;

    fn deref(&self) -> &crate::Socket {
        &self.0
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.0.into()
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

/// What [`Socket::bind`] takes: `&addr.into()`, and also `addr.into()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SockAddr(SocketAddr);

impl From<SocketAddr> for SockAddr {
    fn from(address: SocketAddr) -> Self {
        Self(address)
    }
}

impl From<SocketAddr> for &'static SockAddr {
    /// For `bind(addr.into())`. The address is kept until the process ends: a few bytes for a socket that it binds.
    fn from(address: SocketAddr) -> Self {
        Box::leak(Box::new(SockAddr(address)))
    }
}
