//! Lifecycle events, logged and passed to the program's observer.

use std::time::Duration;

use crate::logging;
use crate::{Error, Exit, Upgraded};

/// An event in the life of a generation, for metrics and tests. See [`Builder::on_event`](crate::Builder::on_event).
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// This generation accepts.
    Serving {
        /// This generation; the first is 1.
        generation: u64,
    },
    /// An upgrade was requested; no child exists yet.
    Upgrading,
    /// The child exists. It may not run the new program yet.
    Spawned {
        /// The child.
        pid: u32,
    },
    /// The child is ready and serves; this process has stopped accepting. The probation begins.
    Committed(&'a Upgraded),
    /// The probation is over: the upgrade has succeeded.
    Upgraded(&'a Upgraded),
    /// The upgrade failed; this process keeps serving.
    UpgradeFailed {
        /// Why.
        error: &'a Error,
        /// How long it took, from the trigger.
        after: Duration,
    },
    /// [`Ecdysis::run`](crate::Ecdysis::run) is about to return this.
    Ended(&'a Exit),
}

/// Passes a copy of an event to an observer, in another thread.
pub(crate) type Delivery = Box<dyn FnOnce(&dyn Fn(&Event<'_>)) + Send>;

impl Event<'_> {
    pub(crate) fn delivery(&self) -> Delivery {
        fn deliver<T: Send + 'static>(copy: T, event: impl FnOnce(&T) -> Event<'_> + Send + 'static) -> Delivery {
            Box::new(move |observer| observer(&event(&copy)))
        }
        match *self {
            Self::Serving { generation } => deliver((), move |()| Event::Serving { generation }),
            Self::Upgrading => deliver((), |()| Event::Upgrading),
            Self::Spawned { pid } => deliver((), move |()| Event::Spawned { pid }),
            Self::Committed(upgraded) => deliver(upgraded.clone(), |copy| Event::Committed(copy)),
            Self::Upgraded(upgraded) => deliver(upgraded.clone(), |copy| Event::Upgraded(copy)),
            Self::UpgradeFailed { error, after } => {
                deliver(error.copy(), move |error| Event::UpgradeFailed { error, after })
            }
            Self::Ended(exit) => deliver(exit.clone(), |copy| Event::Ended(copy)),
        }
    }

    /// One line for each event, key=value. `child` is the new process of an upgrade.
    pub(crate) fn log(&self) {
        match self {
            Self::Serving { .. } => logging::info!("serving"),
            Self::Upgrading => logging::info!("upgrading"),
            Self::Spawned { pid } => logging::info!("spawned child={pid}"),
            Self::Committed(Upgraded { pid, commit, .. }) => {
                logging::info!("committed child={pid} ms={:.1}", commit.as_secs_f64() * 1e3);
            }
            Self::Upgraded(Upgraded { pid, .. }) => logging::info!("upgraded child={pid}"),
            Self::UpgradeFailed { error, after } => {
                logging::error!("upgrade failed ms={:.1}: {error}", after.as_secs_f64() * 1e3);
            }
            Self::Ended(exit) => logging::info!("ended: {exit}"),
        }
    }
}
