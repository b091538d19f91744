//! One task's watch over the state of the shutdown handle.

use std::task::{Context, Waker};

use crate::shutdown::{LoopGuard, Shutdown};

/// It may count as an accept loop.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) shutdown: Shutdown,
    number: Option<u64>,
    /// The registered waker: a task that polls again need not take the lock.
    waker: Option<Waker>,
    counted: Option<LoopGuard>,
}

impl Watch {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self { shutdown, number: None, waker: None, counted: None }
    }

    /// From now on, wakes the task at every change. Look at the state after this call.
    pub(super) fn register(&mut self, cx: &Context<'_>) {
        let waker = cx.waker();
        if self.waker.as_ref().is_some_and(|registered| registered.will_wake(waker)) {
            return;
        }
        self.shutdown.watchers().register(&mut self.number, waker);
        self.waker = Some(waker.clone());
    }

    /// Counts as an accept loop, for which a drain waits, until [`end`](Self::end).
    pub(super) fn count(&mut self) {
        if self.counted.is_none() {
            self.counted = Some(self.shutdown.count_loop());
        }
    }

    pub(super) fn end(&mut self) {
        self.counted = None;
        if let Some(number) = self.number.take() {
            self.shutdown.watchers().remove(number);
        }
        self.waker = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}
