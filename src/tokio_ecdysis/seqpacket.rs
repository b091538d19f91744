//! Unix seqpacket sockets on Tokio, which has no type for them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use futures_core::Stream;
use tokio::io::unix::AsyncFd;

use super::source::{sealed::Sealed, Listener, Source};

/// The replacement for this deprecated constructor is missing in older supported versions of Tokio. It is deprecated
/// because the type may not own its descriptor, but both types here do.
#[allow(deprecated)]
fn register<T: AsRawFd>(socket: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(socket)
}

/// A seqpacket listener on Tokio, see [`listen_unix_seqpacket`](super::TokioEcdysis::listen_unix_seqpacket).
#[derive(Debug)]
pub struct UnixSeqpacketListener(AsyncFd<crate::UnixSeqpacketListener>);

impl AsFd for UnixSeqpacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl UnixSeqpacketListener {
    pub(super) fn from_std(listener: crate::UnixSeqpacketListener) -> io::Result<Self> {
        register(listener).map(Self)
    }

    /// Returns the listener itself, which is nonblocking.
    pub fn get_ref(&self) -> &crate::UnixSeqpacketListener {
        self.0.get_ref()
    }
}

/// One seqpacket connection on Tokio. A record that one end sends in one call is received by the other end in one call.
#[derive(Debug)]
pub struct UnixSeqpacketConn(AsyncFd<crate::UnixSeqpacketConn>);

impl UnixSeqpacketConn {
    /// Registers a connection with the current runtime.
    ///
    /// # Errors
    ///
    /// Those of ioctl(2) and epoll_ctl(2).
    ///
    /// # Panics
    ///
    /// Outside a runtime with I/O, like Tokio's own types.
    pub fn from_std(connection: crate::UnixSeqpacketConn) -> io::Result<Self> {
        connection.set_nonblocking(true)?;
        register(connection).map(Self)
    }

    /// Connects to a socket file, or to an abstract name after an `@`.
    ///
    /// # Errors
    ///
    /// As for [`UnixSeqpacketConn::connect`](crate::UnixSeqpacketConn::connect).
    ///
    /// # Panics
    ///
    /// Outside a runtime with I/O, like Tokio's own types.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_std(crate::UnixSeqpacketConn::connect(path)?)
    }

    /// Sends `record` as a whole, and returns its length. Cancel-safe.
    ///
    /// # Errors
    ///
    /// As for [`UnixSeqpacketConn::send`](crate::UnixSeqpacketConn::send).
    pub async fn send(&self, record: &[u8]) -> io::Result<usize> {
        loop {
            if let Ok(sent) = self.0.writable().await?.try_io(|connection| connection.get_ref().send(record)) {
                return sent.map(|()| record.len());
            }
        }
    }

    /// Receives one record into `buffer` and returns its length; 0 is the end of the connection. Cancel-safe.
    ///
    /// # Errors
    ///
    /// As for [`UnixSeqpacketConn::recv`](crate::UnixSeqpacketConn::recv).
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Ok(length) = self.0.readable().await?.try_io(|connection| connection.get_ref().recv(buffer)) {
                return length;
            }
        }
    }

    /// Returns the connection itself, which is nonblocking.
    pub fn get_ref(&self) -> &crate::UnixSeqpacketConn {
        self.0.get_ref()
    }
}

/// For crates with their own type: `tokio_seqpacket::UnixSeqpacket::try_from(OwnedFd::from(connection))`. The
/// descriptor remains nonblocking.
impl From<UnixSeqpacketConn> for OwnedFd {
    fn from(connection: UnixSeqpacketConn) -> Self {
        connection.0.into_inner().into()
    }
}

/// The connections of a seqpacket listener.
#[derive(Debug)]
pub struct UnixSeqpacketListenerStream(UnixSeqpacketListener);

impl UnixSeqpacketListenerStream {
    /// Creates an endless stream of `listener`.
    pub fn new(listener: UnixSeqpacketListener) -> Self {
        Self(listener)
    }
}

impl Stream for UnixSeqpacketListenerStream {
    type Item = io::Result<UnixSeqpacketConn>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx).map(Some)
    }
}

impl Sealed for UnixSeqpacketListenerStream {}

impl Source for UnixSeqpacketListenerStream {
    type Plain = UnixSeqpacketListener;
    type Accepted = UnixSeqpacketConn;

    fn plain(&self) -> &UnixSeqpacketListener {
        &self.0
    }

    fn into_plain(self) -> UnixSeqpacketListener {
        self.0
    }

    fn item(got: io::Result<Self::Accepted>) -> Self::Item {
        got
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Accepted>> {
        loop {
            let mut ready = ready!(self.0 .0.poll_read_ready(cx))?;
            if let Ok(accepted) = ready.try_io(|listener| listener.get_ref().accept()) {
                return Poll::Ready(accepted.and_then(UnixSeqpacketConn::from_std));
            }
        }
    }

    fn now(&self) -> io::Result<Self::Accepted> {
        self.0.get_ref().accept().and_then(UnixSeqpacketConn::from_std)
    }
}

impl Listener for UnixSeqpacketListenerStream {
    async fn accept(&self) -> io::Result<UnixSeqpacketConn> {
        loop {
            if let Ok(accepted) = self.0 .0.readable().await?.try_io(|listener| listener.get_ref().accept()) {
                return accepted.and_then(UnixSeqpacketConn::from_std);
            }
        }
    }
}
