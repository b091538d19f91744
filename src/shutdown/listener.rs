//! The sockets from which the shutdown handle accepts connections and receives datagrams.

use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use crate::seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener};
use crate::sys::{net, Mode};

/// A listener for [`Shutdown::accept`](crate::Shutdown::accept) and [`Shutdown::incoming`](crate::Shutdown::incoming). It
/// must be nonblocking, as every listener of [`Sockets`](crate::Sockets) is.
pub trait Accept: AsFd + sealed::Sealed {
    /// The type of its connections.
    type Stream;

    /// Accepts one connection, without waiting.
    #[doc(hidden)]
    fn try_accept(&self) -> io::Result<Self::Stream>;
}

/// A datagram socket for [`Shutdown::recv_from`](crate::Shutdown::recv_from): [`UdpSocket`] or [`UnixDatagram`]. It must
/// be nonblocking, as every socket of [`Sockets`](crate::Sockets) is.
pub trait Datagram: AsFd + sealed::Sealed {
    /// The type of a sender's address.
    type Address;

    /// Receives one datagram, without waiting.
    #[doc(hidden)]
    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, Self::Address)>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::TcpListener {}
    impl Sealed for super::UdpSocket {}
    impl Sealed for super::UnixDatagram {}
    impl Sealed for super::UnixListener {}
    impl Sealed for super::UnixSeqpacketListener {}
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    fn try_accept(&self) -> io::Result<TcpStream> {
        Ok(net::accept(self, Mode::Blocking)?.into())
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    fn try_accept(&self) -> io::Result<UnixStream> {
        Ok(net::accept(self, Mode::Blocking)?.into())
    }
}

impl Accept for UnixSeqpacketListener {
    type Stream = UnixSeqpacketConn;

    fn try_accept(&self) -> io::Result<UnixSeqpacketConn> {
        self.accept()
    }
}

impl Datagram for UdpSocket {
    type Address = std::net::SocketAddr;

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, Self::Address)> {
        self.recv_from(buffer)
    }
}

impl Datagram for UnixDatagram {
    type Address = std::os::unix::net::SocketAddr;

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, Self::Address)> {
        self.recv_from(buffer)
    }
}
