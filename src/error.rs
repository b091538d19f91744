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
/// The message names the operation and its object; [`source`](StdError::source) gives the cause. "The child" is the new
/// process of an upgrade, also where it is not a child of this one but took over: that one is never killed but told, and
/// its `pid` is 0 if it lives in another PID namespace.
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
    /// Somebody else than a trusted user listens at the takeover socket.
    Untrusted {
        /// The socket.
        path: PathBuf,
        /// That user.
        uid: u32,
    },
    /// The process at the takeover socket could not be reached.
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The process at the takeover socket does not hand over now. It serves on.
    NotHandedOver {
        /// The socket.
        path: PathBuf,
        /// Its answer: `busy`, `stopping`, `denied`, or `failed: …`.
        answer: String,
    },
    /// The parent gave the upgrade up: its deadline had passed, or it was asked to stop, or it took the commit back
    /// because this process did not answer it in time. The parent serves on, unless it was asked to stop.
    GivenUp,
    /// A socket could not be bound, or an inherited one not used.
    Socket {
        /// The socket, by kind and the address asked for.
        key: Key,
        /// What the system said.
        source: io::Error,
    },
    /// What the service manager put into the environment, or passed, cannot be used.
    ServiceManager {
        /// The variable and its value, or the descriptor.
        what: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// No unit of the service manager passed such a socket. It passes sockets only when it starts the service: after
    /// a unit has gained one, restart the service.
    NotPassed {
        /// The socket asked for.
        key: Key,
        /// The name asked for.
        name: String,
        /// What was passed and not claimed, with the names.
        passed: String,
    },
    /// The program's own callback could not produce the state for the next generation. The upgrade has failed.
    State {
        /// The name given to [`Sockets::pass_bytes`](crate::Sockets::pass_bytes).
        name: String,
        /// What the callback returned.
        source: Box<dyn StdError + Send + Sync>,
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
    /// This version asks for none of the listeners that the old one serves, and has not declared that this is meant
    /// ([`Sockets::discard_inherited`](crate::Sockets::discard_inherited)).
    NoListener {
        /// The listeners of the old version.
        inherited: String,
    },
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
    /// A process that took over closed its link and lives on. This one serves on. The other is not killed, because it belongs to
    /// somebody else; end it, since it has the listeners, too, and may accept.
    ChildLivesOn {
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
            Self::Untrusted { path, uid } => write!(f, "user {uid} listens at {} and is not trusted", path.display()),
            Self::Connect { path, .. } => write!(f, "cannot connect to takeover socket {}", path.display()),
            Self::NotHandedOver { path, answer } => {
                write!(f, "the process at {} does not hand over: {answer}", path.display())
            }
            Self::GivenUp => write!(f, "the parent gave this upgrade up"),
            Self::Socket { key, .. } => write!(f, "cannot open socket {key}"),
            Self::ServiceManager { what, .. } => write!(f, "cannot use what the service manager passed: {what}"),
            Self::NotPassed { key, name, passed } => {
                let passed = if passed.is_empty() { "nothing that is unclaimed" } else { passed };
                let why =
                    "it passes sockets only when it starts the service, never to a generation that an upgrade started";
                write!(f, "the service manager did not pass {key} as {name:?}, but {passed} ({why})")
            }
            Self::State { name, .. } => write!(f, "cannot produce state {name:?} for the next generation"),
            Self::PidFile { path, .. } => write!(f, "cannot write PID file {}", path.display()),
            Self::Ready { .. } => write!(f, "cannot tell the parent that this process is ready"),
            Self::Busy => write!(f, "busy: an upgrade is under way"),
            Self::NoListener { inherited } => {
                write!(f, "this version asks for none of the listeners of the old one: {inherited}")
            }
            Self::NotReady => write!(f, "this process is not ready yet"),
            Self::Over => write!(f, "this process has stopped or was replaced"),
            Self::StopAsked { pid } => write!(f, "a stop was asked for during the upgrade; {} was ended", Child(*pid)),
            Self::ParentDrains => write!(f, "an older generation still drains"),
            Self::Prepare { what, .. } => write!(f, "cannot prepare the upgrade: {what}"),
            Self::Spawn { program, .. } => write!(f, "cannot make a process for {}", program.display()),
            Self::Exec { program, pid, step, .. } => {
                write!(f, "{} cannot run {}: {step}", Child(*pid), program.display())
            }
            Self::ChildEnded { pid, status: Some(status) } => {
                write!(f, "{} ended before it was ready: {status}", Child(*pid))
            }
            Self::ChildEnded { pid, status: None } => write!(f, "{} ended before it was ready", Child(*pid)),
            Self::ChildSilent { pid } => {
                write!(f, "{} closed its status pipe without a word and was killed", Child(*pid))
            }
            Self::ChildLivesOn { pid } => {
                write!(f, "{} closed its link and lives on: it may accept, too", Child(*pid))
            }
            Self::Refused { pid, reason } => write!(f, "{} refused: {reason}", Child(*pid)),
            Self::Timeout { pid, after } => {
                write!(f, "{} was not ready within {after:?}", Child(*pid))
            }
            Self::Garbage { pid, received } => {
                write!(f, "{} said what is not of the protocol: {received:?}", Child(*pid))
            }
            Self::DiedAfterReady { pid, status: Some(status), after } => {
                write!(f, "{} died {after:?} after it was ready: {status}", Child(*pid))
            }
            Self::DiedAfterReady { pid, status: None, after } => {
                write!(f, "{} died {after:?} after it was ready", Child(*pid))
            }
            Self::Send { pid, .. } => write!(f, "cannot send the manifest to {}", Child(*pid)),
            Self::ParentLives { after } => write!(f, "the parent still lives after {after:?}"),
            Self::Wait { .. } => write!(f, "cannot wait for triggers"),
            Self::RefusedHere { reason } => write!(f, "refused to serve: {reason}"),
        }
    }
}

/// The new process of an upgrade, in a message.
struct Child(u32);

impl fmt::Display for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("child of another PID namespace"),
            pid => write!(f, "child {pid}"),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Signal { source, .. }
            | Self::Handover { source, .. }
            | Self::Connect { source, .. }
            | Self::Socket { source, .. }
            | Self::ServiceManager { source, .. }
            | Self::PidFile { source, .. }
            | Self::Ready { source }
            | Self::Prepare { source, .. }
            | Self::Spawn { source, .. }
            | Self::Exec { source, .. }
            | Self::Send { source, .. }
            | Self::Wait { source } => Some(source),
            Self::State { source, .. } => Some(&**source),
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
