//! Streams of connections and datagrams that obey the shutdown handle.

use std::fmt;
use std::future::{pending, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use futures_core::Stream;
use tokio::io::ReadBuf;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use super::gate::{Gate, StopOnShutdown};
use crate::shutdown::Shutdown;
use crate::sys::{net, Mode};

/// The connections of a listener, or the datagrams of a UDP socket, as a [`Stream`] of `io::Result`s.
///
/// It is tokio-stream's `TcpListenerStream` or `UnixListenerStream`, or
/// [`UnixSeqpacketListenerStream`](super::UnixSeqpacketListenerStream) or [`UdpStream`], with an end.
///
/// It yields nothing before [`ready`](super::TokioEcdysisBuilder::ready), so it may be polled earlier: connections that
/// this generation may never serve are left to the parent. It yields nothing while a new generation is on probation.
/// After an upgrade it ends at once, and the queue belongs to the next generation. At a stop it ends when the queue is
/// empty, unless [`StopOnShutdown::No`] was chosen. A stream that has ended stays ended, and has closed its listener or
/// socket: while any process keeps it open, connections are queued that no process accepts.
///
/// Errors of one connection and a lack of descriptors are handled. Only an error of the listener itself is yielded, and
/// then the stream ends.
///
/// [`Shutdown::drain`] waits until the stream has ended or is dropped, so that a guard for what it yields is never missed.
/// A stream that is kept but not polled makes `drain` wait for its full deadline.
pub struct StoppableStream<S: Stream> {
    /// `None` once the stream has ended.
    source: Option<S>,
    gate: Gate,
    /// [`item`] for this source, so that a program can be generic over any `S: Stream`.
    next: Next<S>,
}

type Next<S> = fn(&mut S, &mut Gate, &mut Context<'_>) -> Poll<Option<<S as Stream>::Item>>;

impl<S: Source> StoppableStream<S> {
    pub(super) fn new(source: S, shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        let mut gate = Gate::new(shutdown, stop_on_shutdown);
        gate.count();
        Self { source: Some(source), gate, next: item }
    }

    /// Returns the underlying Tokio listener or socket, unless the stream has ended. It accepts in every state.
    pub fn get_ref(&self) -> Option<&S::Plain> {
        self.source.as_ref().map(S::plain)
    }

    /// Returns the underlying Tokio listener or socket, unless the stream has ended. It ignores the states of the shutdown
    /// handle: accept from it only between `ready` and the end of [`over`](super::TokioEcdysis::over).
    pub fn into_inner(self) -> Option<S::Plain> {
        self.source.map(S::into_plain)
    }
}

/// Polls, and drops the source at the end.
fn until_end<S, T>(source: &mut Option<S>, poll: impl FnOnce(&mut S) -> Poll<Option<T>>) -> Poll<Option<T>> {
    let next = source.as_mut().map_or(Poll::Ready(None), poll);
    if let Poll::Ready(None) = next {
        *source = None;
    }
    next
}

fn got<S: Source>(source: &mut S, gate: &mut Gate, cx: &mut Context<'_>) -> Poll<Option<io::Result<S::Got>>> {
    gate.poll_next(cx, source, |source| source.plain().as_fd(), S::poll, S::now)
}

fn item<S: Source>(source: &mut S, gate: &mut Gate, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
    got(source, gate, cx).map(|next| next.map(S::item))
}

impl StoppableStream<TcpListenerStream> {
    /// Returns the next connection with its peer's address, or `None` when accepting is over. For the accept loops of
    /// frameworks. Cancel-safe.
    pub async fn accept(&mut self) -> Option<io::Result<(TcpStream, SocketAddr)>> {
        poll_fn(|cx| until_end(&mut self.source, |source| got(source, &mut self.gate, cx))).await
    }

    /// As [`accept`](Self::accept), but never resolves once the stream has ended, and logs its last error. For frameworks
    /// that accept in a loop without an end. Cancel-safe.
    pub async fn accept_or_pend(&mut self) -> (TcpStream, SocketAddr) {
        match self.accept().await {
            Some(Ok(accepted)) => accepted,
            _ => pending().await,
        }
    }

    /// Returns the address that the listener is bound to.
    ///
    /// # Errors
    ///
    /// That of getsockname(2), or `NotConnected` once the stream has ended.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.get_ref().ok_or(io::ErrorKind::NotConnected)?.local_addr()
    }
}

impl StoppableStream<UnixListenerStream> {
    /// Returns the next connection with its peer's address, or `None` when accepting is over. Cancel-safe.
    pub async fn accept(&mut self) -> Option<io::Result<(UnixStream, tokio::net::unix::SocketAddr)>> {
        poll_fn(|cx| until_end(&mut self.source, |source| got(source, &mut self.gate, cx))).await
    }

    /// As [`accept`](Self::accept), but never resolves once the stream has ended, and logs its last error. For frameworks
    /// that accept in a loop without an end. Cancel-safe.
    pub async fn accept_or_pend(&mut self) -> (UnixStream, tokio::net::unix::SocketAddr) {
        match self.accept().await {
            Some(Ok(accepted)) => accepted,
            _ => pending().await,
        }
    }

    /// Returns the address that the listener is bound to.
    ///
    /// # Errors
    ///
    /// That of getsockname(2), or `NotConnected` once the stream has ended.
    pub fn local_addr(&self) -> io::Result<tokio::net::unix::SocketAddr> {
        self.get_ref().ok_or(io::ErrorKind::NotConnected)?.local_addr()
    }
}

impl<S: Stream + Unpin> Stream for StoppableStream<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { source, gate, next } = self.get_mut();
        until_end(source, |source| next(source, gate, cx))
    }
}

