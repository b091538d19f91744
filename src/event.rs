//! What happens, told once: to the log, and to the observer that the program chose.

use std::time::Duration;

use crate::error::chain;
use crate::{Error, Exit, Upgraded};

/// What happens in the life of a generation, for metrics and tests. See
/// [`Builder::on_event`](crate::Builder::on_event).
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// This generation accepts.
    Serving {
        /// This generation; the first is 1.
        generation: u64,
    },
    /// An upgrade was asked for; no child exists yet.
    Upgrading,
    /// The child exists. It may not yet run the new program.
    Spawned {
        /// The child.
        pid: u32,
    },
    /// The child is ready and serves; this process has stopped accepting. The probation begins.
    Committed(&'a Upgraded),
    /// The probation is over: the upgrade has succeeded.
    Upgraded(&'a Upgraded),
    /// The upgrade failed; this process serves on.
    UpgradeFailed {
        /// Why.
        error: &'a Error,
        /// How long it took, from the trigger.
        after: Duration,
    },
    /// [`Ecdysis::run`](crate::Ecdysis::run) is about to return this.
    Ended(&'a Exit),
}

impl Event<'_> {
    /// One line an event, key=value.
    pub(crate) fn log(&self) {
        match self {
            Self::Serving { generation } => log::info!("serving generation={generation}"),
            Self::Upgrading => log::info!("upgrading"),
            Self::Spawned { pid } => log::debug!("spawned pid={pid}"),
            Self::Committed(Upgraded { pid, generation, commit }) => {
                log::info!("committed pid={pid} generation={generation} ms={:.1}", commit.as_secs_f64() * 1e3);
            }
            Self::Upgraded(Upgraded { pid, generation, .. }) => {
                log::info!("upgraded pid={pid} generation={generation}")
            }
            Self::UpgradeFailed { error, after } => {
                log::error!("upgrade failed ms={:.1}: {}", after.as_secs_f64() * 1e3, chain(error));
            }
            Self::Ended(exit) => log::info!("ended: {exit}"),
        }
    }
}
