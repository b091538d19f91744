//! Waiting until every accept loop has ended and every connection is done.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::gate::{Gate, State};
use crate::sys::flag::Flag;
use crate::sys::poll::{poll, Deadline};

/// A later generation, which may ask this one to end its drain.
pub(crate) trait EndSignal: fmt::Debug + Send + Sync {
    /// Readable when there is something to [`read`](Self::read).
    fn fd(&self) -> BorrowedFd<'_>;

    /// Reads what has arrived, without blocking.
    fn read(&self) -> End;
}

/// What an [`EndSignal`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Nothing yet.
    Continue,
    Now,
    /// Nothing ever: every later generation has ended.
    Gone,
}

type Progress = Box<dyn Fn(usize) + Send + Sync>;

/// The accept loops and connections that are left.
pub(crate) struct Drain {
    loops: AtomicUsize,
    guards: AtomicUsize,
    /// Set by the first drain: before, nobody waits for `look`.
    draining: AtomicBool,
    /// Raised when the drains must look again.
    look: Flag,
    /// Set when the drains must return even if connections are left.
    ended: AtomicBool,
    signal: Mutex<Option<Arc<dyn EndSignal>>>,
    progress: OnceLock<Progress>,
}

impl Drain {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            loops: AtomicUsize::new(0),
            guards: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            look: Flag::new(false)?,
            ended: AtomicBool::new(false),
            signal: Mutex::new(None),
            progress: OnceLock::new(),
        })
    }

    /// Counts an accept loop until the guard is dropped.
    pub(crate) fn count_loop(self: &Arc<Self>) -> LoopGuard {
        self.loops.fetch_add(1, Ordering::SeqCst);
        LoopGuard(self.clone())
    }

    pub(crate) fn begin_connection(&self) {
        self.guards.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn end_connection(&self) {
        if self.guards.fetch_sub(1, Ordering::SeqCst) == 1 || self.progress.get().is_some() {
            self.look_again();
        }
    }

    pub(crate) fn connections(&self) -> usize {
        self.guards.load(Ordering::SeqCst)
    }

    /// Ends every drain, also those that begin later.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.look_again();
    }

    /// Lets `signal` end the drains, also one that has begun.
    pub(crate) fn set_end_signal(&self, signal: Arc<dyn EndSignal>) {
        *self.signal.lock().unwrap_or_else(PoisonError::into_inner) = Some(signal);
        self.look_again();
    }

    /// Calls `progress` with the number that is left whenever a drain of a stopped generation sees it fall. Only the first
    /// such function counts.
    pub(crate) fn on_progress(&self, progress: Progress) {
        let _ = self.progress.set(progress);
    }

    /// Blocks until accepting is over and nothing is left, the drain is ended, or `time` has passed. Returns what is left.
    ///
    /// Several threads may drain at once, each with its own `time`, and long before accepting is over. So no lock is held
    /// over the wait: one who needs it would wait with them.
    pub(crate) fn wait(&self, time: Duration, gate: &Gate) -> usize {
        let deadline = Deadline::after(time);
        self.draining.store(true, Ordering::SeqCst);
        let mut least = None;
        loop {
            // The loops first: a guard that is taken in a loop's body counts before that loop ends.
            let left = self.loops.load(Ordering::SeqCst);
            let left = left + self.connections();
            let state = gate.state();
            if (left == 0 && state.is_over()) || deadline.has_passed() || self.ended.load(Ordering::SeqCst) {
                // This thread may have lowered the flag before another one saw it raised.
                self.look.raise();
                return left;
            }
            if let Some(progress) = self.progress.get().filter(|_| state == State::Stopped) {
                if least.replace(left).is_some_and(|least| left < least) {
                    progress(left);
                }
            }
            let signal = self.signal();
            let mut fds = vec![PollFd::new(&self.look, PollFlags::IN)];
            fds.extend((!state.is_over()).then(|| PollFd::new(gate.over(), PollFlags::IN)));
            fds.extend(signal.iter().map(|signal| PollFd::from_borrowed_fd(signal.fd(), PollFlags::IN)));
            let _ = poll(&mut fds, deadline);
            self.look.lower();
            if let Some(signal) = signal {
                match signal.read() {
                    End::Continue => {}
                    End::Now => self.end(),
                    End::Gone => self.forget(&signal),
                }
            }
        }
    }

    fn signal(&self) -> Option<Arc<dyn EndSignal>> {
        self.signal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self, closed: &Arc<dyn EndSignal>) {
        let mut signal = self.signal.lock().unwrap_or_else(PoisonError::into_inner);
        signal.take_if(|signal| Arc::ptr_eq(signal, closed));
    }

    fn look_again(&self) {
        if self.draining.load(Ordering::SeqCst) {
            self.look.raise();
        }
    }
}

impl fmt::Debug for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loops = self.loops.load(Ordering::Relaxed);
        f.debug_struct("Drain").field("loops", &loops).field("guards", &self.connections()).finish_non_exhaustive()
    }
}

/// One accept loop.
#[derive(Debug)]
pub(crate) struct LoopGuard(Arc<Drain>);

impl LoopGuard {
    pub(crate) fn is_of(&self, drain: &Arc<Drain>) -> bool {
        Arc::ptr_eq(&self.0, drain)
    }
}

impl Drop for LoopGuard {
    fn drop(&mut self) {
        if self.0.loops.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.look_again();
        }
    }
}
