//! Streams of connections and datagrams that keep to the shutdown handle, and futures that end with it.

use std::fmt;
use std::future::{poll_fn, Future};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{pin, Pin};
use std::task::{Context, Poll};

use futures_core::Stream;
use rustix::net::SocketFlags;
use tokio::io::ReadBuf;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};

use super::gate::Gate;
use crate::shutdown::{Phase, Shutdown};

/// Whether a stream ends at a stop. At an upgrade every stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopOnShutdown {
    /// It ends at a stop, full or partial.
    Yes,
    /// It goes on after a stop until it is dropped. A Unix socket's file is not removed then. Before `ready`, and while
    /// a new generation is on probation, it yields nothing either.
    No,
}

/// The connections of a listener, or the datagrams of a UDP socket, as a [`Stream`] of `io::Result`s.
///
/// It yields nothing before [`ready`](super::TokioEcdysisBuilder::ready), so it may be polled earlier: what this
/// generation may never serve is left to the parent. It yields nothing while a new generation is on probation. After
/// an upgrade it ends at once, and what waits in the queue is the next generation's. At a stop it ends when the queue
/// is empty, unless [`StopOnShutdown::No`] was chosen. A stream that has ended stays ended.
///
/// Errors of one connection and a lack of descriptors are dealt with. Only an error of the listener itself is yielded,
/// and then the stream ends.
///
/// [`Shutdown::drain`] waits until the stream has ended or is dropped, so that a guard taken for what it yields is never
/// missed: do not keep a stream that is polled no more.
pub struct StoppableStream<L: Source> {
    source: L,
    buffer: L::Buffer,
    gate: Gate,
}

/// The stream of a UDP socket: every datagram with its sender.
pub type UdpStream = UdpSocket;

impl<L: Source> StoppableStream<L> {
    pub(super) fn new(source: L, shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        let mut gate = Gate::new(shutdown, stop_on_shutdown);
        gate.count();
        Self { source, buffer: L::Buffer::default(), gate }
    }

    /// The plain Tokio listener or socket. What is accepted from it is accepted in every state.
    pub fn get_ref(&self) -> &L {
        &self.source
    }

    /// The plain Tokio listener or socket, for what cannot be given a stream. Accept from it only after `ready`, and
    /// no more when [`over`](super::TokioEcdysis::over) is: nothing here sees to that any more.
    pub fn into_inner(self) -> L {
        self.source
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<L::Got>>> {
        let mut source = (&self.source, &mut self.buffer);
        self.gate.poll_next(
            cx,
            &mut source,
            |(source, buffer), cx| source.poll(buffer, cx),
            |(source, buffer)| source.now(buffer),
        )
    }
}

impl StoppableStream<TcpListener> {
    /// The next connection with its peer's address, or `None` when it is over: for the accept loops of others
    /// (`axum::serve` takes a `Listener`; the crate's axum example has one). May be cancelled.
    pub async fn accept(&mut self) -> Option<io::Result<(TcpStream, SocketAddr)>> {
        poll_fn(|cx| self.poll(cx)).await
    }
}

impl StoppableStream<UnixListener> {
    /// The next connection with its peer's address, or `None` when it is over. May be cancelled.
    pub async fn accept(&mut self) -> Option<io::Result<(UnixStream, tokio::net::unix::SocketAddr)>> {
        poll_fn(|cx| self.poll(cx)).await
    }
}

impl<L: Source> Stream for StoppableStream<L> {
    type Item = io::Result<L::Item>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll(cx).map(|next| next.map(|got| got.map(L::item)))
    }
}

impl<L: Source + fmt::Debug> fmt::Debug for StoppableStream<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoppableStream").field("source", &self.source).finish_non_exhaustive()
    }
}

/// What a [`StoppableStream`] may be of: Tokio's TCP and Unix listeners, its UDP socket, and [`UnixSeqpacketListener`](super::UnixSeqpacketListener).
pub trait Source: sealed::Sealed + Unpin {
    /// What the stream yields: a connection, or a datagram with its sender.
    type Item;

    #[doc(hidden)]
    type Got;

    #[doc(hidden)]
    type Buffer: Default + Unpin;

    #[doc(hidden)]
    fn item(got: Self::Got) -> Self::Item;

    #[doc(hidden)]
    fn poll(&self, buffer: &mut Self::Buffer, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>>;

    /// What the kernel has now; `WouldBlock` if nothing.
    #[doc(hidden)]
    fn now(&self, buffer: &mut Self::Buffer) -> io::Result<Self::Got>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for tokio::net::TcpListener {}
    impl Sealed for tokio::net::UnixListener {}
    impl Sealed for tokio::net::UdpSocket {}
    impl Sealed for crate::tokio_ecdysis::UnixSeqpacketListener {}
}

fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
}

/// The peer has gone since: that concerns one connection.
fn gone(_: io::Error) -> io::Error {
    rustix::io::Errno::CONNABORTED.into()
}

