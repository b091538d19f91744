//! The argument of the closures of `build_listen_tcp` and similar methods, with socket2's names, which programs for
//! 1.1.1 use.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// [`ecdysis::Socket`](crate::Socket), to which it derefs, with socket2's way to bind: `socket.bind(&addr.into())`.
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

/// The argument of [`Socket::bind`]: `&addr.into()`, and also `addr.into()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SockAddr(SocketAddr);

impl From<SocketAddr> for SockAddr {
    fn from(address: SocketAddr) -> Self {
        Self(address)
    }
}

impl From<SocketAddr> for &'static SockAddr {
    /// For `bind(addr.into())`. The address is leaked, which costs a few bytes for each socket that is bound in this
    /// way.
    fn from(address: SocketAddr) -> Self {
        Box::leak(Box::new(SockAddr(address)))
    }
}
