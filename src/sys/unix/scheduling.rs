//! The nice value, which POSIX keeps per process. CPU affinity differs between systems, and is inherited unchanged.

use rustix::process::{getpriority_process, setpriority_process};

/// The nice value of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scheduling {
    nice: Option<i32>,
}

impl Scheduling {
    pub(crate) fn of_this_thread() -> Self {
        Self { nice: getpriority_process(None).ok() }
    }

    /// Returns the value that a child must set to start with this value.
    pub(crate) fn to_restore(&self) -> Self {
        let now = Self::of_this_thread();
        Self { nice: self.nice.filter(|_| now.nice != self.nice) }
    }

    /// Sets the value for this process. Runs in the child of a spawn. A lower value needs permission, so failures are
    /// ignored.
    pub(crate) fn apply(&self) {
        if let Some(nice) = self.nice {
            let _ = setpriority_process(None, nice);
        }
    }
}
