//! Whether this generation accepts, and how threads wait until that changes.

use std::collections::HashSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::sync::{AtomicU8, AtomicUsize, Condvar, Flag, Mutex};
use crate::sys::adopt::identity;
use crate::sys::poll::Deadline;

/// The states of a generation, in the order in which it enters them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Starting,
    Accepting,
    /// Accepting for the delay of a stop that was requested.
    Leaving,
    Paused,
    /// Over. Connections in the accept queue belong to the next generation.
    HandedOver,
    /// Over. Connections in the accept queue would be reset, so they are accepted first.
    Stopped,
}

impl State {
    const ALL: [Self; 6] =
        [Self::Starting, Self::Accepting, Self::Leaving, Self::Paused, Self::HandedOver, Self::Stopped];

    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::HandedOver | Self::Stopped)
    }
}

/// The behavior of an accept loop in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Wait for the next state.
    Wait,
    Accept,
    /// Accept the queued connections, and end when the queue is empty.
    AcceptQueued,
    End,
}

/// At a stop, the number of accept calls after which the queue counts as empty, because new connections may keep
/// arriving. A queue is rarely longer than the system's default limit of 4096.
const MAX_QUEUED: usize = 1 << 14;

/// How long a handshake that is in progress at a stop may need to reach the accept queue.
const HANDSHAKE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(crate) struct Gate {
    pub(super) state: AtomicU8,
    /// Locked while the state changes.
    change: Mutex<()>,
    changed: Condvar,
    /// Raised unless accepting: wakes the threads that wait for a connection.
    pub(super) closed: Flag,
    /// Raised once over, and never lowered.
    pub(super) over: Flag,
    over_since: OnceLock<Instant>,
    /// The number of accept calls since the stop.
    queued: AtomicUsize,
    /// The listeners that the next generation does not have, by identity. This generation serves them until it is over.
    orphans: RwLock<HashSet<u64>>,
}

impl Gate {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            state: AtomicU8::new(State::Starting as u8),
            change: Mutex::new(()),
            changed: Condvar::new(),
            closed: Flag::new(true)?,
            over: Flag::new(false)?,
            over_since: OnceLock::new(),
            queued: AtomicUsize::new(0),
            orphans: RwLock::default(),
        })
    }

    pub(crate) fn state(&self) -> State {
        State::ALL[self.state.load(Ordering::SeqCst) as usize]
    }

    /// Changes the state, unless this generation is over, which is final. Returns whether the state has changed.
    pub(crate) fn set(&self, state: State) -> bool {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().is_over() {
            return false;
        }
        if state.is_over() {
            let _ = self.over_since.set(Instant::now());
        }
        self.state.store(state as u8, Ordering::SeqCst);
        match state {
            State::Accepting | State::Leaving => self.closed.lower(),
            _ => self.closed.raise(),
        }
        if state.is_over() {
            self.over.raise();
        }
        self.changed.notify_all();
        true
    }

    /// Returns what a loop on this listener does now. The listener matters only if the next generation does not have
    /// it.
    pub(crate) fn phase(&self, listener: Option<BorrowedFd<'_>>) -> Phase {
        let is_orphan = || listener.is_some_and(|listener| self.is_orphan(listener));
        match self.state() {
            State::Accepting | State::Leaving => Phase::Accept,
            State::Paused if is_orphan() => Phase::Accept,
            State::Starting | State::Paused => Phase::Wait,
            State::HandedOver if !is_orphan() => Phase::End,
            State::HandedOver | State::Stopped if self.queued.load(Ordering::Relaxed) > MAX_QUEUED => Phase::End,
            State::HandedOver | State::Stopped => Phase::AcceptQueued,
        }
    }

    /// Sets which listeners the next generation does not have. Set this before the pause.
    pub(crate) fn set_orphans(&self, orphans: HashSet<u64>) {
        *self.orphans.write().unwrap_or_else(PoisonError::into_inner) = orphans;
    }

    fn is_orphan(&self, listener: BorrowedFd<'_>) -> bool {
        let orphans = self.orphans.read().unwrap_or_else(PoisonError::into_inner);
        !orphans.is_empty() && identity(listener).is_ok_and(|identity| orphans.contains(&identity))
    }

    /// Counts an accept call in [`Phase::AcceptQueued`], which ends after [`MAX_QUEUED`] of them.
    pub(crate) fn count_queued(&self) {
        self.queued.fetch_add(1, Ordering::Relaxed);
    }

    /// Blocks while the state satisfies `condition`.
    pub(crate) fn wait_while(&self, condition: impl Fn(State) -> bool) {
        let mut change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        while condition(self.state()) {
            change = self.changed.wait(change).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the time at which all handshakes that were in progress at the end of accepting have reached the queue.
    pub(crate) fn settled(&self) -> Deadline {
        self.over_since().map_or(Deadline::NEVER, |over| Deadline::since(over, HANDSHAKE))
    }

    /// Returns when accepting ended.
    pub(crate) fn over_since(&self) -> Option<Instant> {
        self.over_since.get().copied()
    }
}
