//! The accept loop of a thread.

use std::io;
use std::iter::FusedIterator;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::decide::{decide, Step, Tries};
use super::drain::LoopGuard;
use super::gate::{Gate, Phase, State};
use super::listener::Accept;
use crate::sys::poll::{poll, wait_readable, Deadline, SCARCE};
use crate::sys::watch::Watch;

/// After an attempt on an empty queue, the number of connections for which a loop waits before it accepts. An attempt
/// on an empty queue makes the kernel create and discard a socket, which costs more than a wait that returns
/// immediately.
const WAIT_FIRST: u32 = 8;

/// The state of one loop.
#[derive(Debug, Default)]
pub(crate) struct AcceptLoop {
    /// How to wait for the listener and the gate, set by the first wait. With EPOLLEXCLUSIVE, one connection wakes one
    /// thread. `None` is poll(2), with which it would wake all of them.
    watch: OnceLock<Option<Watch>>,
    tries: Tries,
    /// The remaining number of accepts that wait first.
    wait_first: u32,
}

impl AcceptLoop {
    /// For a single connection, for which an epoll is not worth its cost.
    pub(crate) fn once() -> Self {
        Self { watch: None.into(), ..Self::default() }
    }

    /// Calls `attempt`, which must not block, until it returns a connection or datagram of `fd`. Returns `None` when
    /// accepting is over, and an error only if `fd` can no longer be used.
    ///
    /// It attempts first and waits later, so a busy server makes one system call per connection.
    pub(crate) fn next<T>(
        &mut self,
        gate: &Gate,
        fd: BorrowedFd<'_>,
        mut attempt: impl FnMut() -> io::Result<T>,
    ) -> Option<io::Result<T>> {
        let mut waited = false;
        loop {
            let phase = gate.phase(Some(fd));
            match phase {
                Phase::Accept if !waited && self.wait_first > 0 => {
                    self.wait_first = self.wait_first.saturating_sub(1);
                    self.wait(fd, gate);
                    waited = true;
                    continue;
                }
                Phase::Accept => {}
                Phase::AcceptQueued => gate.count_queued(),
                Phase::Wait | Phase::End if std::mem::take(&mut waited) => {
                    self.pass_on(fd);
                    continue;
                }
                Phase::Wait => {
                    gate.wait_while(|state| matches!(state, State::Starting | State::Paused));
                    continue;
                }
                Phase::End => return None,
            }
            let result = attempt();
            match decide(phase, gate.settled().has_passed(), &result, &mut self.tries) {
                Step::Return | Step::Fail => return Some(result),
                Step::End => return None,
                Step::Retry => {}
                Step::Wait => {
                    self.wait_first = WAIT_FIRST;
                    self.wait(fd, gate);
                    waited = true;
                }
                Step::Linger => drop(wait_readable(fd, gate.settled())),
                Step::Pause => drop(wait_readable(&gate.over, Deadline::after(SCARCE))),
            }
        }
    }

    /// Wakes the other processes and threads that wait for the listener, if a connection is queued.
    ///
    /// A connection wakes one of the threads that wait exclusively, in any process. Suppose that it woke this thread,
    /// and that this process paused before the thread could accept. The connection would stay in the queue, and a
    /// thread of the other generation, which accepts, would sleep until the next connection arrived. shutdown(2) of the
    /// sending side has no other effect on a listener, but wakes all waiting threads.
    fn pass_on(&self, fd: BorrowedFd<'_>) {
        if matches!(self.watch.get(), Some(Some(_))) && wait_readable(fd, Deadline::after(Duration::ZERO)) {
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Write);
        }
    }

    /// Returns when there may be something to accept. The next attempt reports errors.
    fn wait(&self, fd: BorrowedFd<'_>, gate: &Gate) {
        let is_paused = gate.state() == State::Paused;
        // If no descriptor is free, poll does the same at a higher cost.
        let watch = || self.watch.get_or_init(|| Watch::new(fd, gate.closed.as_fd()).ok()).as_ref();
        if let Some(watch) = (!is_paused).then(watch).flatten() {
            return watch.wait();
        }
        // During a pause this waits only for a listener that the next generation does not have. `closed` stays raised.
        let flag = if is_paused { &gate.over } else { &gate.closed };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::new(flag, PollFlags::IN)];
        let _ = poll(&mut fds, Deadline::NEVER);
    }
}

/// The connections of a listener until accepting is over, see [`Shutdown::incoming`](crate::Shutdown::incoming).
#[derive(Debug)]
pub struct Incoming<'a, L> {
    listener: &'a L,
    gate: Arc<Gate>,
    /// `None` after the end.
    accept_loop: Option<(AcceptLoop, LoopGuard)>,
}

impl<'a, L> Incoming<'a, L> {
    pub(super) fn new(listener: &'a L, gate: Arc<Gate>, counted: LoopGuard) -> Self {
        Self { listener, gate, accept_loop: Some((AcceptLoop::default(), counted)) }
    }
}

impl<L: Accept> Iterator for Incoming<'_, L> {
    type Item = io::Result<L::Stream>;

    fn next(&mut self) -> Option<Self::Item> {
        let (accept_loop, _) = self.accept_loop.as_mut()?;
        let listener = self.listener;
        let next = accept_loop.next(&self.gate, listener.as_fd(), || listener.try_accept());
        if !matches!(next, Some(Ok(_))) {
            self.accept_loop = None;
        }
        next
    }
}

impl<L: Accept> FusedIterator for Incoming<'_, L> {}
