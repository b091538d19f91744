//! The registration of one task for changes of the shutdown handle's state.

use std::task::Context;

use crate::shutdown::{Shutdown, Slot};

#[derive(Debug)]
pub(super) struct TaskWatch {
    pub(super) shutdown: Shutdown,
    slot: Option<Slot>,
}

impl TaskWatch {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self { shutdown, slot: None }
    }

    /// From now on, wakes the task at every change. Check the state after this call.
    pub(super) fn register(&mut self, cx: &Context<'_>) {
        self.shutdown.watchers().register(&mut self.slot, cx.waker());
    }

    pub(super) fn end(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.shutdown.watchers().remove(slot);
        }
    }
}

impl Drop for TaskWatch {
    fn drop(&mut self) {
        self.end();
    }
}
