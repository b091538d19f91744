//! The shutdown handle: who may accept now, and how the end of that becomes known to every thread.

use std::io;
use std::iter::FusedIterator;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{epoll, eventfd, EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use crate::seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener};
use rustix::net::SocketFlags;

use crate::handover::lines::{FromChild, Lines, Read};
use crate::manager::Manager;
use crate::sys::poll::{poll, wait_readable, Deadline, SCARCE};

/// Tells every thread whether this generation accepts, and when that is over.
///
/// A clone is the same handle. It goes through four states:
///
/// | state | `accept`, `incoming`, `recv_from` |
/// |---|---|
/// | starting, before `ready` | wait |
/// | accepting | accept |
/// | paused, while a new generation is on probation | wait |
/// | over, after an upgrade or at a stop | end |
///
/// So threads may be started before `ready`: they take nothing that this generation may never serve.
///
/// The descriptor ([`AsFd`]) becomes readable when it is over, and stays so for ever: put it into any poll, select or
/// epoll of your own, but do not read it.
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
    state: AtomicU8,
    /// Held while the state changes; those who wait for another state wait with it.
    change: Mutex<()>,
    changed: Condvar,
    /// Readable while not accepting: gets accepting threads out of their wait.
    gate: OwnedFd,
    /// Readable once over.
    over: OwnedFd,
    /// How often something was taken out of a queue since the stop.
    emptied: AtomicUsize,
    guards: AtomicUsize,
    loops: AtomicUsize,
    draining: AtomicBool,
    /// Readable when a drain should look again.
    drained: OwnedFd,
    /// Set when a drain is to end although connections are left.
    end_drain: AtomicBool,
    /// The status pipe of the child that took over, on which any later generation may say so.
    successor: Mutex<Option<(Arc<OwnedFd>, Lines)>>,
    /// Who is told that a stop makes progress.
    manager: OnceLock<Arc<Manager>>,
    /// Tasks that hear of every change.
    #[cfg(feature = "tokio_ecdysis")]
    watchers: watch::Watchers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Starting,
    Accepting,
    Paused,
    /// Over; what waits in the accept queue belongs to the next generation.
    HandedOver,
    /// Over; what waits in the accept queue would be reset, so it is accepted first.
    Stopped,
}

impl State {
    const ALL: [Self; 5] = [Self::Starting, Self::Accepting, Self::Paused, Self::HandedOver, Self::Stopped];

    fn is_over(self) -> bool {
        matches!(self, Self::HandedOver | Self::Stopped)
    }
}

/// What accepting means in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Wait,
    Try,
    /// Take what is there, and end when there is nothing.
    Last,
    End,
}

/// At a stop, how many connections are accepted at most before the queue counts as empty: new ones may keep coming,
/// and no queue is usually longer than the system's default limit of 4096.
const EMPTYING: usize = 1 << 14;

/// At a stop, how long a handshake under way may take to get into the queue.
pub(crate) const HANDSHAKE: Duration = Duration::from_millis(20);

/// Why [`Shutdown::readable`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The descriptor is readable, or its peer has closed.
    Ready,
    /// Accepting is over, and the descriptor is not readable.
    Over,
    /// Neither within the time given.
    TimedOut,
}

impl Shutdown {
    pub(crate) fn new() -> io::Result<Self> {
        let event = |value| eventfd(value, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self(Arc::new(Inner {
            state: AtomicU8::new(State::Starting as u8),
            change: Mutex::new(()),
            changed: Condvar::new(),
            gate: event(1)?,
            over: event(0)?,
            emptied: AtomicUsize::new(0),
            guards: AtomicUsize::new(0),
            loops: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            drained: event(0)?,
            end_drain: AtomicBool::new(false),
            successor: Mutex::new(None),
            manager: OnceLock::new(),
            #[cfg(feature = "tokio_ecdysis")]
            watchers: watch::Watchers::default(),
        })))
    }

    /// The next connection, or `None` when accepting is over. Waits until there is one.
    ///
    /// Errors of a single connection, and a lack of descriptors or memory, are dealt with: only an error of the
    /// listener itself is returned, after which accepting again makes no sense. At a stop, connections that wait in
    /// the queue come before the `None`; after an upgrade they are the next generation's.
    ///
    /// Several threads may accept from one listener. The stream is blocking, close-on-exec (accept4(2)).
    pub fn accept<L: Accept>(&self, listener: &L) -> Option<io::Result<L::Stream>> {
        self.gated(&mut Waiter::poll(), listener.as_fd(), || listener.try_accept())
    }

