//! Unix seqpacket sockets on Tokio, which has no type for them.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::task::{ready, Context, Poll};

use tokio::io::unix::AsyncFd;

use super::stream::Source;

/// What it names as its successor is not in every Tokio that we build with. Our two types own their descriptor, and that
/// is what it cannot be sure of.
#[allow(deprecated)]
fn register<T: AsRawFd>(socket: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(socket)
}

/// A seqpacket listener on Tokio, see [`listen_unix_seqpacket`](super::TokioEcdysis::listen_unix_seqpacket).
#[derive(Debug)]
pub struct UnixSeqpacketListener(AsyncFd<crate::UnixSeqpacketListener>);

impl UnixSeqpacketListener {
    pub(super) fn from_std(listener: crate::UnixSeqpacketListener) -> io::Result<Self> {
        register(listener).map(Self)
    }

    /// The listener itself, which is nonblocking.
    pub fn get_ref(&self) -> &crate::UnixSeqpacketListener {
        self.0.get_ref()
    }
}

/// One seqpacket connection on Tokio. What one end sends in one call, the other end receives in one call.
#[derive(Debug)]
pub struct UnixSeqpacketConn(AsyncFd<crate::UnixSeqpacketConn>);

impl UnixSeqpacketConn {
    /// Puts a connection on this runtime.
    ///
    /// # Errors
    ///
    /// What ioctl(2) and epoll_ctl(2) say.
    ///
    /// # Panics
    ///
    /// Outside a runtime with I/O, as Tokio's own types do.
    pub fn from_std(connection: crate::UnixSeqpacketConn) -> io::Result<Self> {
        connection.set_nonblocking(true)?;
        register(connection).map(Self)
    }

    /// Connects to a socket file, or to an abstract name behind an `@`.
    ///
    /// # Errors
    ///
    /// As for [`UnixSeqpacketConn::connect`](crate::UnixSeqpacketConn::connect).
    ///
    /// # Panics
    ///
    /// Outside a runtime with I/O, as Tokio's own types do.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_std(crate::UnixSeqpacketConn::connect(path)?)
    }

    /// Sends `record` as a whole. May be cancelled.
    ///
    /// # Errors
    ///
    /// As for [`UnixSeqpacketConn::send`](crate::UnixSeqpacketConn::send).
    pub async fn send(&self, record: &[u8]) -> io::Result<()> {
        loop {
            if let Ok(sent) = self.0.writable().await?.try_io(|connection| connection.get_ref().send(record)) {
                return sent;
            }
        }
    }

    /// Receives one record into `buffer` and returns its length; 0 is the end of the connection. May be cancelled.
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

    /// The connection itself, which is nonblocking.
    pub fn get_ref(&self) -> &crate::UnixSeqpacketConn {
        self.0.get_ref()
    }
}

impl Source for UnixSeqpacketListener {
    type Item = UnixSeqpacketConn;
    type Got = UnixSeqpacketConn;
    type Buffer = ();

    fn item(got: Self::Got) -> Self::Item {
        got
    }

    fn poll(&self, _: &mut (), cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            if let Ok(accepted) = ready.try_io(|listener| listener.get_ref().accept()) {
                return Poll::Ready(accepted.and_then(UnixSeqpacketConn::from_std));
            }
        }
    }

    fn now(&self, _: &mut ()) -> io::Result<Self::Got> {
        self.0.get_ref().accept().and_then(UnixSeqpacketConn::from_std)
    }
}
