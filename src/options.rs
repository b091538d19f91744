//! The builder's choices that an upgrade needs.

use std::error::Error as StdError;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::exit::Upgraded;
use crate::handover::link::Transport;
use crate::program::{Changes, Program};
use crate::sys::attributes::Attributes;
use crate::sys::spawn::Spawn;

/// Chooses the program of the next generation, at each upgrade.
pub(crate) type BeforeUpgrade = Arc<dyn Fn(&mut Changes) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync>;

/// Decides during the probation whether the new process is kept.
pub(crate) type Verify = Arc<dyn Fn(&Upgraded) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync>;

/// How the next generation is started.
pub(crate) struct Launch {
    pub(crate) program: Program,
    pub(crate) before_upgrade: Option<BeforeUpgrade>,
    /// Upgrades are not possible.
    pub(crate) standalone: bool,
    pub(crate) verify: Option<Verify>,
    pub(crate) spawn: Spawn,
    pub(crate) transport: Transport,
    /// The attributes with which this process was started, and with which every child will start.
    pub(crate) attributes: Attributes,
}

impl Launch {
    /// Returns how to start the next generation, according to the program's current choice.
    pub(crate) fn program(&self) -> Result<Program, Error> {
        if self.standalone {
            let source = io::Error::new(io::ErrorKind::Unsupported, "this service is standalone");
            return Err(Error::prepare("the next generation")(source));
        }
        let mut changes = Changes::default();
        if let Some(before_upgrade) = &self.before_upgrade {
            // This is the program's code. A panic in it makes the upgrade fail, but must not end the thread that
            // upgrades.
            panic::catch_unwind(AssertUnwindSafe(|| before_upgrade(&mut changes)))
                .unwrap_or_else(|_| Err("the callback panicked".into()))
                .map_err(|e| Error::prepare("before_upgrade")(io::Error::other(e)))?;
        }
        Ok(self.program.clone().with(&changes))
    }
}

/// The time limits of an upgrade.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) ready_timeout: Duration,
    pub(crate) probation: Duration,
    pub(crate) overlap: Overlap,
    /// Whether a stop signal during the drain ends the drain.
    pub(crate) second_stop_ends_drain: bool,
    pub(crate) stop_delay: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ready_timeout: Duration::from_secs(60),
            probation: Duration::from_secs(1),
            overlap: Overlap::default(),
            second_stop_ends_drain: false,
            stop_delay: Duration::ZERO,
        }
    }
}

/// What happens when an upgrade is requested while an older generation still drains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overlap {
    /// The upgrade proceeds. Any number of generations may drain.
    #[default]
    Allow,
    /// The upgrade fails with [`Error::ParentDrains`](crate::Error::ParentDrains).
    Refuse,
    /// The upgrade proceeds. When it has succeeded, the oldest generations beyond this number are asked to end their
    /// [`drain`](crate::Shutdown::drain), which then returns early. This process, which begins to drain, counts as one.
    AtMost(usize),
}