    /// Every connection until accepting is over, as [`accept`](Self::accept) gives them. After an error it ends.
    ///
    /// Each iterator waits with an epoll of its own, so that of many threads on one listener one is woken for a
    /// connection and not all. [`drain`](Self::drain) waits until every iterator has ended or was dropped, so a
    /// [`guard`](Self::guard) taken in the loop's body is never missed. One that is kept and not used costs the drain its
    /// deadline: what waits in its queue at a stop would else be reset.
    pub fn incoming<'a, L: Accept>(&self, listener: &'a L) -> Incoming<'a, L> {
        self.begin_loop();
        Incoming { listener, shutdown: self.clone(), waiter: Waiter::new(), done: false }
    }

    /// The next datagram, or `None` when it is over: [`UdpSocket::recv_from`] with the states of this handle; also for
    /// [`UnixDatagram`].
    ///
    /// A [`drain`](Self::drain) does not know of this loop: hold a [`guard`](Self::guard) while the thread runs, so that the
    /// last answer is sent before the process ends.
    pub fn recv_from<D: Datagram>(&self, socket: &D, buffer: &mut [u8]) -> Option<io::Result<(usize, D::Address)>> {
        self.gated(&mut Waiter::poll(), socket.as_fd(), || socket.try_recv_from(buffer))
    }

    /// Waits until `fd` is readable or accepting is over, whichever comes first, at most `timeout` (poll(2)).
    ///
    /// For connections that are idle between two requests: `Over` means close it. A request that is there already
    /// wins, so answer it, and say `Connection: close` if [`is_over`](Self::is_over). A pause does not end this wait.
    ///
    /// # Errors
    ///
    /// What poll(2) says; an interrupted wait goes on.
    pub fn readable(&self, fd: impl AsFd, timeout: Option<Duration>) -> io::Result<Readable> {
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.0.over, PollFlags::IN)];
        match poll(&mut fds, timeout.map_or(Deadline::NEVER, Deadline::after))? {
            0 => Ok(Readable::TimedOut),
            _ if !fds[0].revents().is_empty() => Ok(Readable::Ready),
            _ => Ok(Readable::Over),
        }
    }

    /// Waits until accepting is over.
    pub fn wait(&self) {
        self.wait_while(|state| !state.is_over());
    }

    /// Whether accepting is over.
    pub fn is_over(&self) -> bool {
        self.state().is_over()
    }

    /// Counts a connection until it is dropped. Take it before the connection goes to another thread.
    pub fn guard(&self) -> Guard {
        self.0.guards.fetch_add(1, Ordering::SeqCst);
        Guard(self.clone())
    }

    /// How many guards there are now.
    pub fn guarded(&self) -> usize {
        self.0.guards.load(Ordering::SeqCst)
    }

    /// Waits until every accept loop has ended and every guard is dropped, at most `deadline`; returns how many are
    /// left. To be called when accepting is over: before, the loops do not end. A loop counts from
    /// [`incoming`](Self::incoming) on. A thread that was spawned and has not come so far counts only if it was given a
    /// guard.
    ///
    /// Also returns when a later generation, which was built with [`Overlap::AtMost`](crate::Overlap::AtMost), tells
    /// this one to end.
    pub fn drain(&self, deadline: Duration) -> usize {
        let inner = &*self.0;
        let deadline = Deadline::after(deadline);
        inner.draining.store(true, Ordering::SeqCst);
        let mut successor = inner.successor.lock().unwrap_or_else(PoisonError::into_inner);
        let mut least = None;
        loop {
            // The loops first: a guard that a loop's body has taken counts before that loop ends.
            let left = inner.loops.load(Ordering::SeqCst);
            let left = left + self.guarded();
            if left == 0 || deadline.has_passed() || inner.end_drain.load(Ordering::SeqCst) {
                return left;
            }
            if let Some(manager) = inner.manager.get().filter(|_| self.state() == State::Stopped) {
                if least.replace(left).is_some_and(|least| left < least) {
                    manager.progress(left);
                }
            }
            let mut fds = vec![PollFd::new(&inner.drained, PollFlags::IN)];
            fds.extend(successor.iter().map(|(pipe, _)| PollFd::new(pipe, PollFlags::IN)));
            let _ = poll(&mut fds, deadline);
            clear(&inner.drained);
            if let Some((pipe, lines)) = &mut *successor {
                match lines.next(pipe.as_fd()) {
                    Ok(Read::Line(line)) if FromChild::parse(&line) == Some(FromChild::EndDrain) => self.end_drain(),
                    Ok(Read::Line(_) | Read::Wait) => {}
                    // All later generations have ended, or talk nonsense.
                    _ => *successor = None,
                }
            }
        }
    }

    pub(crate) fn end_drain(&self) {
        self.0.end_drain.store(true, Ordering::SeqCst);
        self.look_again();
    }

    /// Keeps the status pipe of the child that took over.
    pub(crate) fn keep_successor(&self, status: Arc<OwnedFd>, lines: Lines) {
        *self.0.successor.lock().unwrap_or_else(PoisonError::into_inner) = Some((status, lines));
    }

    /// From now on this manager is told when a stop makes progress.
    pub(crate) fn report_to(&self, manager: Arc<Manager>) {
        let _ = self.0.manager.set(manager);
    }

    /// Changes the state. What is over stays over.
    pub(crate) fn set(&self, state: State) {
        let inner = &*self.0;
        let change = inner.change.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_over() {
            return;
        }
        inner.state.store(state as u8, Ordering::SeqCst);
        match state {
            State::Accepting => clear(&inner.gate),
            _ => raise(&inner.gate),
        }
        if state.is_over() {
            raise(&inner.over);
        }
        inner.changed.notify_all();
        drop(change);
        #[cfg(feature = "tokio_ecdysis")]
        inner.watchers.wake();
    }

    pub(crate) fn state(&self) -> State {
        State::ALL[self.0.state.load(Ordering::SeqCst) as usize]
    }

    /// What accepting through this handle means now.
    pub(crate) fn phase(&self) -> Phase {
        match self.state() {
            State::Accepting => Phase::Try,
            State::Starting | State::Paused => Phase::Wait,
            State::HandedOver => Phase::End,
            State::Stopped if self.0.emptied.load(Ordering::Relaxed) > EMPTYING => Phase::End,
            State::Stopped => Phase::Last,
        }
    }

    /// Whether what waits in the accept queue is the next generation's.
    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn is_handed_over(&self) -> bool {
        self.state() == State::HandedOver
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn wake_watchers(&self) {
        self.0.watchers.wake();
    }

    /// Counts an attempt in [`Phase::Last`], which ends after some many.
    pub(crate) fn count_last(&self) {
        self.0.emptied.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an accept loop, for which a drain waits.
    fn begin_loop(&self) {
        self.0.loops.fetch_add(1, Ordering::SeqCst);
    }

    fn end_loop(&self) {
        if self.0.loops.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.look_again();
        }
    }

    fn wait_while(&self, condition: impl Fn(State) -> bool) {
        let guard = self.0.change.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.changed.wait_while(guard, |()| condition(self.state())));
    }

    /// Tries `attempt` first, and waits only when there is nothing: a busy server makes one call a connection.
    fn gated<T>(
        &self,
        waiter: &mut Waiter,
        fd: BorrowedFd<'_>,
        mut attempt: impl FnMut() -> io::Result<T>,
    ) -> Option<io::Result<T>> {
        let (mut told, mut waited, mut lingered) = (false, false, false);
        loop {
            let phase = self.phase();
            match phase {
                Phase::Try if !waited && waiter.waits_first() => {
                    waiter.wait(fd, &self.0.gate);
                    waited = true;
                    continue;
                }
                Phase::Try => {}
                Phase::Last => self.count_last(),
                Phase::Wait => {
                    self.wait_while(|state| matches!(state, State::Starting | State::Paused));
                    continue;
                }
                Phase::End => return None,
            }
            let error = match attempt() {
                Ok(value) => return Some(Ok(value)),
                Err(error) => error,
            };
            match AcceptFailure::of(&error) {
                AcceptFailure::Empty if phase == Phase::Last && lingered => return None,
                AcceptFailure::Empty if phase == Phase::Last => {
                    // A client may think it is connected before its last packet has got it into the queue.
                    wait_readable(fd, Deadline::after(HANDSHAKE));
                    lingered = true;
                }
                AcceptFailure::Empty => {
                    waiter.wait_first = WAIT_FIRST;
                    waiter.wait(fd, &self.0.gate);
                    waited = true;
                }
                AcceptFailure::Passing => {}
                AcceptFailure::Exhausted => {
                    if !told {
                        log::warn!("cannot accept for want of resources, waiting: {error}");
                        told = true;
                    }
                    // The listener is readable all the time: to poll it would be to spin.
                    self.wait_over(SCARCE);
                }
                AcceptFailure::Fatal => return Some(Err(error)),
            }
        }
    }

    fn wait_over(&self, time: Duration) {
        wait_readable(&self.0.over, Deadline::after(time));
    }

    fn look_again(&self) {
        if self.0.draining.load(Ordering::SeqCst) {
            raise(&self.0.drained);
        }
    }
}

