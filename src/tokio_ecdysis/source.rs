//! The sources of a [`StoppableStream`](super::StoppableStream): Tokio's listeners, and a UDP socket.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::BytesMut;
use futures_core::Stream;
use tokio::io::ReadBuf;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use crate::sys::{net, Mode};

/// The source of a [`StoppableStream`](super::StoppableStream) of this crate.
pub trait Source: Stream + sealed::Sealed + Unpin {
    /// Tokio's type of the listener or socket.
    type Plain: AsFd;

    /// The underlying listener or socket.
    #[doc(hidden)]
    fn plain(&self) -> &Self::Plain;

    #[doc(hidden)]
    fn into_plain(self) -> Self::Plain;

    /// A connection, with its peer's address unless it is a seqpacket connection; or a datagram with its sender's
    /// address.
    type Accepted;

    #[doc(hidden)]
    fn item(got: io::Result<Self::Accepted>) -> Self::Item;

    #[doc(hidden)]
    fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Accepted>>;

    /// Asks the kernel; `WouldBlock` if there is nothing.
    #[doc(hidden)]
    fn now(&self) -> io::Result<Self::Accepted>;
}

/// The source of a [`StoppableStream`](super::StoppableStream) of connections.
pub trait Listener: Source {
    /// Accepts one connection, in every state. Several tasks may wait at the same time.
    #[doc(hidden)]
    fn accept(&self) -> impl Future<Output = io::Result<Self::Accepted>> + Send;
}

pub(super) mod sealed {
    pub trait Sealed {}
    impl Sealed for super::TcpListenerStream {}
    impl Sealed for super::UnixListenerStream {}
    impl Sealed for super::UdpStream {}
}

fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(net::accept(listener, Mode::Nonblocking)?)
}

/// The peer has closed in the meantime, which affects only this connection.
fn gone(_: io::Error) -> io::Error {
    rustix::io::Errno::CONNABORTED.into()
}

macro_rules! listeners {
    ($($source:ty: $listener:ty, $stream:ident, $address:ty;)*) => {$(
        impl Source for $source {
            type Plain = $listener;
            type Accepted = ($stream, $address);

            fn plain(&self) -> &$listener {
                self.as_ref()
            }

            fn into_plain(self) -> $listener {
                self.into_inner()
            }

            fn item(got: io::Result<Self::Accepted>) -> Self::Item {
                got.map(|(stream, _)| stream)
            }

            fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Accepted>> {
                self.plain().poll_accept(cx)
            }

            fn now(&self) -> io::Result<Self::Accepted> {
                let stream = $stream::from_std(accept(self.plain())?.into())?;
                let peer = stream.peer_addr().map_err(gone)?;
                Ok((stream, peer))
            }
        }

        impl Listener for $source {
            fn accept(&self) -> impl Future<Output = io::Result<Self::Accepted>> + Send {
                self.plain().accept()
            }
        }
    )*};
}

listeners! {
    TcpListenerStream: TcpListener, TcpStream, SocketAddr;
    UnixListenerStream: UnixListener, UnixStream, tokio::net::unix::SocketAddr;
}

/// The largest possible datagram.
const DATAGRAM: usize = 1 << 16;

/// The datagrams of a UDP socket, each with its sender.
#[derive(Debug)]
pub struct UdpStream {
    socket: UdpSocket,
    buffer: Mutex<Vec<u8>>,
}

impl UdpStream {
    pub(super) fn new(socket: UdpSocket) -> Self {
        Self { socket, buffer: Mutex::default() }
    }

    fn buffer(&self) -> MutexGuard<'_, Vec<u8>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.resize(DATAGRAM, 0);
        buffer
    }
}

impl Stream for UdpStream {
    type Item = io::Result<(BytesMut, SocketAddr)>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx).map(Some)
    }
}

impl Source for UdpStream {
    type Plain = UdpSocket;
    type Accepted = (BytesMut, SocketAddr);

    fn plain(&self) -> &UdpSocket {
        &self.socket
    }

    fn into_plain(self) -> UdpSocket {
        self.socket
    }

    fn item(got: io::Result<Self::Accepted>) -> Self::Item {
        got
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Accepted>> {
        let mut buffer = self.buffer();
        let mut read = ReadBuf::new(&mut buffer);
        self.socket.poll_recv_from(cx, &mut read).map_ok(|sender| (BytesMut::from(read.filled()), sender))
    }

    fn now(&self) -> io::Result<Self::Accepted> {
        let mut buffer = self.buffer();
        let (_, length, sender) = rustix::net::recvfrom(&self.socket, &mut *buffer, rustix::net::RecvFlags::DONTWAIT)?;
        let sender = sender.and_then(|sender| SocketAddr::try_from(sender).ok());
        let sender = sender.ok_or(io::ErrorKind::InvalidData)?;
        Ok((BytesMut::from(&buffer[..length]), sender))
    }
}
