//! The states of the shutdown handle as futures.

use std::future::{poll_fn, Future};
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncBufRead;
use tokio::time;

use super::watch::TaskWatch;
use crate::shutdown::{Shutdown, State};

/// Methods for tasks. Create a future once for each wait. Any runtime may poll it.
///
/// To wait for the same future in several turns of a loop, create it once before the loop and pass `&mut` to `select!`.
/// That is several times cheaper than creating it in every turn.
impl Shutdown {
    /// Resolves when accepting is over: after the probation of a successful upgrade, or at a stop. Needs no runtime.
    pub fn over(&self) -> impl Future<Output = ()> + Send + Unpin + 'static {
        self.when(|state| state.is_over().then_some(()))
    }

    /// Resolves `grace` after accepting is over, or `grace` after the first poll if it is already over.
    ///
    /// For idle connections, so that a client that is about to send a request still gets its response.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime with timers (`enable_time`).
    pub fn over_after(&self, grace: Duration) -> impl Future<Output = ()> + Send + 'static {
        let (over, grace) = (self.over(), self.spread(grace));
        async move {
            over.await;
            time::sleep(grace).await;
        }
    }

    /// Resolves when this generation no longer accepts, because it is paused or over. Needs no runtime.
    ///
    /// For foreign accept loops, which cannot check this handle before each accept:
    ///
    /// ```
    /// # struct Acceptor;
    /// # impl Acceptor { async fn pause(&self) {} async fn resume(&self) {} async fn stop(&self) {} }
    /// async fn follow(shutdown: ecdysis::Shutdown, acceptor: Acceptor) {
    ///     while shutdown.accepting().await {
    ///         acceptor.resume().await;
    ///         shutdown.paused().await;
    ///         acceptor.pause().await;
    ///     }
    ///     acceptor.stop().await;
    /// }
    /// ```
    pub fn paused(&self) -> impl Future<Output = ()> + Send + Unpin + 'static {
        self.when(|state| (state == State::Paused || state.is_over()).then_some(()))
    }

    /// Resolves to true when this generation accepts, or to false when accepting is over. Needs no runtime.
    pub fn accepting(&self) -> impl Future<Output = bool> + Send + Unpin + 'static {
        self.when(|state| match state {
            State::Accepting | State::Leaving => Some(true),
            State::Starting | State::Paused => None,
            State::HandedOver | State::Stopped => Some(false),
        })
    }

    /// Waits between two requests on a connection, as [`next_request`](Self::next_request) does for threads: true when the
    /// next request has begun to arrive, false when it is time to close the connection. Cancel-safe.
    ///
    /// It is time to close when the peer has closed the connection, after `idle` without a request, and, once accepting
    /// is over, after `grace` without one. If [`is_over`](Self::is_over) returns true, announce the end in the
    /// response.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    ///
    /// async fn connection(stream: tokio::net::TcpStream, shutdown: ecdysis::Shutdown) -> std::io::Result<()> {
    ///     let mut requests = BufReader::new(stream);
    ///     while shutdown.next_request_async(&mut requests, Duration::from_secs(60), Duration::from_secs(1)).await? {
    ///         let mut line = String::new();
    ///         requests.read_line(&mut line).await?;
    ///         requests.write_all(line.as_bytes()).await?;
    ///     }
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of the connection.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime with timers (`enable_time`).
    pub async fn next_request_async(
        &self,
        requests: &mut (impl AsyncBufRead + Unpin),
        idle: Duration,
        grace: Duration,
    ) -> io::Result<bool> {
        let mut over = std::pin::pin!(self.over_after(grace));
        let mut idle = std::pin::pin!(time::sleep(idle));
        poll_fn(|cx| {
            // Check this first: a pending request is answered, whatever the time.
            if let Poll::Ready(received) = Pin::new(&mut *requests).poll_fill_buf(cx) {
                return Poll::Ready(received.map(|received| !received.is_empty()));
            }
            if over.as_mut().poll(cx).is_ready() || idle.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(false));
            }
            Poll::Pending
        })
        .await
    }

    fn when<T>(
        &self,
        reached: impl Fn(State) -> Option<T> + Send + Unpin + 'static,
    ) -> impl Future<Output = T> + Send + Unpin + 'static {
        let mut watch = TaskWatch::new(self.clone());
        poll_fn(move |cx| {
            // Register before the state is read, so that no change is missed.
            watch.register(cx);
            match reached(watch.shutdown.state()) {
                Some(output) => {
                    watch.end();
                    Poll::Ready(output)
                }
                None => Poll::Pending,
            }
        })
    }
}
