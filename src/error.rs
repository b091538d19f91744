//! Errors: one variant for each operation, with its object and its cause.

use std::error::Error as StdError;
use std::fmt::{self, Write};
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::sys::child::explain_end;
use crate::sys::signal::name as signal_name;
use crate::Key;

/// Why an operation failed. An error changes nothing: after a failed upgrade the process keeps serving, and the next
/// upgrade may be requested immediately.
///
/// The message names the operation, its object and every cause, so [`source`](StdError::source) returns `None`. "The
/// child" is the new process of an upgrade, or the process that takes over, which is not a child of this one. The
/// latter is never killed but turned away, and its `pid` is 0 if it lives in another PID namespace.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// This process already has a started `Ecdysis`, to which its signals and its handover belong.
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
        /// The part that could not be read.
        what: &'static str,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The process at the takeover socket runs as a user that is not trusted.
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
    /// The parent gave up on this upgrade: its deadline had passed, it was asked to stop, or it took the commit back
    /// because this process did not answer in time. The parent keeps serving, unless it was asked to stop.
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
    /// This version asks for none of the listeners that the old one serves, and has not declared that this is intended
    /// ([`Sockets::discard_inherited`](crate::Sockets::discard_inherited)).
    NoListener {
        /// The listeners of the old version.
        inherited: String,
    },
    /// This process does not serve yet.
    NotReady,
    /// This process has stopped or was replaced, so it never upgrades again.
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
        /// Its exit status. `None` if other code reaped it (SIGCHLD ignored, a `wait` for any child).
        status: Option<ExitStatus>,
    },
    /// The child closed its status pipe without reporting and did not end. It was killed.
    ChildSilent {
        /// The child.
        pid: u32,
    },
    /// A process that took over closed its link but did not end. This process keeps serving. The other one is not
    /// killed, because it belongs to another supervisor. End it yourself: it has the listeners too, and may accept.
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
    /// The child was not ready in time, or did not answer the commit within 5 seconds. It was killed.
    Timeout {
        /// The child.
        pid: u32,
        /// How long it had.
        after: Duration,
    },
    /// The child sent an invalid message. If it was not ready yet, it was killed.
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
        /// Its exit status, as in [`Error::ChildEnded`].
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
/// "cannot open socket" without "address in use" does not help. So [`source`](StdError::source) returns `None`:
/// otherwise programs that print every source would print the causes twice. The direct cause is a field.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut line, mut next) = self.parts();
        while let Some(cause) = next {
            write!(line, ": {cause}")?;
            next = cause.source();
        }
        f.write_str(&line.replace('\n', " "))
    }
}

impl StdError for Error {}

