//! What can go wrong: one variant per operation, with the object it was about and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::Key;

/// Why an operation failed. Whatever it was, everything is as it was before: after a failed upgrade the process serves
/// on, and the next upgrade may be asked for at once.
///
/// The message names the operation and its object; [`source`](StdError::source) gives the cause.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// This process has a started `Ecdysis` already; its signals and its handover belong to that one.
    AlreadyStarted,
    /// The handler for this signal could not be installed.
    Signal {
        /// The signal's number.
        signal: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The handover from the parent could not be read. The parent serves on.
    Handover {
        /// What was being read.
        what: &'static str,
        /// What was wrong.
        source: io::Error,
    },
    /// A socket could not be bound, or an inherited one not used.
    Socket {
        /// The socket, by kind and the address asked for.
        key: Key,
        /// What the system said.
        source: io::Error,
    },
    /// The PID file could not be written.
    PidFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The parent could not be told that this process is ready.
    Ready {
        /// What the system said.
        source: io::Error,
    },
    /// An upgrade is under way already.
    Busy,
    /// This process does not serve yet.
    NotReady,
    /// This process has stopped, or has been replaced: it makes no more upgrades.
    Over,
    /// A stop was asked for during the upgrade; the child was ended.
    StopAsked {
        /// The child.
        pid: u32,
    },
    /// An older generation still drains, and [`Overlap::Refuse`](crate::Overlap::Refuse) was chosen.
    ParentDrains,
    /// What an upgrade needs could not be made; no child was started.
    Prepare {
        /// What was to be made.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// No child process could be made.
    Spawn {
        /// The program it was to run.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The child could not run the new program.
    Exec {
        /// The program.
        program: PathBuf,
        /// The child.
        pid: u32,
        /// What failed: `execve`, `chdir`, `sweep`, `keep` or `sigmask`.
        step: String,
        /// What the system said.
        source: io::Error,
    },
    /// The child ended before it was ready.
    ChildEnded {
        /// The child.
        pid: u32,
        /// How it ended; `None` when somebody else reaped it (SIGCHLD ignored, a `wait` for any child).
        status: Option<ExitStatus>,
    },
    /// The child closed the status pipe without a word and lived on. It was killed.
    ChildSilent {
        /// The child.
        pid: u32,
    },
    /// The child refused to serve, see [`Starting::refuse`](crate::Starting::refuse).
    Refused {
        /// The child.
        pid: u32,
        /// Its reason.
        reason: String,
    },
    /// The child was not ready in time. It was killed.
    Timeout {
        /// The child.
        pid: u32,
        /// How long it had.
        after: Duration,
    },
    /// What the child said is not of the protocol. Before its `ready` it is killed for that.
    Garbage {
        /// The child.
        pid: u32,
        /// The beginning of what it said.
        received: String,
    },
    /// The child died during its probation. This process accepts again.
    DiedAfterReady {
        /// The child.
        pid: u32,
        /// How it ended, as in [`Error::ChildEnded`].
        status: Option<ExitStatus>,
        /// How long it had served.
        after: Duration,
    },
    /// The manifest could not be sent to the child.
    Send {
        /// The child.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The parent still lives.
    ParentLives {
        /// How long was waited.
        after: Duration,
    },
    /// The wait for triggers failed.
    Wait {
        /// What the system said.
        source: io::Error,
    },
    /// [`Starting::refuse`](crate::Starting::refuse) was called, with this reason.
    RefusedHere {
        /// The reason.
        reason: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyStarted => write!(f, "this process has started ecdysis already"),
            Self::Signal { signal, .. } => write!(f, "cannot handle signal {signal}"),
            Self::Handover { what, .. } => write!(f, "cannot read the handover from the parent: {what}"),
            Self::Socket { key, .. } => write!(f, "cannot open socket {key}"),
            Self::PidFile { path, .. } => write!(f, "cannot write PID file {}", path.display()),
            Self::Ready { .. } => write!(f, "cannot tell the parent that this process is ready"),
            Self::Busy => write!(f, "busy: an upgrade is under way"),
            Self::NotReady => write!(f, "this process is not ready yet"),
            Self::Over => write!(f, "this process has stopped or was replaced"),
            Self::StopAsked { pid } => write!(f, "a stop was asked for during the upgrade; child {pid} was ended"),
            Self::ParentDrains => write!(f, "an older generation still drains"),
            Self::Prepare { what, .. } => write!(f, "cannot prepare the upgrade: {what}"),
            Self::Spawn { program, .. } => write!(f, "cannot make a process for {}", program.display()),
            Self::Exec { program, pid, step, .. } => {
                write!(f, "child {pid} cannot run {}: {step}", program.display())
            }
            Self::ChildEnded { pid, status: Some(status) } => {
                write!(f, "child {pid} ended before it was ready: {status}")
            }
            Self::ChildEnded { pid, status: None } => write!(f, "child {pid} ended before it was ready"),
            Self::ChildSilent { pid } => {
                write!(f, "child {pid} closed its status pipe without a word and was killed")
            }
            Self::Refused { pid, reason } => write!(f, "child {pid} refused: {reason}"),
            Self::Timeout { pid, after } => {
                write!(f, "child {pid} was not ready within {after:?} and was killed")
            }
            Self::Garbage { pid, received } => {
                write!(f, "child {pid} said what is not of the protocol: {received:?}")
            }
            Self::DiedAfterReady { pid, status: Some(status), after } => {
                write!(f, "child {pid} died {after:?} after it was ready: {status}")
            }
            Self::DiedAfterReady { pid, status: None, after } => {
                write!(f, "child {pid} died {after:?} after it was ready")
            }
            Self::Send { pid, .. } => write!(f, "cannot send the manifest to child {pid}"),
            Self::ParentLives { after } => write!(f, "the parent still lives after {after:?}"),
            Self::Wait { .. } => write!(f, "cannot wait for triggers"),
            Self::RefusedHere { reason } => write!(f, "refused to serve: {reason}"),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Signal { source, .. }
            | Self::Handover { source, .. }
            | Self::Socket { source, .. }
            | Self::PidFile { source, .. }
            | Self::Ready { source }
            | Self::Prepare { source, .. }
            | Self::Spawn { source, .. }
            | Self::Exec { source, .. }
            | Self::Send { source, .. }
            | Self::Wait { source } => Some(source),
            _ => None,
        }
    }
}

/// Keeps the kind of the cause, so that programs which only know `io::Error` still tell "address in use".
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = error
            .source()
            .and_then(|source| source.downcast_ref::<io::Error>())
            .map_or(io::ErrorKind::Other, io::Error::kind);
        io::Error::new(kind, error)
    }
}

/// An error with its causes in one line, for logs and control sockets.
pub(crate) fn chain(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line.replace('\n', " ")
}