impl AsFd for Shutdown {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.over.as_fd()
    }
}

/// What a failed accept means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcceptFailure {
    /// There is nothing.
    Empty,
    /// One connection is lost; the next may be well.
    Passing,
    /// No descriptor or memory is left.
    Exhausted,
    /// The listener itself is broken.
    Fatal,
}

impl AcceptFailure {
    pub(crate) fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => Self::Empty,
            Some(e) if concerns_one_connection(e) => Self::Passing,
            // No space: of epoll watches, of which an asynchronous runtime needs one a connection.
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC) => Self::Exhausted,
            _ => Self::Fatal,
        }
    }
}

/// Errors that accept(2) passes on from the network: that connection is lost, the next may be well. The same for
/// recvfrom(2) and what an earlier answer met.
fn concerns_one_connection(e: Errno) -> bool {
    matches!(
        e,
        Errno::INTR
            | Errno::CONNABORTED
            | Errno::CONNREFUSED
            | Errno::CONNRESET
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::TIMEDOUT
    )
}

/// One connection being served; [`Shutdown::drain`] waits for it to be dropped.
#[derive(Debug)]
#[must_use = "a connection counts only while its guard lives"]
pub struct Guard(Shutdown);

impl Drop for Guard {
    fn drop(&mut self) {
        let inner = &*self.0 .0;
        if inner.guards.fetch_sub(1, Ordering::SeqCst) == 1 || inner.manager.get().is_some() {
            self.0.look_again();
        }
    }
}

