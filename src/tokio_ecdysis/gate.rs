//! When a task may accept: the states of the shutdown handle for tasks.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use super::watch::TaskWatch;
use crate::shutdown::{decide, Phase, Shutdown, Step, Tries};
use crate::sys::poll::SCARCE;

/// Whether a stream ends at a stop. Every stream ends at an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopOnShutdown {
    /// It ends at a stop, full or partial.
    Yes,
    /// It continues after a stop until it is dropped, and the file of a Unix socket is kept. Like every stream, it yields
    /// nothing before `ready` and while a new generation is on probation.
    No,
}

/// The registration of one task at the gate.
#[derive(Debug)]
pub(super) struct TaskGate {
    watch: TaskWatch,
    stop_on_shutdown: StopOnShutdown,
    /// Set by a pause, and true once the pause is over.
    again: Option<Arc<AtomicBool>>,
    tries: Tries,
}

impl TaskGate {
    pub(super) fn new(shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        Self { watch: TaskWatch::new(shutdown), stop_on_shutdown, again: None, tries: Tries::default() }
    }

    /// Returns the registration of another task at the same gate.
    pub(super) fn another(&self) -> Self {
        Self::new(self.watch.shutdown.clone(), self.stop_on_shutdown)
    }

    /// Counts an attempt in [`Phase::AcceptQueued`].
    pub(super) fn count_queued(&self) {
        self.watch.shutdown.accept_gate().count_queued();
    }

    /// Returns what the task may do now. The task is woken when that changes.
    pub(super) fn watch(&mut self, cx: &Context<'_>) -> Phase {
        // Before the state is read, so that no change is missed.
        self.watch.register(cx);
        self.phase(None)
    }

    /// A listener that the next generation does not have is served until this generation is over.
    fn phase(&self, listener: Option<BorrowedFd<'_>>) -> Phase {
        let shutdown = &self.watch.shutdown;
        match shutdown.accept_gate().phase(listener) {
            Phase::AcceptQueued | Phase::End
                if self.stop_on_shutdown == StopOnShutdown::No && !shutdown.is_handed_over() =>
            {
                Phase::Accept
            }
            phase => phase,
        }
    }

    /// Returns the next connection or datagram of `fd`, or `None` when accepting is over, like [`Shutdown::accept`].
    ///
    /// `poll` asks the runtime. `now` asks the kernel: at a stop, the runtime's "nothing yet" may only mean that it has
    /// not checked, or that the task has used up its budget, and queued connections would be reset.
    pub(super) fn poll_next<T>(
        &mut self,
        cx: &mut Context<'_>,
        fd: BorrowedFd<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
        now: impl Fn() -> io::Result<T>,
    ) -> Poll<Option<io::Result<T>>> {
        let mut watched = false;
        loop {
            let phase = self.phase(Some(fd));
            let pauses = self.again.as_ref().is_some_and(|again| !again.load(Ordering::SeqCst));
            let result = match phase {
                Phase::End => {
                    self.watch.end();
                    return Poll::Ready(None);
                }
                Phase::Wait => Poll::Pending,
                _ if pauses => Poll::Pending,
                Phase::AcceptQueued => {
                    self.count_queued();
                    Poll::Ready(now())
                }
                Phase::Accept => poll(cx),
            };
            let Poll::Ready(result) = result else {
                if std::mem::replace(&mut watched, true) {
                    return Poll::Pending;
                }
                // Register before the state is read once more, so that no change is missed.
                self.watch.register(cx);
                continue;
            };
            self.again = None;
            let settled = self.watch.shutdown.accept_gate().settled();
            let step = decide(phase, settled.has_passed(), &result, &mut self.tries);
            match step {
                Step::Return => return Poll::Ready(Some(result)),
                Step::Retry => {}
                Step::Linger => self.pause(cx, settled.time_left()),
                // Only `now` found nothing. `poll` would be pending, so there is no wait here.
                Step::Wait | Step::Pause => self.pause(cx, SCARCE),
                Step::End | Step::Fail => {
                    self.watch.end();
                    return Poll::Ready((step == Step::Fail).then_some(result));
                }
            }
        }
    }

    /// Does not poll the listener for `time`.
    fn pause(&mut self, cx: &Context<'_>, time: Duration) {
        let again = Arc::new(AtomicBool::new(false));
        let (set, shutdown) = (again.clone(), self.watch.shutdown.clone());
        // Use a thread, because the runtime may have no timer, and there may be no free descriptor for a timer.
        let timer = thread::Builder::new().name("ecdysis-pause".into()).spawn(move || {
            thread::sleep(time);
            set.store(true, Ordering::SeqCst);
            shutdown.watchers().wake();
        });
        if timer.is_err() {
            again.store(true, Ordering::SeqCst);
            cx.waker().wake_by_ref();
        }
        self.again = Some(again);
    }
}
