//! The service manager in the words of version 1.1.1: its client, and what can go wrong.

use std::fmt;
use std::io;
use std::process;
#[cfg(feature = "systemd_notify")]
use std::{ops::Deref, time::Duration};

#[cfg(feature = "systemd_notify")]
use crate::systemd::{Notifier, NotifyError};

/// Talks to the service manager, as [`systemd::Notifier`](crate::systemd::Notifier) does, to which it derefs.
#[cfg(feature = "systemd_notify")]
#[derive(Debug)]
pub struct SystemdNotifier(Notifier);

/// None of these waits longer than two seconds, and that only for a manager that hangs.
///
/// # Errors
///
/// Of each: that the message did not get through.
#[cfg(feature = "systemd_notify")]
impl SystemdNotifier {
    /// The notifier for the address in `NOTIFY_SOCKET`.
    ///
    /// # Errors
    ///
    /// There is none, it is none that we know, or there is no descriptor left for a socket.
    pub fn new() -> Result<Self, SystemdNotifierError> {
        match Notifier::from_env() {
            Ok(Some(notifier)) => Ok(Self(notifier)),
            Ok(None) => Err(SystemdNotifierError::NotifySocketUnset),
            Err(NotifyError::Socket { source }) => Err(SystemdNotifierError::SocketCreateError(source)),
            Err(other) => Err(SystemdNotifierError::SocketConnectError(io::Error::other(other))),
        }
    }

    /// Sends assignments, in one datagram.
    pub async fn notify<'a, I, K, V>(&mut self, states: I) -> io::Result<()>
    where
        I: Iterator<Item = (K, V)>,
        K: AsRef<str> + 'a,
        V: AsRef<str> + 'a,
    {
        let states: Vec<_> = states.collect();
        let states: Vec<_> = states.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
        self.0.notify(&states).map_err(io::Error::other)
    }

    /// `READY=1` and `MAINPID`, of this process.
    pub async fn notify_ready(&mut self) -> io::Result<()> {
        self.notify([("READY", "1"), ("MAINPID", &process::id().to_string())].into_iter()).await
    }

    /// `RELOADING=1`, with the time.
    pub async fn notify_reloading(&mut self) -> io::Result<()> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now = now.tv_sec as i128 * 1_000_000 + now.tv_nsec as i128 / 1000;
        self.notify([("RELOADING", "1"), ("MONOTONIC_USEC", &now.to_string())].into_iter()).await
    }

    /// `STOPPING=1`.
    pub async fn notify_stopping(&mut self) -> io::Result<()> {
        self.notify([("STOPPING", "1")].into_iter()).await
    }

    /// Asks for so much more time, from now on.
    pub async fn notify_extend_timeouts(&mut self, extension: Duration) -> io::Result<()> {
        self.0.extend_timeout(extension).map_err(io::Error::other)
    }
}

#[cfg(feature = "systemd_notify")]
impl Deref for SystemdNotifier {
    type Target = Notifier;

    fn deref(&self) -> &Notifier {
        &self.0
    }
}

/// Why there is no [`SystemdNotifier`].
#[cfg(feature = "systemd_notify")]
#[derive(Debug)]
pub enum SystemdNotifierError {
    /// `NOTIFY_SOCKET` is not set: no service manager has started this, or it does not want to be told.
    NotifySocketUnset,
    /// There is no socket to send with.
    SocketCreateError(io::Error),
    /// The address cannot be used.
    SocketConnectError(io::Error),
}

#[cfg(feature = "systemd_notify")]
impl fmt::Display for SystemdNotifierError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotifySocketUnset => f.write_str("NOTIFY_SOCKET is not set"),
            Self::SocketCreateError(e) => write!(f, "cannot make a socket for the service manager: {e}"),
            Self::SocketConnectError(e) => write!(f, "cannot use NOTIFY_SOCKET: {e}"),
        }
    }
}

#[cfg(feature = "systemd_notify")]
impl std::error::Error for SystemdNotifierError {}

/// Why [`read_systemd_sockets`](super::TokioEcdysisBuilder::read_systemd_sockets) found nothing.
#[cfg(feature = "systemd_sockets")]
#[derive(Debug)]
pub enum SystemdSocketsReadError {
    /// Nothing was passed, or what was passed cannot be used: the variables are absent, malformed, or name what is not
    /// open.
    EnvironmentVariableError(String),
    /// It is for another process.
    DoesNotMatchListenPid,
    /// It was read before.
    DuplicateSystemdSocketsRead,
}

#[cfg(feature = "systemd_sockets")]
impl fmt::Display for SystemdSocketsReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnvironmentVariableError(why) => write!(f, "the service manager passed nothing of use: {why}"),
            Self::DoesNotMatchListenPid => f.write_str("LISTEN_PID names another process"),
            Self::DuplicateSystemdSocketsRead => f.write_str("what the service manager passed was read before"),
        }
    }
}

#[cfg(feature = "systemd_sockets")]
impl std::error::Error for SystemdSocketsReadError {}

/// Whether the service manager passed something to this process.
#[cfg(feature = "systemd_sockets")]
pub(super) fn passed_to_us() -> Result<(), SystemdSocketsReadError> {
    match std::env::var("LISTEN_PID") {
        Ok(pid) if pid == process::id().to_string() => Ok(()),
        Ok(_) => Err(SystemdSocketsReadError::DoesNotMatchListenPid),
        Err(why) => Err(SystemdSocketsReadError::EnvironmentVariableError(format!("LISTEN_PID: {why}"))),
    }
}

/// Why [`systemd_listen_tcp`](super::TokioEcdysis::systemd_listen_tcp) and its like have no socket.
#[cfg(feature = "systemd_sockets")]
#[derive(Debug)]
pub enum SystemdSocketError {
    /// [`read_systemd_sockets`](super::TokioEcdysisBuilder::read_systemd_sockets) was not called, or found nothing.
    SystemdSocketsNotInitialized,
    /// Nothing was passed by this name that is left. The text says what was, here and below.
    SocketNotFoundInParent(String),
    /// The parent did not hand it over.
    SocketNotFoundInChildRegistry(String),
    /// What a system call said.
    IoError(io::Error),
    /// What was passed by this name is another socket.
    SockInfoIncorrect(String),
}

#[cfg(feature = "systemd_sockets")]
impl fmt::Display for SystemdSocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SystemdSocketsNotInitialized => f.write_str("nothing was read that the service manager passed"),
            Self::SocketNotFoundInParent(why) | Self::SocketNotFoundInChildRegistry(why) => f.write_str(why),
            Self::SockInfoIncorrect(why) => f.write_str(why),
            Self::IoError(e) => e.fmt(f),
        }
    }
}

#[cfg(feature = "systemd_sockets")]
impl std::error::Error for SystemdSocketError {}

#[cfg(feature = "systemd_sockets")]
impl From<io::Error> for SystemdSocketError {
    fn from(error: io::Error) -> Self {
        Self::IoError(error)
    }
}
