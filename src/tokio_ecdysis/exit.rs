//! How a generation's service ended, and the future that returns it.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use tokio::signal::unix::SignalKind;
use tokio::sync::oneshot;

#[cfg(feature = "systemd_notify")]
use super::systemd_notify::SystemdNotifier;
use super::thread::thread_ended;
use crate::{Error, Exit};

/// How a generation's service ended.
#[derive(Debug)]
pub enum ExitMode {
    /// A new generation serves.
    Upgrade,
    /// No process serves any more.
    FullStop,
    /// Accepting and triggers have ended; everything else is left to the program.
    PartialStop,
    /// The same, and the service manager has not been notified that this process stops.
    #[cfg(feature = "systemd_notify")]
    PartialStopWithSystemd(SystemdNotifier),
}

/// The source of the request for an upgrade or a stop.
///
/// It has only the two variants of version 1.1.1, so that programs that match both still compile. A request that came
/// neither from a signal nor from a socket has a number that no signal has: [`CALL`](Self::CALL) or
/// [`PARENT`](Self::PARENT).
#[derive(Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// This signal.
    Signal(SignalKind),
    /// A connection to the socket at this path.
    UnixListener(PathBuf),
}

impl ExitReason {
    /// A call of [`TokioEcdysis::upgrade`](super::TokioEcdysis::upgrade) or [`stop`](super::TokioEcdysis::stop).
    pub const CALL: Self = Self::Signal(SignalKind::from_raw(0));
    /// The parent: it forwarded a request during this process's probation, or took the service back.
    pub const PARENT: Self = Self::Signal(SignalKind::from_raw(-1));
}

impl fmt::Debug for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            &Self::CALL => f.write_str("Call"),
            &Self::PARENT => f.write_str("Parent"),
            Self::Signal(signal) => f.debug_tuple("Signal").field(signal).finish(),
            Self::UnixListener(path) => f.debug_tuple("UnixListener").field(path).finish(),
        }
    }
}

/// The output of the future of [`TokioEcdysisBuilder::ready`](super::TokioEcdysisBuilder::ready).
pub type TokioEcdysisUpgradeResult = Result<(ExitMode, ExitReason), Error>;

/// For the `?` of programs that return the error of 1.1.1, a `String`.
impl From<Error> for String {
    fn from(error: Error) -> Self {
        error.to_string()
    }
}

/// Resolves when this generation's service has ended, see
/// [`TokioEcdysisBuilder::ready`](super::TokioEcdysisBuilder::ready).
#[derive(Debug)]
pub struct ExitFuture {
    pub(super) exit: oneshot::Receiver<Result<Exit, Error>>,
    #[cfg(feature = "systemd_notify")]
    pub(super) notifier: Option<SystemdNotifier>,
}

impl Future for ExitFuture {
    /// The mode and the reason. After an [`Error::Wait`] no trigger is handled any more, but the service continues.
    type Output = TokioEcdysisUpgradeResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Exit { mode, reason } = ready!(Pin::new(&mut self.exit).poll(cx)).map_err(thread_ended)??;
        #[cfg(feature = "systemd_notify")]
        if let (crate::ExitMode::PartiallyStopped, Some(notifier)) = (&mode, self.notifier.take()) {
            return Poll::Ready(Ok((ExitMode::PartialStopWithSystemd(notifier), reason.into())));
        }
        Poll::Ready(Ok((mode.into(), reason.into())))
    }
}

impl From<crate::ExitMode> for ExitMode {
    fn from(mode: crate::ExitMode) -> Self {
        match mode {
            crate::ExitMode::Upgraded(_) => Self::Upgrade,
            crate::ExitMode::Stopped => Self::FullStop,
            crate::ExitMode::PartiallyStopped => Self::PartialStop,
        }
    }
}

impl From<crate::ExitReason> for ExitReason {
    fn from(reason: crate::ExitReason) -> Self {
        match reason {
            crate::ExitReason::Signal(signal) => Self::Signal(SignalKind::from_raw(signal)),
            crate::ExitReason::Socket(path) => Self::UnixListener(path),
            crate::ExitReason::Call => Self::CALL,
            crate::ExitReason::Parent => Self::PARENT,
        }
    }
}
