//! Streams of connections and datagrams that obey the shutdown handle.

use std::fmt;
use std::future::{pending, poll_fn, Future};
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::pin::{pin, Pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{ready, Context, Poll};

use futures_core::Stream;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use super::gate::{StopOnShutdown, TaskGate};
use super::source::{Listener, Source};
use crate::shutdown::{LoopGuard, Shutdown};

/// The connections of a listener, or the datagrams of a UDP socket, as a [`Stream`] of `io::Result`s.
///
/// It is tokio-stream's `TcpListenerStream` or `UnixListenerStream`, or
/// [`UnixSeqpacketListenerStream`](super::UnixSeqpacketListenerStream) or [`UdpStream`](super::UdpStream), with an end.
///
/// It yields nothing before [`ready`](super::TokioEcdysisBuilder::ready), so it may be polled earlier: connections that
/// this generation may never serve are left to the parent. It yields nothing while a new generation is on probation.
/// After an upgrade it ends immediately, and the queue belongs to the next generation. At a stop it ends when the queue
/// is empty, unless [`StopOnShutdown::No`] was chosen. A stream that has ended stays ended, and has closed its listener
/// or socket: while any process keeps it open, connections are queued that no process accepts.
///
/// Errors of one connection and a lack of descriptors are handled. Only an error of the listener itself is yielded, and
/// then the stream ends.
///
/// Several tasks may [`accept`](Self::accept) from one stream, for example in an [`Arc`]. It has ended when `accept`
/// has returned `None` or an error to all waiting tasks.
///
/// [`Shutdown::drain`] waits until the stream has ended or is dropped, so it never misses a guard for a yielded
/// connection. A stream that is kept but not polled makes `drain` wait for its full deadline.
pub struct StoppableStream<S: Stream> {
    /// `None` once the stream has ended.
    open: Mutex<Option<Arc<Open<S>>>>,
    gate: TaskGate,
    /// [`item`] for this source, so that a program can be generic over any `S: Stream`.
    next: Next<S>,
}

type Next<S> = fn(&mut Option<Arc<Open<S>>>, &mut TaskGate, &mut Context<'_>) -> Poll<Option<<S as Stream>::Item>>;

/// The part that the end of a stream closes. Each waiting call of `accept` is an owner too.
#[derive(Debug)]
struct Open<S> {
    source: S,
    /// A drain waits until this ends, because a spawned task may not have run yet at a stop, and must accept queued
    /// connections first. It does not wait for streams that continue after a stop.
    _counted: Option<LoopGuard>,
}

impl<S: Stream> StoppableStream<S> {
    fn open(&self) -> MutexGuard<'_, Option<Arc<Open<S>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Source> StoppableStream<S> {
    pub(super) fn new(source: S, shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        let counted = (stop_on_shutdown == StopOnShutdown::Yes).then(|| shutdown.drains().count_loop());
        let open = Mutex::new(Some(Arc::new(Open { source, _counted: counted })));
        Self { open, gate: TaskGate::new(shutdown, stop_on_shutdown), next: item }
    }

    /// Returns the underlying Tokio listener or socket, unless the stream has ended. It accepts in every state. While this
    /// value lives, the end of the stream does not close the listener.
    pub fn get_ref(&self) -> Option<impl Deref<Target = S::Plain> + '_> {
        self.open().clone().map(Plain)
    }

    /// Returns the underlying Tokio listener or socket, unless the stream has ended. It ignores the states of the shutdown
    /// handle: accept from it only between `ready` and the end of [`over`](super::TokioEcdysis::over).
    pub fn into_inner(self) -> Option<S::Plain> {
        let open = self.open.into_inner().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::into_inner(open?)?.source.into_plain())
    }
}

struct Plain<S>(Arc<Open<S>>);

impl<S: Source> Deref for Plain<S> {
    type Target = S::Plain;

    fn deref(&self) -> &S::Plain {
        self.0.source.plain()
    }
}

fn item<S: Source>(
    slot: &mut Option<Arc<Open<S>>>,
    gate: &mut TaskGate,
    cx: &mut Context<'_>,
) -> Poll<Option<S::Item>> {
    let Some(open) = slot else { return Poll::Ready(None) };
    let source = &open.source;
    let next = ready!(gate.poll_next(cx, source.plain().as_fd(), |cx| source.poll(cx), || source.now()));
    if !matches!(next, Some(Ok(_))) {
        *slot = None;
    }
    Poll::Ready(next.map(S::item))
}

impl<S: Listener> StoppableStream<S> {
    /// Returns the next connection with its peer's address, or `None` when accepting is over. For the accept loops of
    /// frameworks, and for several tasks on one listener. Cancel-safe.
    ///
    /// ```
    /// use ecdysis::tokio_ecdysis::StoppableStream;
    /// use std::sync::Arc;
    /// use tokio_stream::wrappers::TcpListenerStream;
    ///
    /// fn serve(connections: StoppableStream<TcpListenerStream>) {
    ///     let connections = Arc::new(connections);
    ///     for _ in 0..2 {
    ///         let connections = connections.clone();
    ///         tokio::spawn(async move {
    ///             while let Some(Ok((stream, peer))) = connections.accept().await {
    ///                 // Serve it.
    ///                 drop((stream, peer));
    ///             }
    ///         });
    ///     }
    /// }
    /// ```
    pub async fn accept(&self) -> Option<io::Result<S::Accepted>> {
        let open = self.open().clone()?;
        let next = self.accept_from(&open.source).await;
        if !matches!(next, Some(Ok(_))) {
            // Tasks that still wait own the listener too. So it closes with the last of them, even if that one is dropped
            // before its end.
            let _closed = self.open().take();
        }
        next
    }

    async fn accept_from(&self, source: &S) -> Option<io::Result<S::Accepted>> {
        let mut gate = self.gate.another();
        // Use a separate future for each call, because Tokio's `poll_accept` wakes only the task that has called it
        // last.
        let mut attempt = pin!(None);
        let mut poll = |cx: &mut Context<'_>| {
            if attempt.is_none() {
                attempt.set(Some(source.accept()));
            }
            let result = attempt.as_mut().as_pin_mut().map_or(Poll::Pending, |attempt| attempt.poll(cx));
            if result.is_ready() {
                attempt.set(None);
            }
            result
        };
        poll_fn(|cx| gate.poll_next(cx, source.plain().as_fd(), &mut poll, || source.now())).await
    }

    /// Like [`accept`](Self::accept), but never resolves once the stream has ended, and logs its last error. For
    /// frameworks whose accept loop never ends. Cancel-safe.
    pub async fn accept_or_pend(&self) -> S::Accepted {
        match self.accept().await {
            Some(Ok(accepted)) => accepted,
            _ => pending().await,
        }
    }
}

impl StoppableStream<TcpListenerStream> {
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
        let Self { open, gate, next } = self.get_mut();
        next(open.get_mut().unwrap_or_else(PoisonError::into_inner), gate, cx)
    }
}

impl<S: Stream + fmt::Debug> fmt::Debug for StoppableStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoppableStream").field("open", &self.open).finish_non_exhaustive()
    }
}
