//! The drain: waits until every accept loop has ended and every connection is done.

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::gate::{Gate, State};
use super::sync::{AtomicBool, AtomicUsize, Flag, Mutex, MutexGuard};
use crate::handover::ancestors::Ancestors;
use crate::handover::entry::Entry;
use crate::sys::poll::{poll, Deadline};

/// How often a stop that waits for older generations reports progress, because it cannot see theirs.
const OLDER: Duration = Duration::from_secs(1);

/// A source of requests to end the drain, such as a later generation.
pub(crate) trait EndSignal: fmt::Debug + Send + Sync {
    /// Readable when there is something to [`read`](Self::read).
    fn fd(&self) -> BorrowedFd<'_>;

    /// Reads what has arrived, without blocking.
    fn read(&self) -> End;
}

/// The request of an [`EndSignal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// No request yet.
    Continue,
    Within(Duration),
    /// There will be no request, because every later generation has ended.
    Gone,
}

type Progress = Box<dyn Fn(usize) + Send + Sync>;

/// The remaining accept loops and connections.
pub(crate) struct Drain {
    loops: AtomicUsize,
    guards: AtomicUsize,
    /// Set by the first drain. Before that, no thread waits for `look`.
    draining: AtomicBool,
    /// Raised when the drains must check again.
    look: Flag,
    /// The time at which the drains must return even if connections are left.
    end: Mutex<Deadline>,
    /// The older generations, which must end with this one. Set by a stop of the service.
    older: OnceLock<Arc<Ancestors>>,
    /// What may end the drains. Only the first is read, until it is [`End::Gone`].
    signals: Mutex<Vec<Arc<dyn EndSignal>>>,
    progress: OnceLock<Progress>,
}

impl Drain {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            loops: AtomicUsize::new(0),
            guards: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            look: Flag::new(false)?,
            end: Mutex::new(Deadline::NEVER),
            older: OnceLock::new(),
            signals: Mutex::new(Vec::new()),
            progress: OnceLock::new(),
        })
    }

    /// Counts an accept loop until the guard is dropped.
    pub(crate) fn count_loop(self: &Arc<Self>) -> LoopGuard {
        self.loops.fetch_add(1, Ordering::SeqCst);
        LoopGuard(self.clone())
    }

    pub(crate) fn connections(&self) -> usize {
        self.guards.load(Ordering::SeqCst)
    }

    /// Ends every drain within this time, including later ones.
    pub(crate) fn end(&self, within: Duration) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        *end = end.min(Deadline::after(within));
        drop(end);
        self.look_again();
    }

    /// Makes the drains end those of the older generations too, within the same time, and wait for them. When this
    /// process has ended, a service manager considers the service stopped, and would kill the older generations.
    pub(crate) fn end_older(&self, older: Arc<Ancestors>) {
        let _ = self.older.set(older);
    }

    /// Lets `signal` end the drains, including one that has already begun, once the earlier signals are gone.
    pub(crate) fn add_end_signal(&self, signal: Arc<dyn EndSignal>) {
        self.signals().push(signal);
        self.look_again();
    }

    /// Calls `progress` with the remaining number whenever it falls during the drain of a stopped generation. Only the
    /// first such function is used.
    pub(crate) fn on_progress(&self, progress: Progress) {
        let _ = self.progress.set(progress);
    }

    /// Blocks until accepting is over and nothing is left, the drain is ended, or `time` has passed. Returns the
    /// remaining number.
    ///
    /// Several threads may drain at the same time, each with its own `time`, and long before accepting is over. So no
    /// lock is held during the wait. Otherwise a thread that needs the lock would wait too.
    pub(crate) fn wait(&self, time: Duration, gate: &Gate) -> usize {
        let whole = Deadline::after(time);
        self.draining.store(true, Ordering::SeqCst);
        let (mut least, mut older_ended) = (None, false);
        loop {
            let deadline = whole.min(*self.end.lock().unwrap_or_else(PoisonError::into_inner));
            // Read the loops first, because a guard that is created in a loop's body counts before that loop ends. Each
            // is read by a read-modify-write, so that a thread that counts down later sees that a drain waits.
            let left = self.loops.fetch_add(0, Ordering::SeqCst);
            let left = left + self.guards.fetch_add(0, Ordering::SeqCst);
            let state = gate.state();
            let older = self.older.get().filter(|_| state == State::Stopped);
            let older: Vec<_> = older.iter().flat_map(|older| older.draining()).collect();
            if !mem::replace(&mut older_ended, state == State::Stopped) {
                older.iter().for_each(|link| link.end_drain(deadline.time_left()));
            }
            if (left == 0 && older.is_empty() && state.is_over()) || deadline.has_passed() {
                // They have the same deadline, unless this drain was ended earlier.
                older.iter().for_each(|link| link.end_drain(Duration::ZERO));
                // This thread may have lowered the flag before another one saw it raised.
                self.look.raise();
                return left;
            }
            if let Some(progress) = self.progress.get().filter(|_| state.is_over()) {
                if least.replace(left).is_some_and(|least| left < least) || !older.is_empty() {
                    progress(left);
                }
            }
            let signal = self.signals().first().cloned();
            let again = if older.is_empty() { Deadline::NEVER } else { Deadline::after(OLDER) };
            self.sleep(gate, signal.as_deref(), &older, deadline.min(again));
            self.look.lower();
            if let Some(signal) = signal {
                match signal.read() {
                    End::Continue => {}
                    End::Within(time) => self.end(time),
                    End::Gone => self.signals().retain(|known| !Arc::ptr_eq(known, &signal)),
                }
            }
        }
    }

    #[cfg(not(all(test, ecdysis_loom)))]
    fn sleep(&self, gate: &Gate, signal: Option<&dyn EndSignal>, older: &[&Entry], deadline: Deadline) {
        let mut fds = vec![PollFd::new(&self.look, PollFlags::IN)];
        fds.extend((!gate.state().is_over()).then(|| PollFd::new(&gate.over, PollFlags::IN)));
        fds.extend(signal.map(|signal| PollFd::from_borrowed_fd(signal.fd(), PollFlags::IN)));
        fds.extend(older.iter().map(|link| PollFd::new(&link.fd, PollFlags::empty())));
        let _ = poll(&mut fds, deadline);
    }

    #[cfg(all(test, ecdysis_loom))]
    fn sleep(&self, _: &Gate, _: Option<&dyn EndSignal>, _: &[&Entry], _: Deadline) {
        self.look.wait();
    }

    fn signals(&self) -> MutexGuard<'_, Vec<Arc<dyn EndSignal>>> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Counts one accept loop until it is dropped.
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

/// Counts one connection that is being served: [`Shutdown::drain`](crate::Shutdown::drain) waits until this is dropped.
#[derive(Debug)]
#[must_use = "a connection counts only while its guard lives"]
pub struct Guard(Arc<Drain>);

impl Guard {
    pub(super) fn new(drain: &Arc<Drain>) -> Self {
        drain.guards.fetch_add(1, Ordering::SeqCst);
        Self(drain.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.guards.fetch_sub(1, Ordering::SeqCst) == 1 || self.0.progress.get().is_some() {
            self.0.look_again();
        }
    }
}
