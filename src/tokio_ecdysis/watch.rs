//! One task's watch over the state of the shutdown handle.

use std::task::Context;

use crate::shutdown::{LoopGuard, Shutdown, Slot};

/// It may count as an accept loop.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) shutdown: Shutdown,
    slot: Option<Slot>,
    counted: Option<LoopGuard>,
}

impl Watch {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self { shutdown, slot: None, counted: None }
    }

    /// From now on, wakes the task at every change. Look at the state after this call.
    pub(super) fn register(&mut self, cx: &Context<'_>) {
        self.shutdown.watchers().register(&mut self.slot, cx.waker());
    }

    /// Counts as an accept loop, for which a drain waits, until [`end`](Self::end).
    pub(super) fn count(&mut self) {
        if self.counted.is_none() {
            self.counted = Some(self.shutdown.count_loop());
        }
    }

    pub(super) fn end(&mut self) {
        self.counted = None;
        if let Some(slot) = self.slot.take() {
            self.shutdown.watchers().remove(slot);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}