impl Source for TcpListener {
    type Item = TcpStream;
    type Got = (TcpStream, SocketAddr);
    type Buffer = ();

    fn item((stream, _): Self::Got) -> TcpStream {
        stream
    }

    fn poll(&self, _: &mut (), cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        self.poll_accept(cx)
    }

    fn now(&self, _: &mut ()) -> io::Result<Self::Got> {
        let stream = TcpStream::from_std(accept(self)?.into())?;
        let peer = stream.peer_addr().map_err(gone)?;
        Ok((stream, peer))
    }
}

impl Source for UnixListener {
    type Item = UnixStream;
    type Got = (UnixStream, tokio::net::unix::SocketAddr);
    type Buffer = ();

    fn item((stream, _): Self::Got) -> UnixStream {
        stream
    }

    fn poll(&self, _: &mut (), cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        self.poll_accept(cx)
    }

    fn now(&self, _: &mut ()) -> io::Result<Self::Got> {
        let stream = UnixStream::from_std(accept(self)?.into())?;
        let peer = stream.peer_addr().map_err(gone)?;
        Ok((stream, peer))
    }
}

/// The largest datagram there is.
const DATAGRAM: usize = 1 << 16;

impl Source for UdpSocket {
    type Item = (Vec<u8>, SocketAddr);
    type Got = (Vec<u8>, SocketAddr);
    type Buffer = Vec<u8>;

    fn item(got: Self::Got) -> Self::Item {
        got
    }

    fn poll(&self, buffer: &mut Vec<u8>, cx: &mut Context<'_>) -> Poll<io::Result<Self::Got>> {
        buffer.resize(DATAGRAM, 0);
        let mut read = ReadBuf::new(buffer);
        self.poll_recv_from(cx, &mut read).map_ok(|sender| (read.filled().to_vec(), sender))
    }

    fn now(&self, buffer: &mut Vec<u8>) -> io::Result<Self::Got> {
        buffer.resize(DATAGRAM, 0);
        let (_, length, sender) = rustix::net::recvfrom(self, buffer.as_mut_slice(), rustix::net::RecvFlags::DONTWAIT)?;
        let sender = sender.and_then(|sender| SocketAddr::try_from(sender).ok());
        let sender = sender.ok_or(io::ErrorKind::InvalidData)?;
        Ok((buffer[..length].to_vec(), sender))
    }
}

/// Something with long operations of its own, which end when it is over: a UDP socket, say.
#[derive(Debug)]
pub struct Stoppable<S> {
    inner: S,
    shutdown: Shutdown,
    stop_on_shutdown: StopOnShutdown,
}

impl<S> Stoppable<S> {
    pub(super) fn new(inner: S, shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        Self { inner, shutdown, stop_on_shutdown }
    }

    /// What is inside. What is done with it directly goes on in every state.
    pub fn as_unstoppable_ref(&self) -> &S {
        &self.inner
    }

    /// As [`as_unstoppable_ref`](Self::as_unstoppable_ref), to be changed.
    pub fn as_unstoppable_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// What is inside.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// Runs a future on what is inside, or gives `None` when it is over. The future begins after `ready`, rests while a
    /// new generation is on probation, and is dropped in the middle when it is over: what it does must bear that.
    pub async fn until_stopped<'a, O, F>(&'a self, f: impl FnOnce(&'a S) -> F) -> Option<O>
    where
        F: Future<Output = O>,
    {
        let mut gate = self.open().await?;
        until_stopped(&mut gate, f(&self.inner)).await
    }

    /// As [`until_stopped`](Self::until_stopped), with mutable access.
    pub async fn until_stopped_mut<'a, O, F>(&'a mut self, f: impl FnOnce(&'a mut S) -> F) -> Option<O>
    where
        F: Future<Output = O>,
    {
        let mut gate = self.open().await?;
        until_stopped(&mut gate, f(&mut self.inner)).await
    }

    async fn open(&self) -> Option<Gate> {
        let mut gate = Gate::new(self.shutdown.clone(), self.stop_on_shutdown);
        let opened = poll_fn(|cx| match gate.phase(cx) {
            Phase::Wait => Poll::Pending,
            Phase::End => Poll::Ready(false),
            Phase::Try | Phase::Last => Poll::Ready(true),
        });
        opened.await.then_some(gate)
    }
}

async fn until_stopped<O>(gate: &mut Gate, future: impl Future<Output = O>) -> Option<O> {
    let mut future = pin!(future);
    poll_fn(|cx| match gate.phase(cx) {
        Phase::Wait => Poll::Pending,
        Phase::End => Poll::Ready(None),
        Phase::Try => future.as_mut().poll(cx).map(Some),
        Phase::Last => {
            gate.count_last();
            match future.as_mut().poll(cx) {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending => Poll::Ready(None),
            }
        }
    })
    .await
}
