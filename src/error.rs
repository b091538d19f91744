//! Errors: one variant for each operation, with its object and its cause.

use std::error::Error as StdError;
use std::fmt::{self, Write};
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::sys::signal::name as signal_name;
use crate::Key;

/// Why an operation failed. Everything is as it was before: after a failed upgrade the process keeps serving, and the
/// next upgrade may be requested at once.
///
/// The message names the operation, its object and every cause, so [`source`](StdError::source) returns `None`. "The
/// child" is the new process of an upgrade, also if it took over and is no child of this one. Such a process is never
/// killed, but turned away, and its `pid` is 0 if it lives in another PID namespace.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// This process has a started `Ecdysis` already; its signals and its handover belong to that one.
    AlreadyStarted,
    /// The handler for this signal could not be installed.
    Signal {
        /// The signal's number.
        signal: i32,
        /// The underlying OS error.
        source: io::Error,
    },
    /// The handover from the parent could not be read. The parent keeps serving.
    Handover {
        /// The part that was read.
        what: &'static str,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The user that listens at the takeover socket is not trusted.
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
        /// The underlying OS error.
        source: io::Error,
    },
    /// The process at the takeover socket does not hand over now. It keeps serving.
    NotHandedOver {
        /// The socket.
        path: PathBuf,
        /// Its answer: `busy`, `stopping`, `denied`, or `failed: …`.
        answer: String,
    },
    /// The parent gave up this upgrade: its deadline had passed, it was asked to stop, or it took the commit back because
    /// this process did not answer in time. The parent keeps serving, unless it was asked to stop.
    GivenUp,
    /// A socket could not be bound, or an inherited one could not be used.
    Socket {
        /// The socket: its kind and the address that was asked for.
        key: Key,
        /// The underlying OS error.
        source: io::Error,
    },
    /// A variable or a descriptor from the service manager cannot be used.
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
        /// The sockets that were passed and not claimed, with their names.
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
        /// The underlying OS error.
        source: io::Error,
    },
    /// The message `ready` could not be sent to the parent.
    Ready {
        /// The underlying OS error.
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
    /// This process has stopped or was replaced, so it makes no more upgrades.
    Over,
    /// A stop was requested during the upgrade. The child was ended.
    StopAsked {
        /// The child.
        pid: u32,
    },
    /// An older generation still drains, and [`Overlap::Refuse`](crate::Overlap::Refuse) was chosen.
    ParentDrains,
    /// The upgrade could not be prepared. No child was started.
    Prepare {
        /// The part that could not be made.
        what: &'static str,
        /// The underlying OS error.
        source: io::Error,
    },
    /// The child process could not be created.
    Spawn {
        /// The program that it should have run.
        program: PathBuf,
        /// The underlying OS error.
        source: io::Error,
    },
    /// The child could not run the new program.
    Exec {
        /// The program.
        program: PathBuf,
        /// The child.
        pid: u32,
        /// The step that failed: `execve`, `chdir`, `sweep`, `keep` or `sigmask`.
        step: String,
        /// The underlying OS error.
        source: io::Error,
    },
    /// The child ended before it was ready.
    ChildEnded {
        /// The child.
        pid: u32,
        /// How it ended; `None` if other code reaped it (SIGCHLD ignored, a `wait` for any child).
        status: Option<ExitStatus>,
    },
    /// The child closed its status pipe without reporting and did not end. It was killed.
    ChildSilent {
        /// The child.
        pid: u32,
    },
    /// A process that took over closed its link and did not end. This process keeps serving. The other one is not killed,
    /// because it belongs to another supervisor. End it: it has the listeners too, and may accept.
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
    /// The child sent an invalid message. A child that is not ready yet is killed for that.
    Garbage {
        /// The child.
        pid: u32,
        /// The beginning of what it sent.
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
        /// The underlying OS error.
        source: io::Error,
    },
    /// The parent has not ended yet.
    ParentLives {
        /// How long this process waited.
        after: Duration,
    },
    /// The wait for triggers failed.
    Wait {
        /// The underlying OS error.
        source: io::Error,
    },
    /// [`Starting::refuse`](crate::Starting::refuse) was called, with this reason.
    RefusedHere {
        /// The reason.
        reason: String,
    },
}

