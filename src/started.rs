//! The one started service of a process.

use std::sync::atomic::{AtomicBool, Ordering};

/// A process cannot have two started services, because signals and the handover belong to the process.
pub(crate) struct Started;

static STARTED: AtomicBool = AtomicBool::new(false);

impl Started {
    pub(crate) fn claim() -> Option<Self> {
        (!STARTED.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        STARTED.store(false, Ordering::Release);
    }
}
