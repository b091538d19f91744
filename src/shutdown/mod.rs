//! The shutdown handle: whether this generation accepts, and how threads and tasks are notified when it no longer does.
//!
//! [`gate`] contains the state, [`accept`] the accept loop of a thread, [`drain`] the wait for the remaining
//! connections, and `watch` wakes tasks. `decide` decides what follows from an accept call, for threads and for Tokio.

mod accept;
mod calls;
mod decide;
mod drain;
mod gate;
mod keep_alive;
mod listener;
mod sync;
#[cfg(all(test, not(ecdysis_loom)))]
mod tests;
#[cfg(feature = "tokio_ecdysis")]
mod watch;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

pub use self::accept::Incoming;
#[cfg(feature = "tokio_ecdysis")]
pub(crate) use self::decide::{decide, Step, Tries};
use self::drain::Drain;
pub use self::drain::Guard;
#[cfg(feature = "tokio_ecdysis")]
pub(crate) use self::drain::LoopGuard;
pub(crate) use self::drain::{End, EndSignal};
use self::gate::Gate;
#[cfg(feature = "tokio_ecdysis")]
pub(crate) use self::gate::Phase;
pub(crate) use self::gate::State;
pub use self::keep_alive::Connection;
use self::keep_alive::IdleConnections;
pub use self::listener::{Accept, Datagram};
#[cfg(feature = "tokio_ecdysis")]
pub(crate) use self::watch::{Slot, Watchers};
use crate::sys::poll::{poll, Deadline};

/// Tells every thread whether this generation accepts, and when accepting is over.
///
/// Clones share the same state. A generation goes through four states:
///
/// | state | `accept`, `incoming`, `recv_from` |
/// |---|---|
/// | starting, before `ready` | wait |
/// | accepting | accept |
/// | paused, while a new generation is on probation | wait |
/// | over, after an upgrade or at a stop | end |
///
/// So threads may start before `ready`: they accept no connection that this generation might never serve.
///
/// The descriptor ([`AsFd`]) becomes readable when accepting is over, and stays readable. Add it to any poll, select or
/// epoll of your own, but do not read from it.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::io::Write;
/// use std::time::Duration;
/// let starting = ecdysis::Ecdysis::builder().start()?;
/// let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
/// let shutdown = starting.shutdown();
/// let accepting = std::thread::spawn({
///     let shutdown = shutdown.clone();
///     move || {
///         for stream in shutdown.incoming(&listener) {
///             let (mut stream, guard) = (stream?, shutdown.guard());
///             std::thread::spawn(move || {
///                 let _guard = guard;
///                 let _ = stream.write_all(b"hello\n");
///             });
///         }
///         std::io::Result::Ok(())
///     }
/// });
/// let server = starting.ready()?;
/// server.stop(); // or: server.run()?
/// let left = shutdown.drain(Duration::from_secs(10));
/// # assert_eq!(left, 0);
/// accepting.join().unwrap()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    gate: Arc<Gate>,
    drain: Arc<Drain>,
    idle: Arc<IdleConnections>,
    /// The window after the grace period in which idle connections close.
    spread: Duration,
    #[cfg(feature = "tokio_ecdysis")]
    watchers: Watchers,
}