impl Error {
    /// Returns a copy of the error for another thread. A cause that cannot be copied keeps its kind and its text.
    pub(crate) fn copy(&self) -> Self {
        macro_rules! copy {
            ($($variant:ident { $($field:ident $(as $how:ident)?),* })*) => {
                match self { $(Self::$variant { $($field),* } => Self::$variant { $($field: copy!($field $($how)?)),* }),* }
            };
            ($field:ident) => { $field.clone() };
            ($error:ident io) => { match $error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new($error.kind(), $error.to_string()),
            } };
            ($error:ident text) => { $error.to_string().into() };
        }
        copy! {
            AlreadyStarted {} Signal { signal, source as io } Handover { what, source as io } Untrusted { path, uid }
            Connect { path, source as io } NotHandedOver { path, answer } GivenUp {} Socket { key, source as io }
            ServiceManager { what, source as io } NotPassed { key, name, passed } State { name, source as text }
            PidFile { path, source as io } Ready { source as io } Busy {} NoListener { inherited } NotReady {} Over {}
            StopAsked { pid } ParentDrains {} Prepare { what, source as io } Spawn { program, source as io }
            Exec { program, pid, step, source as io } ChildEnded { pid, status } ChildSilent { pid } ChildLivesOn { pid }
            Refused { pid, reason } Timeout { pid, after } Garbage { pid, received }
            DiedAfterReady { pid, status, after } Send { pid, source as io } ParentLives { after } Wait { source as io }
            RefusedHere { reason }
        }
    }

    /// Returns the message without its causes, and the direct cause.
    pub(crate) fn parts(&self) -> (String, Option<&(dyn StdError + 'static)>) {
        let child = |pid: &u32| match pid {
            0 => "child of another PID namespace".to_owned(),
            pid => format!("child {pid}"),
        };
        let how =
            |status: &Option<ExitStatus>| status.map(|status| format!(": {}", explain_end(status))).unwrap_or_default();
        let text = match self {
            Self::Signal { signal, source } => {
                return (format!("cannot handle {}", signal_name(*signal)), Some(source))
            }
            Self::Handover { what, source } => {
                return (format!("cannot read the handover from the parent: {what}"), Some(source));
            }
            Self::Connect { path, source } => {
                return (format!("cannot connect to takeover socket {}", path.display()), Some(source));
            }
            Self::Socket { key, source } => return (format!("cannot open socket {key}"), Some(source)),
            Self::ServiceManager { what, source } => {
                return (format!("cannot use what the service manager passed: {what}"), Some(source));
            }
            Self::State { name, source } => {
                return (format!("cannot produce state {name:?} for the next generation"), Some(&**source));
            }
            Self::PidFile { path, source } => {
                return (format!("cannot write PID file {}", path.display()), Some(source));
            }
            Self::Ready { source } => return ("cannot send `ready` to the parent".into(), Some(source)),
            Self::Prepare { what, source } => return (format!("cannot prepare the upgrade: {what}"), Some(source)),
            Self::Spawn { program, source } => {
                return (format!("cannot create a process for {}", program.display()), Some(source));
            }
            Self::Exec { program, pid, step, source } => {
                return (format!("{} cannot run {}: {step}", child(pid), program.display()), Some(source));
            }
            Self::Send { pid, source } => return (format!("cannot send the manifest to {}", child(pid)), Some(source)),
            Self::Wait { source } => return ("cannot wait for triggers".into(), Some(source)),
            Self::AlreadyStarted => "this process has started ecdysis already".into(),
            Self::Untrusted { path, uid } => format!("user {uid} listens at {} and is not trusted", path.display()),
            Self::NotHandedOver { path, answer } => {
                format!("the process at {} does not hand over: {answer}", path.display())
            }
            Self::GivenUp => "the parent gave up on this upgrade".into(),
            Self::NotPassed { key, name, passed } => {
                let passed = if passed.is_empty() { "nothing that is unclaimed" } else { passed };
                let why =
                    "it passes sockets only when it starts the service, never to a generation that an upgrade started";
                format!("the service manager did not pass {key} as {name:?}, but {passed} ({why})")
            }
            Self::Busy => "busy: an upgrade is under way".into(),
            Self::NoListener { inherited } => {
                format!("this version asks for none of the listeners of the old one: {inherited}")
            }
            Self::NotReady => "this process is not ready yet".into(),
            Self::Over => "this process has stopped or was replaced".into(),
            Self::StopAsked { pid } => format!("a stop was requested during the upgrade; {} was ended", child(pid)),
            Self::ParentDrains => "an older generation still drains".into(),
            Self::ChildEnded { pid, status } => format!("{} ended before it was ready{}", child(pid), how(status)),
            Self::ChildSilent { pid } => {
                format!("{} closed its status pipe without reporting and was killed", child(pid))
            }
            Self::ChildLivesOn { pid } => {
                format!("{} closed its link but did not end; it may still accept", child(pid))
            }
            Self::Refused { pid, reason } => format!("{} refused: {reason}", child(pid)),
            Self::Timeout { pid, after } => format!("{} was not ready, or did not serve, within {after:?}", child(pid)),
            Self::Garbage { pid, received } => format!("{} sent an invalid message: {received:?}", child(pid)),
            Self::DiedAfterReady { pid, status, after } => {
                format!("{} died {after:?} after it was ready{}", child(pid), how(status))
            }
            Self::ParentLives { after } => format!("the parent has not ended after {after:?}"),
            Self::RefusedHere { reason } => format!("refused to serve: {reason}"),
        };
        (text, None)
    }
}

/// Keeps the kind of the cause, so that programs that expect an `io::Error` can match `AddrInUse`.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let source = error.parts().1.and_then(|source| source.downcast_ref::<io::Error>());
        io::Error::new(source.map_or(io::ErrorKind::Other, io::Error::kind), error)
    }
}
