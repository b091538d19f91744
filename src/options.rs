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
use crate::sys::spawn::Spawn;

/// Chooses the program of the next generation, at each upgrade.
pub(crate) type BeforeUpgrade = Arc<dyn Fn(&mut Changes) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync>;

/// Decides during the probation whether the new process is kept.
pub(crate) type Verify = Arc<dyn Fn(&Upgraded) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync>;

/// The builder's choices that are needed after the start.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) before_upgrade: Option<BeforeUpgrade>,
    /// Upgrades are not possible.
    pub(crate) standalone: bool,
    pub(crate) verify: Option<Verify>,
    pub(crate) spawn: Spawn,
    pub(crate) transport: Transport,
    pub(crate) ready_timeout: Duration,
    pub(crate) probation: Duration,
    pub(crate) overlap: Overlap,
    /// Whether a stop signal during the drain ends the drain.
    pub(crate) second_stop_ends_drain: bool,
    pub(crate) stop_delay: Duration,
}

impl Options {
    /// Returns what the next generation runs: `program` with the changes that `before_upgrade` makes now.
    pub(crate) fn next_program(&self, program: &Program) -> Result<Program, Error> {
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
        Ok(program.clone().with(&changes))
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            before_upgrade: None,
            standalone: false,
            verify: None,
            spawn: Spawn::default(),
            transport: Transport::default(),
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