/// The connections of a listener until accepting is over, see [`Shutdown::incoming`].
#[derive(Debug)]
pub struct Incoming<'a, L> {
    listener: &'a L,
    shutdown: Shutdown,
    waiter: Waiter,
    done: bool,
}

impl<L: Accept> Iterator for Incoming<'_, L> {
    type Item = io::Result<L::Stream>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let listener = self.listener;
        let next = self.shutdown.gated(&mut self.waiter, listener.as_fd(), || listener.try_accept());
        if !matches!(next, Some(Ok(_))) {
            self.end();
        }
        next
    }
}

impl<L: Accept> FusedIterator for Incoming<'_, L> {}

impl<L> Incoming<'_, L> {
    fn end(&mut self) {
        if !std::mem::replace(&mut self.done, true) {
            self.shutdown.end_loop();
        }
    }
}

impl<L> Drop for Incoming<'_, L> {
    fn drop(&mut self) {
        self.end();
    }
}

/// A listener that [`Shutdown::accept`] and [`Shutdown::incoming`] take. It must be nonblocking, as every listener
/// of [`Sockets`](crate::Sockets) is.
pub trait Accept: AsFd + sealed::Sealed {
    /// What it accepts.
    type Stream;

    /// Accepts one connection, without waiting.
    #[doc(hidden)]
    fn try_accept(&self) -> io::Result<Self::Stream>;
}

/// For tasks what the condition variable and the gate are for threads.
#[cfg(feature = "tokio_ecdysis")]
pub(crate) mod watch {
    use std::collections::HashMap;
    use std::sync::{Mutex, PoisonError};
    use std::task::{Context, Waker};

    use super::Shutdown;

    /// Every watching task, by the number of its watch.
    #[derive(Debug, Default)]
    pub(super) struct Watchers(Mutex<(u64, HashMap<u64, Waker>)>);

    impl Watchers {
        /// Not under a lock: a waker may run any code, and drop a watch in it.
        pub(super) fn wake(&self) {
            let wakers: Vec<_> = self.with(|(_, wakers)| wakers.values().cloned().collect());
            wakers.into_iter().for_each(Waker::wake);
        }

        fn with<T>(&self, change: impl FnOnce(&mut (u64, HashMap<u64, Waker>)) -> T) -> T {
            change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }
    }

    /// One task's watch over the state; it may count as an accept loop.
    #[derive(Debug)]
    pub(crate) struct Watch {
        pub(crate) shutdown: Shutdown,
        number: Option<u64>,
        /// What is registered: a task that polls again need not take the lock.
        waker: Option<Waker>,
        counted: bool,
    }

