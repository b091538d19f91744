//! The client of the service manager under its name of version 1.1.1.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::process;
use std::time::Duration;

use crate::sys::clock::monotonic_usec;
use crate::systemd::{Notifier, NotifyError};

/// Sends notifications to the service manager. It derefs to [`systemd::Notifier`](crate::systemd::Notifier).
#[derive(Debug)]
pub struct SystemdNotifier(Notifier);

/// Each call blocks for at most two seconds, and only if the manager hangs. It fails if the message was not sent.
impl SystemdNotifier {
    /// Returns a notifier for the address in `NOTIFY_SOCKET`.
    ///
    /// # Errors
    ///
    /// The variable is not set, its address is of an unknown kind, or no descriptor is left for a socket.
    pub fn new() -> Result<Self, SystemdNotifierError> {
        match Notifier::from_env() {
            Ok(Some(notifier)) => Ok(Self(notifier)),
            Ok(None) => Err(SystemdNotifierError::NotifySocketUnset),
            Err(NotifyError::Socket { source }) => Err(SystemdNotifierError::SocketCreateError(source)),
            Err(other) => Err(SystemdNotifierError::SocketConnectError(io::Error::other(other))),
        }
    }

    /// Sends assignments in one datagram.
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

    /// Sends `READY=1` and `MAINPID` with the PID of this process.
    pub async fn notify_ready(&mut self) -> io::Result<()> {
        self.notify([("READY", "1"), ("MAINPID", &process::id().to_string())].into_iter()).await
    }

    /// Sends `RELOADING=1` with the time.
    pub async fn notify_reloading(&mut self) -> io::Result<()> {
        self.notify([("RELOADING", "1"), ("MONOTONIC_USEC", &monotonic_usec().to_string())].into_iter()).await
    }

    /// Sends `STOPPING=1`.
    pub async fn notify_stopping(&mut self) -> io::Result<()> {
        self.notify([("STOPPING", "1")].into_iter()).await
    }

    /// Asks the manager to extend the current timeout to `extension` from now.
    pub async fn notify_extend_timeouts(&mut self, extension: Duration) -> io::Result<()> {
        self.0.extend_timeout(extension).map_err(io::Error::other)
    }
}

impl Deref for SystemdNotifier {
    type Target = Notifier;

    fn deref(&self) -> &Notifier {
        &self.0
    }
}

/// Why there is no [`SystemdNotifier`].
#[derive(Debug)]
pub enum SystemdNotifierError {
    /// `NOTIFY_SOCKET` is not set: no service manager started this process, or it expects no notifications.
    NotifySocketUnset,
    /// The socket to send with could not be created.
    SocketCreateError(io::Error),
    /// The address cannot be used.
    SocketConnectError(io::Error),
}

impl fmt::Display for SystemdNotifierError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotifySocketUnset => f.write_str("NOTIFY_SOCKET is not set"),
            Self::SocketCreateError(e) => write!(f, "cannot create a socket for the service manager: {e}"),
            Self::SocketConnectError(e) => write!(f, "cannot use NOTIFY_SOCKET: {e}"),
        }
    }
}

impl std::error::Error for SystemdNotifierError {}