impl<S: Stream + fmt::Debug> fmt::Debug for StoppableStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoppableStream").field("source", &self.source).finish_non_exhaustive()
    }
}

/// The source of a [`StoppableStream`] of this crate.
pub trait Source: Stream + sealed::Sealed + Unpin {
    /// Tokio's type for it.
    type Plain: AsFd;

    /// The underlying listener or socket.
    #[doc(hidden)]
    fn plain(&self) -> &Self::Plain;

    #[doc(hidden)]
    fn into_plain(self) -> Self::Plain;

    #[doc(hidden)]
    type Got;

    #[doc(hidden)]
    fn item(got: io::Result<Self::Got>) -> Self::Item;

    #[doc(hidden)]
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>>;

    /// Asks the kernel; `WouldBlock` if there is nothing.
    #[doc(hidden)]
    fn now(&mut self) -> io::Result<Self::Got>;
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

/// The peer has closed meanwhile, which concerns one connection only.
fn gone(_: io::Error) -> io::Error {
    rustix::io::Errno::CONNABORTED.into()
}

impl Source for TcpListenerStream {
    type Plain = TcpListener;
    type Got = (TcpStream, SocketAddr);

    fn plain(&self) -> &TcpListener {
        self.as_ref()
    }

    fn into_plain(self) -> TcpListener {
        self.into_inner()
    }

    fn item(got: io::Result<Self::Got>) -> Self::Item {
        got.map(|(stream, _)| stream)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        self.plain().poll_accept(cx)
    }

    fn now(&mut self) -> io::Result<Self::Got> {
        let stream = TcpStream::from_std(accept(self.plain())?.into())?;
        let peer = stream.peer_addr().map_err(gone)?;
        Ok((stream, peer))
    }
}

impl Source for UnixListenerStream {
    type Plain = UnixListener;
    type Got = (UnixStream, tokio::net::unix::SocketAddr);

    fn plain(&self) -> &UnixListener {
        self.as_ref()
    }

    fn into_plain(self) -> UnixListener {
        self.into_inner()
    }

    fn item(got: io::Result<Self::Got>) -> Self::Item {
        got.map(|(stream, _)| stream)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        self.plain().poll_accept(cx)
    }

    fn now(&mut self) -> io::Result<Self::Got> {
        let stream = UnixStream::from_std(accept(self.plain())?.into())?;
        let peer = stream.peer_addr().map_err(gone)?;
        Ok((stream, peer))
    }
}

/// The largest datagram there is.
const DATAGRAM: usize = 1 << 16;

/// The datagrams of a UDP socket, each with its sender.
#[derive(Debug)]
pub struct UdpStream {
    socket: UdpSocket,
    buffer: Vec<u8>,
}

impl UdpStream {
    pub(super) fn new(socket: UdpSocket) -> Self {
        Self { socket, buffer: Vec::new() }
    }
}

impl Stream for UdpStream {
    type Item = io::Result<(BytesMut, SocketAddr)>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll(cx).map(Some)
    }
}

impl Source for UdpStream {
    type Plain = UdpSocket;
    type Got = (BytesMut, SocketAddr);

    fn plain(&self) -> &UdpSocket {
        &self.socket
    }

    fn into_plain(self) -> UdpSocket {
        self.socket
    }

    fn item(got: io::Result<Self::Got>) -> Self::Item {
        got
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        self.buffer.resize(DATAGRAM, 0);
        let mut read = ReadBuf::new(&mut self.buffer);
        self.socket.poll_recv_from(cx, &mut read).map_ok(|sender| (BytesMut::from(read.filled()), sender))
    }

    fn now(&mut self) -> io::Result<Self::Got> {
        self.buffer.resize(DATAGRAM, 0);
        let buffer = self.buffer.as_mut_slice();
        let (_, length, sender) = rustix::net::recvfrom(&self.socket, buffer, rustix::net::RecvFlags::DONTWAIT)?;
        let sender = sender.and_then(|sender| SocketAddr::try_from(sender).ok());
        let sender = sender.ok_or(io::ErrorKind::InvalidData)?;
        Ok((BytesMut::from(&self.buffer[..length]), sender))
    }
}
