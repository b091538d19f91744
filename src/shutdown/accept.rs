//! The accept loop of a thread.

use std::io;
use std::iter::FusedIterator;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::decide::{decide_and_log, Step, Tries};
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
#[derive(Debug)]
pub(crate) struct AcceptLoop {
    readiness: Readiness,
    tries: Tries,
    /// The remaining number of accepts that wait first.
    wait_first: u32,
}

/// How a loop waits for its listener and the gate.
#[derive(Debug)]
enum Readiness {
    /// No way of waiting is chosen yet.
    Unused,
    /// EPOLLEXCLUSIVE: one connection wakes one thread. With poll it would wake all of them.
    Watch(Watch),
    Poll,
}

impl AcceptLoop {
    /// For many connections.
    pub(crate) fn new() -> Self {
        Self { readiness: Readiness::Unused, tries: Tries::default(), wait_first: 0 }
    }

    /// For a single connection, for which an epoll is not worth its cost.
    pub(crate) fn once() -> Self {
        Self { readiness: Readiness::Poll, ..Self::new() }
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
                Phase::Accept if !waited && self.waits_first() => {
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
            match decide_and_log(phase, gate.settled().has_passed(), &result, &mut self.tries) {
                Step::Return | Step::Fail => return Some(result),
                Step::End => return None,
                Step::Retry => {}
                Step::Wait => {
                    self.wait_first = WAIT_FIRST;
                    self.wait(fd, gate);
                    waited = true;
                }
                Step::Linger => drop(wait_readable(fd, gate.settled())),
                Step::Pause => drop(wait_readable(gate.over(), Deadline::after(SCARCE))),
            }
        }
    }

    fn waits_first(&mut self) -> bool {
        let waits = self.wait_first > 0;
        self.wait_first = self.wait_first.saturating_sub(1);
        waits
    }

    /// Wakes the other processes and threads that wait for the listener, if a connection is queued.
    ///
    /// A connection wakes one of the threads that wait exclusively, in any process. Suppose that it woke this thread,
    /// and that this process paused before the thread could accept. The connection would stay in the queue, and a
    /// thread of the other generation, which accepts, would sleep until the next connection arrived. shutdown(2) of the
    /// sending side has no other effect on a listener, but wakes all waiting threads.
    fn pass_on(&self, fd: BorrowedFd<'_>) {
        if matches!(self.readiness, Readiness::Watch(_)) && wait_readable(fd, Deadline::after(Duration::ZERO)) {
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Write);
        }
    }

    /// Returns when there may be something to accept. The next attempt reports errors.
    fn wait(&mut self, fd: BorrowedFd<'_>, gate: &Gate) {
        let closed = gate.closed();
        if gate.is_paused() {
            // The next generation does not have this listener, and the gate's flag is always raised now.
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::new(gate.over(), PollFlags::IN)];
            let _ = poll(&mut fds, Deadline::NEVER);
            return;
        }
        if let Readiness::Unused = self.readiness {
            // If no descriptor is free, poll does the same at a higher cost.
            self.readiness = Watch::new(fd, closed.as_fd()).map_or(Readiness::Poll, Readiness::Watch);
        }
        match &self.readiness {
            Readiness::Watch(watch) => watch.wait(),
            _ => {
                let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::new(closed, PollFlags::IN)];
                let _ = poll(&mut fds, Deadline::NEVER);
            }
        }
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
        Self { listener, gate, accept_loop: Some((AcceptLoop::new(), counted)) }
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
