//! When a task may accept: the states of the shutdown handle for tasks.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use std::thread;
use std::time::Duration;

use super::watch::Watch;
use crate::shutdown::{decide_and_log, Phase, Shutdown, Step, Tries};
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

/// One task's place at the gate.
#[derive(Debug)]
pub(super) struct Gate {
    watch: Watch,
    stop_on_shutdown: StopOnShutdown,
    /// During a pause: set when it is time to try again.
    again: Option<Arc<AtomicBool>>,
    tries: Tries,
    ended: bool,
}

impl Gate {
    pub(super) fn new(shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        Self { watch: Watch::new(shutdown), stop_on_shutdown, again: None, tries: Tries::default(), ended: false }
    }

    /// From now on, a drain waits for the end of this: a task that was spawned may not have run yet at a stop, and must
    /// accept what is queued first. A drain does not wait for those that continue after a stop.
    pub(super) fn count(&mut self) {
        if self.stop_on_shutdown == StopOnShutdown::Yes {
            self.watch.count();
        }
    }

    /// Counts an attempt in [`Phase::AcceptQueued`].
    pub(super) fn count_queued(&self) {
        self.watch.shutdown.accept_gate().count_queued();
    }

    /// What the task may do now. The task is woken when that changes.
    ///
    /// A listener that the next generation does not have is served until this one is over.
    pub(super) fn phase(&mut self, cx: &Context<'_>, listener: Option<BorrowedFd<'_>>) -> Phase {
        if self.ended {
            return Phase::End;
        }
        // Before the state is read, so that no change is missed.
        self.watch.register(cx);
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

    /// The next value of `source`, or `None` when it is over, as [`Shutdown::accept`] does it.
    ///
    /// `poll` asks the runtime. `now` asks the kernel: at a stop, the runtime's "nothing yet" may only mean that it has
    /// not looked, or that the task has used up its budget, and what is queued would be reset.
    pub(super) fn poll_next<S: ?Sized, T>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        listener: impl Fn(&S) -> BorrowedFd<'_>,
        poll: impl Fn(&mut S, &mut Context<'_>) -> Poll<io::Result<T>>,
        now: impl Fn(&mut S) -> io::Result<T>,
    ) -> Poll<Option<io::Result<T>>> {
        loop {
            let phase = self.phase(cx, Some(listener(source)));
            if phase == Phase::End {
                self.end();
                return Poll::Ready(None);
            }
            if phase == Phase::Wait || self.again.as_ref().is_some_and(|again| !again.load(Ordering::SeqCst)) {
                return Poll::Pending;
            }
            self.again = None;
            let result = if phase == Phase::AcceptQueued {
                self.count_queued();
                now(source)
            } else {
                ready!(poll(source, cx))
            };
            let settled = self.watch.shutdown.accept_gate().settled();
            match decide_and_log(phase, settled.has_passed(), &result, &mut self.tries) {
                Step::Return => return Poll::Ready(Some(result)),
                Step::Retry => {}
                Step::Linger => self.pause(cx, settled.time_left()),
                // Only `now` finds nothing: `poll` would be pending, so there is no wait.
                Step::Wait | Step::Pause => self.pause(cx, SCARCE),
                Step::End => {
                    self.end();
                    return Poll::Ready(None);
                }
                Step::Fail => {
                    self.end();
                    return Poll::Ready(Some(result));
                }
            }
        }
    }

    /// Leaves the listener alone for `time`.
    fn pause(&mut self, cx: &Context<'_>, time: Duration) {
        let again = Arc::new(AtomicBool::new(false));
        let (set, shutdown) = (again.clone(), self.watch.shutdown.clone());
        // A thread, because the runtime may have no timer, and a timer's descriptor is what may be missing.
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

    fn end(&mut self) {
        self.ended = true;
        self.watch.end();
    }
}