impl Shutdown {
    pub(crate) fn new(spread: Duration) -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            gate: Arc::new(Gate::new()?),
            drain: Arc::new(Drain::new()?),
            idle: Arc::default(),
            spread,
            #[cfg(feature = "tokio_ecdysis")]
            watchers: Watchers::default(),
        })))
    }

    /// Blocks until there is a connection, and returns it, or `None` when accepting is over.
    ///
    /// Errors of a single connection, and a lack of descriptors or memory, are handled. Only an error of the listener
    /// itself is returned, and another accept would fail too. At a stop, the queued connections are returned before the
    /// `None`. After an upgrade they belong to the next generation.
    ///
    /// Call this in a loop. From the first call on, the calling thread counts as an accept loop of this listener, for
    /// which [`drain`](Self::drain) waits, until a call returns `None` or an error, or the thread ends or itself calls
    /// `drain`. To accept only one connection, take one from [`incoming`](Self::incoming) and drop the iterator.
    ///
    /// Several threads may accept from one listener. The stream is blocking and close-on-exec
    /// ([accept4(2)](https://man7.org/linux/man-pages/man2/accept4.2.html)).
    pub fn accept<L: Accept>(&self, listener: &L) -> Option<io::Result<L::Stream>> {
        calls::next(&self.0.gate, &self.0.drain, listener.as_fd(), || listener.try_accept())
    }

    /// Returns an iterator over the connections until accepting is over, which it accepts like
    /// [`accept`](Self::accept). It ends after an error.
    ///
    /// Each iterator waits with its own epoll, so a connection wakes one of the threads on a listener and not all of
    /// them. [`drain`](Self::drain) waits until every iterator has ended or was dropped, so it never misses a
    /// [`guard`](Self::guard) that is created in the body of the loop. An iterator that is kept but not polled makes
    /// `drain` wait for its full deadline, because connections in its queue at a stop would be reset.
    pub fn incoming<'a, L: Accept>(&self, listener: &'a L) -> Incoming<'a, L> {
        Incoming::new(listener, self.0.gate.clone(), self.0.drain.count_loop())
    }

    /// Blocks until there is a datagram, and returns its length and sender, or `None` when accepting is over. It is
    /// [`UdpSocket::recv_from`](std::net::UdpSocket::recv_from) with the states of this handle, and also works for
    /// [`UnixDatagram`](std::os::unix::net::UnixDatagram).
    ///
    /// The calling thread counts as an accept loop, as with [`accept`](Self::accept), so the last answer is sent before the
    /// process ends.
    pub fn recv_from<D: Datagram>(&self, socket: &D, buffer: &mut [u8]) -> Option<io::Result<(usize, D::Address)>> {
        calls::next(&self.0.gate, &self.0.drain, socket.as_fd(), || socket.try_recv_from(buffer))
    }

    /// Blocks until `fd` is readable or accepting is over, whichever comes first, for at most `timeout`
    /// ([poll(2)](https://man7.org/linux/man-pages/man2/poll.2.html)). A pause does not end this wait.
    ///
    /// Do not use this to wait between two requests: a connection that is closed on `Over` loses a request that is on
    /// its way. Use [`next_request`](Self::next_request) for that.
    ///
    /// # Errors
    ///
    /// That of poll(2). An interrupted wait continues.
    pub fn readable(&self, fd: impl AsFd, timeout: Option<Duration>) -> io::Result<Readable> {
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.0.gate.over, PollFlags::IN)];
        match poll(&mut fds, timeout.map_or(Deadline::NEVER, Deadline::after))? {
            0 => Ok(Readable::TimedOut),
            _ if !fds[0].revents().is_empty() => Ok(Readable::Ready),
            _ => Ok(Readable::Over),
        }
    }

    /// Blocks between two requests on a persistent connection. Returns true when the next request has begun to arrive;
    /// read and answer it. Returns false when it is time to close the connection.
    ///
    /// It is time to close when the peer has closed the connection, when no request has arrived for `idle`, and, once
    /// accepting is over, when none has arrived for `grace`, counted from the end of accepting or of the last answer.
    /// So a connection in use is never closed between two requests. If [`is_over`](Self::is_over) returns true when you
    /// answer, tell the client to send no more requests, for example with `Connection: close`, and close the connection
    /// after the answer. If the protocol cannot express that, the connection stays open until the client pauses for
    /// `grace`, or until the drain's deadline.
    ///
    /// On a blocking TCP connection this adds no system call. Leave it blocking. If you set a read timeout, choose one
    /// that fits the parts of one request; this method still waits for `idle`, even if that is longer. The times are
    /// accurate to one second. A request that has begun may take longer than any of them; only your own read timeout
    /// limits it.
    ///
    /// ```
    /// use std::io::{BufRead, BufReader, Write};
    /// use std::net::TcpStream;
    /// use std::time::Duration;
    ///
    /// fn connection(stream: TcpStream, shutdown: &ecdysis::Shutdown) -> std::io::Result<()> {
    ///     let mut requests = BufReader::new(stream);
    ///     while shutdown.next_request(&mut requests, Duration::from_secs(60), Duration::from_secs(1))? {
    ///         let mut line = String::new();
    ///         requests.read_line(&mut line)?;
    ///         requests.get_mut().write_all(line.as_bytes())?;
    ///     }
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of the connection.
    pub fn next_request<S: Connection>(
        &self,
        requests: &mut BufReader<S>,
        idle: Duration,
        grace: Duration,
    ) -> io::Result<bool> {
        keep_alive::next_request(&self.0.gate, &self.0.idle, requests, idle, self.spread(grace))
    }

    /// Blocks until accepting is over.
    pub fn wait(&self) {
        self.0.gate.wait_while(|state| !state.is_over());
    }

    /// Blocks while this generation does not accept yet or is paused. Returns true when it accepts, and false when
    /// accepting is over.
    pub fn wait_accepting(&self) -> bool {
        self.0.gate.wait_while(|state| matches!(state, State::Starting | State::Paused));
        !self.is_over()
    }

    /// Returns whether accepting is over.
    pub fn is_over(&self) -> bool {
        self.state().is_over()
    }

    /// Returns whether a readiness probe should succeed: this generation accepts, and no stop was requested. It returns
    /// false from a stop on, even while accepting continues for [`Builder::stop_delay`](crate::Builder::stop_delay).
    pub fn is_ready(&self) -> bool {
        self.state() == State::Accepting
    }

    /// Returns whether accepting is paused, while a new generation is on probation. When the new one has passed it,
    /// this returns false again, and [`is_over`](Self::is_over) returns true.
    pub fn is_paused(&self) -> bool {
        self.state() == State::Paused
    }

    /// Returns a descriptor that is readable while this generation does not accept: before `ready`, during a pause, and
    /// once accepting is over.
    ///
    /// For accept loops that do not use this handle: add the descriptor to their poll, and accept only while it is not
    /// readable. Do not read from it.
    pub fn gate(&self) -> BorrowedFd<'_> {
        self.0.gate.closed.as_fd()
    }

    /// Counts a connection until the guard is dropped. Call this before you pass the connection to another thread.
    pub fn guard(&self) -> Guard {
        Guard::new(&self.0.drain)
    }

    /// Returns the current number of guards.
    pub fn guarded(&self) -> usize {
        self.0.drain.connections()
    }

    /// Blocks until accepting is over, every accept loop has ended and every guard is dropped, for at most `deadline`.
    /// Returns the number of loops and guards that are left.
    ///
    /// Several threads may call this, before or after accepting is over. A loop counts from
    /// [`incoming`](Self::incoming), or from its first [`accept`](Self::accept), on. A spawned thread that has not
    /// reached that point counts only if it has a guard.
    ///
    /// Also returns when a later generation with [`Overlap::AtMost`](crate::Overlap::AtMost) asks this one to end.
    pub fn drain(&self, deadline: Duration) -> usize {
        calls::end(&self.0.drain);
        self.0.drain.wait(deadline, &self.0.gate)
    }

    /// Changes the state, unless accepting is over, which is final.
    pub(crate) fn set(&self, state: State) {
        if self.0.gate.set(state) {
            #[cfg(feature = "tokio_ecdysis")]
            self.0.watchers.wake();
        }
    }

    pub(crate) fn state(&self) -> State {
        self.0.gate.state()
    }

    /// Returns whether the accept queue belongs to the next generation.
    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn is_handed_over(&self) -> bool {
        self.state() == State::HandedOver
    }

    /// Returns `grace` plus a random part of the window, which differs at each call.
    pub(crate) fn spread(&self, grace: Duration) -> Duration {
        let window = self.0.spread;
        if window.is_zero() {
            return grace;
        }
        let random = RandomState::new().build_hasher().finish() as u32;
        // Less than the whole window: the longest one, as a float, is longer than a duration can be.
        grace.saturating_add(window.mul_f64(f64::from(random) / (f64::from(u32::MAX) + 1.0)))
    }

    /// Returns the gate, which decides when an accept loop may accept.
    pub(crate) fn accept_gate(&self) -> &Gate {
        &self.0.gate
    }

    /// Returns the remaining loops and guards, for which a drain waits.
    pub(crate) fn drains(&self) -> &Arc<Drain> {
        &self.0.drain
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn watchers(&self) -> &Watchers {
        &self.0.watchers
    }
}

/// Why [`Shutdown::readable`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The descriptor is readable, or its peer has closed.
    Ready,
    /// Accepting is over, and the descriptor is not readable.
    Over,
    /// The timeout has passed.
    TimedOut,
}

impl AsFd for Shutdown {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.gate.over.as_fd()
    }
}
