//! What the builder chose and an upgrade needs.

use std::time::Duration;

use crate::handover::link::Transport;
use crate::program::Program;
use crate::sys::attributes::Attributes;
use crate::sys::spawn::Spawn;

/// How the next generation is started.
pub(crate) struct Launch {
    pub(crate) program: Program,
    pub(crate) spawn: Spawn,
    pub(crate) transport: Transport,
    /// The attributes that this process started with, and every child will start with.
    pub(crate) attributes: Attributes,
}

/// What an upgrade may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) ready_timeout: Duration,
    pub(crate) probation: Duration,
    pub(crate) overlap: Overlap,
}

impl Default for Limits {
    fn default() -> Self {
        Self { ready_timeout: Duration::from_secs(60), probation: Duration::from_secs(1), overlap: Overlap::default() }
    }
}

/// What happens when an upgrade is requested while an older generation still drains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overlap {
    /// The upgrade goes ahead; any number of generations may drain.
    #[default]
    Allow,
    /// The upgrade fails with [`Error::ParentDrains`](crate::Error::ParentDrains).
    Refuse,
    /// The upgrade goes ahead. When it has succeeded, the oldest generations beyond this number are asked to end their
    /// [`drain`](crate::Shutdown::drain), which then returns early. This process, which begins to drain, counts as one.
    AtMost(usize),
}
