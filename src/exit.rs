//! How a generation's service ends, and the outcome of an upgrade.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::sys::signal;

/// A successful upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Upgraded {
    /// The process that serves now.
    pub pid: u32,
    /// Its generation.
    pub generation: u64,
    /// The time from the trigger until it served.
    pub commit: Duration,
}

/// Why [`Ecdysis::run`](crate::Ecdysis::run) returned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exit {
    /// What happened.
    pub mode: ExitMode,
    /// What requested it.
    pub reason: ExitReason,
}

/// How a generation's service ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitMode {
    /// A new generation serves.
    Upgraded(Upgraded),
    /// The service has stopped: no process serves.
    Stopped,
    /// Accepting and triggers have ended. Everything else is left to the program.
    PartiallyStopped,
}

/// What requested an upgrade or a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// This signal.
    Signal(i32),
    /// A connection to this control socket.
    Socket(PathBuf),
    /// [`Ecdysis::upgrade`](crate::Ecdysis::upgrade) or [`Ecdysis::stop`](crate::Ecdysis::stop).
    Call,
    /// The parent: it forwarded a request during this process's probation, or took the service back.
    Parent,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.mode, self.reason)
    }
}

impl fmt::Display for ExitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upgraded(Upgraded { pid, generation, .. }) => {
                write!(f, "upgraded to pid {pid}, generation {generation},")
            }
            Self::Stopped => write!(f, "stopped"),
            Self::PartiallyStopped => write!(f, "partially stopped"),
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(signal) => f.write_str(&signal::name(*signal)),
            Self::Socket(path) => write!(f, "socket {}", path.display()),
            Self::Call => write!(f, "a call"),
            Self::Parent => write!(f, "the parent"),
        }
    }
}
