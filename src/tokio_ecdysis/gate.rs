//! When a task may accept: the four states of the shutdown handle, for what is polled.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use super::StopOnShutdown;
use crate::shutdown::watch::Watch;
use crate::shutdown::{AcceptFailure, Phase, Shutdown, HANDSHAKE};
use crate::sys::poll::SCARCE;

/// One task's place at the gate.
#[derive(Debug)]
pub(super) struct Gate {
    watch: Watch,
    stop_on_shutdown: StopOnShutdown,
    /// While the listener is left alone: set when it is time to try again.
    again: Option<Arc<AtomicBool>>,
    /// At a stop: the queue has been found empty once.
    lingered: bool,
    /// So that a lack of descriptors is logged once and not every 50 ms.
    told: bool,
    ended: bool,
}

impl Gate {
    pub(super) fn new(shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        Self { watch: Watch::new(shutdown), stop_on_shutdown, again: None, lingered: false, told: false, ended: false }
    }

    /// Has a drain wait for the end of this, from now on: a task that was spawned may not have run yet when a stop comes,
    /// and is to take what is queued first. Those that go on after a stop are not waited for.
    pub(super) fn count(&mut self) {
        if self.stop_on_shutdown == StopOnShutdown::Yes {
            self.watch.count();
        }
    }

    /// Counts an attempt in [`Phase::Last`].
    pub(super) fn count_last(&self) {
        self.watch.shutdown.count_last();
    }

    /// What the task may do now. It is woken when that changes.
    pub(super) fn phase(&mut self, cx: &Context<'_>) -> Phase {
        if self.ended {
            return Phase::End;
        }
        // In this order: a change between the two then wakes.
        self.watch.register(cx);
        let shutdown = &self.watch.shutdown;
        match shutdown.phase() {
            Phase::Last | Phase::End if self.stop_on_shutdown == StopOnShutdown::No && !shutdown.is_handed_over() => {
                Phase::Try
            }
            phase => phase,
        }
    }

    /// The next value of `source`, or `None` when it is over, as [`Shutdown::accept`] does it.
    ///
    /// `poll` asks the runtime. `now` asks the kernel: at a stop, the runtime's "nothing yet" may only mean that it has
    /// not looked, or that the task has had its share of time, and what waits in the queue would be reset.
    pub(super) fn poll_next<S: ?Sized, T>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        poll: impl Fn(&mut S, &mut Context<'_>) -> Poll<io::Result<T>>,
        now: impl Fn(&mut S) -> io::Result<T>,
    ) -> Poll<Option<io::Result<T>>> {
        loop {
            let phase = self.phase(cx);
            if phase == Phase::End {
                self.end();
                return Poll::Ready(None);
            }
            if phase == Phase::Wait || self.again.as_ref().is_some_and(|again| !again.load(Ordering::SeqCst)) {
                return Poll::Pending;
            }
            self.again = None;
            let result = if phase == Phase::Last {
                self.count_last();
                now(source)
            } else {
                match poll(source, cx) {
                    Poll::Ready(result) => result,
                    Poll::Pending => return Poll::Pending,
                }
            };
            let error = match result {
                Ok(value) => {
                    self.told = false;
                    return Poll::Ready(Some(Ok(value)));
                }
                Err(error) => error,
            };
            match AcceptFailure::of(&error) {
                // Only `now` says so. A client may think it is connected before its last packet has got it into the queue.
                AcceptFailure::Empty if !std::mem::replace(&mut self.lingered, true) => self.pause(cx, HANDSHAKE),
                AcceptFailure::Empty => {
                    self.end();
                    return Poll::Ready(None);
                }
                AcceptFailure::Passing => {}
                AcceptFailure::Exhausted => {
                    if !std::mem::replace(&mut self.told, true) {
                        log::warn!("cannot accept for want of resources, waiting: {error}");
                    }
                    // It is readable all the time: to poll it would be to spin.
                    self.pause(cx, SCARCE);
                }
                AcceptFailure::Fatal => {
                    self.end();
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    /// Leaves the listener alone for that time.
    fn pause(&mut self, cx: &Context<'_>, time: Duration) {
        let again = Arc::new(AtomicBool::new(false));
        let (set, shutdown) = (again.clone(), self.watch.shutdown.clone());
        // A thread and no timer of the runtime's: that may have none, and a descriptor for one is what is lacking.
        let timer = thread::Builder::new().name("ecdysis-pause".into()).spawn(move || {
            thread::sleep(time);
            set.store(true, Ordering::SeqCst);
            shutdown.wake_watchers();
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