    impl Watch {
        pub(crate) fn new(shutdown: Shutdown) -> Self {
            Self { shutdown, number: None, waker: None, counted: false }
        }

        /// Has the task woken at every change from now on. Look at the state after this.
        pub(crate) fn register(&mut self, cx: &Context<'_>) {
            let waker = cx.waker();
            if self.waker.as_ref().is_some_and(|registered| registered.will_wake(waker)) {
                return;
            }
            let former = self.shutdown.0.watchers.with(|(last, wakers)| {
                let number = *self.number.get_or_insert_with(|| {
                    *last += 1;
                    *last
                });
                wakers.insert(number, waker.clone())
            });
            // Outside the lock, as above.
            drop(former);
            self.waker = Some(waker.clone());
        }

        /// Counts as an accept loop, for which a drain waits, until [`end`](Self::end).
        pub(crate) fn count(&mut self) {
            if !std::mem::replace(&mut self.counted, true) {
                self.shutdown.begin_loop();
            }
        }

        pub(crate) fn end(&mut self) {
            if std::mem::take(&mut self.counted) {
                self.shutdown.end_loop();
            }
            if let Some(number) = self.number.take() {
                let former = self.shutdown.0.watchers.with(|(_, wakers)| wakers.remove(&number));
                drop(former);
            }
            self.waker = None;
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            self.end();
        }
    }
}

/// A datagram socket that [`Shutdown::recv_from`] takes: [`UdpSocket`] or [`UnixDatagram`]. It must be nonblocking, as
/// every socket of [`Sockets`](crate::Sockets) is.
pub trait Datagram: AsFd + sealed::Sealed {
    /// Where a datagram came from.
    type Address;

    /// Receives one datagram, without waiting.
    #[doc(hidden)]
    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, Self::Address)>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for std::net::TcpListener {}
    impl Sealed for std::net::UdpSocket {}
    impl Sealed for std::os::unix::net::UnixDatagram {}
    impl Sealed for std::os::unix::net::UnixListener {}
    impl Sealed for crate::UnixSeqpacketListener {}
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    fn try_accept(&self) -> io::Result<TcpStream> {
        accept(self).map(TcpStream::from)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    fn try_accept(&self) -> io::Result<UnixStream> {
        accept(self).map(UnixStream::from)
    }
}

/// accept4(2) without the peer's address, which std's would ask for.
fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?)
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

/// How an accept loop waits for the listener or the gate.
#[derive(Debug)]
struct Waiter {
    on: On,
    /// How many times to wait without an attempt before.
    wait_first: u32,
}

#[derive(Debug)]
enum On {
    Nothing,
    /// EPOLLEXCLUSIVE: one connection wakes one thread. With poll it would wake all of them.
    Epoll(OwnedFd),
    Poll,
}

/// An attempt in vain makes the kernel make a socket and throw it away, which costs more than a wait that returns at
/// once. So after one in vain the next few connections are waited for.
const WAIT_FIRST: u32 = 8;

impl Waiter {
    /// For a loop.
    fn new() -> Self {
        Self { on: On::Nothing, wait_first: 0 }
    }

    /// For a single wait.
    fn poll() -> Self {
        Self { on: On::Poll, wait_first: 0 }
    }

    fn waits_first(&mut self) -> bool {
        let waits = self.wait_first > 0;
        self.wait_first = self.wait_first.saturating_sub(1);
        waits
    }

    /// Returns when there may be something; errors show themselves at the next attempt.
    fn wait(&mut self, fd: BorrowedFd<'_>, gate: &OwnedFd) {
        if let On::Nothing = self.on {
            // Without a descriptor to spare, poll does the same at more cost.
            self.on = Self::epoll(fd, gate).map_or(On::Poll, On::Epoll);
        }
        match &self.on {
            On::Epoll(epoll) => {
                let mut events =
                    [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
                let _ = epoll::wait(epoll, &mut events, None);
            }
            _ => {
                let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::new(gate, PollFlags::IN)];
                let _ = poll(&mut fds, Deadline::NEVER);
            }
        }
    }

    fn epoll(fd: BorrowedFd<'_>, gate: &OwnedFd) -> io::Result<OwnedFd> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, fd, data, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
        epoll::add(&epoll, gate, data, epoll::EventFlags::IN)?;
        Ok(epoll)
    }
}

fn raise(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn clear(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}