/// The error and all its causes, in one line. Operators read it in a log, or as the answer of a control socket, where
/// "cannot open socket" without "address in use" helps nobody. So [`source`](StdError::source) returns `None`:
/// otherwise programs that print every source would print the causes twice. The direct cause is a field.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = String::new();
        self.write_without_cause(&mut line)?;
        let mut next = self.cause();
        while let Some(cause) = next {
            write!(line, ": {cause}")?;
            next = cause.source();
        }
        f.write_str(&line.replace('\n', " "))
    }
}

impl Error {
    fn write_without_cause(&self, f: &mut String) -> fmt::Result {
        match self {
            Self::AlreadyStarted => write!(f, "this process has started ecdysis already"),
            Self::Signal { signal, .. } => write!(f, "cannot handle {}", signal_name(*signal)),
            Self::Handover { what, .. } => write!(f, "cannot read the handover from the parent: {what}"),
            Self::Untrusted { path, uid } => write!(f, "user {uid} listens at {} and is not trusted", path.display()),
            Self::Connect { path, .. } => write!(f, "cannot connect to takeover socket {}", path.display()),
            Self::NotHandedOver { path, answer } => {
                write!(f, "the process at {} does not hand over: {answer}", path.display())
            }
            Self::GivenUp => write!(f, "the parent gave up this upgrade"),
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
            Self::Ready { .. } => write!(f, "cannot send `ready` to the parent"),
            Self::Busy => write!(f, "busy: an upgrade is under way"),
            Self::NoListener { inherited } => {
                write!(f, "this version asks for none of the listeners of the old one: {inherited}")
            }
            Self::NotReady => write!(f, "this process is not ready yet"),
            Self::Over => write!(f, "this process has stopped or was replaced"),
            Self::StopAsked { pid } => write!(f, "a stop was requested during the upgrade; {} was ended", Child(*pid)),
            Self::ParentDrains => write!(f, "an older generation still drains"),
            Self::Prepare { what, .. } => write!(f, "cannot prepare the upgrade: {what}"),
            Self::Spawn { program, .. } => write!(f, "cannot create a process for {}", program.display()),
            Self::Exec { program, pid, step, .. } => {
                write!(f, "{} cannot run {}: {step}", Child(*pid), program.display())
            }
            Self::ChildEnded { pid, status: Some(status) } => {
                write!(f, "{} ended before it was ready: {status}", Child(*pid))
            }
            Self::ChildEnded { pid, status: None } => write!(f, "{} ended before it was ready", Child(*pid)),
            Self::ChildSilent { pid } => {
                write!(f, "{} closed its status pipe without reporting and was killed", Child(*pid))
            }
            Self::ChildLivesOn { pid } => {
                write!(f, "{} closed its link but did not end; it may still accept", Child(*pid))
            }
            Self::Refused { pid, reason } => write!(f, "{} refused: {reason}", Child(*pid)),
            Self::Timeout { pid, after } => {
                write!(f, "{} was not ready within {after:?}", Child(*pid))
            }
            Self::Garbage { pid, received } => {
                write!(f, "{} sent an invalid message: {received:?}", Child(*pid))
            }
            Self::DiedAfterReady { pid, status: Some(status), after } => {
                write!(f, "{} died {after:?} after it was ready: {status}", Child(*pid))
            }
            Self::DiedAfterReady { pid, status: None, after } => {
                write!(f, "{} died {after:?} after it was ready", Child(*pid))
            }
            Self::Send { pid, .. } => write!(f, "cannot send the manifest to {}", Child(*pid)),
            Self::ParentLives { after } => write!(f, "the parent has not ended after {after:?}"),
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

impl StdError for Error {}

impl Error {
    fn cause(&self) -> Option<&(dyn StdError + 'static)> {
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

/// Keeps the kind of the cause, so that programs that expect an `io::Error` can match `AddrInUse`.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = error
            .cause()
            .and_then(|source| source.downcast_ref::<io::Error>())
            .map_or(io::ErrorKind::Other, io::Error::kind);
        io::Error::new(kind, error)
    }
}
