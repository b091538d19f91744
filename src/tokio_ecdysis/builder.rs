//! A generation that does not serve yet.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::path::Path;
#[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
use std::sync::atomic::Ordering;
use std::sync::{mpsc, Arc};

use tokio::signal::unix::SignalKind;

use super::exit::ExitFuture;
use super::handle::TokioEcdysis;
#[cfg(feature = "systemd_notify")]
use super::systemd_notify::{SystemdNotifier, SystemdNotifierError};
#[cfg(feature = "systemd_sockets")]
use super::systemd_sockets::{passed_to_us, SystemdSocketsReadError};
use super::thread::in_thread;
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
use crate::start;
use crate::triggers::control::Purpose;
use crate::triggers::request::Action;
use crate::{Builder, Ecdysis, Error, Starting};

/// A generation that does not serve yet.
///
/// Choose triggers, PID file and sockets in any order. Dropping the builder gives up: its streams end without having
/// yielded anything, and in a child the parent is notified and continues to serve.
pub struct TokioEcdysisBuilder {
    starting: Starting,
    tokio_ecdysis: TokioEcdysis,
    #[cfg(feature = "systemd_notify")]
    notifier: Option<SystemdNotifier>,
}

impl TokioEcdysisBuilder {
    /// Starts with one trigger: this signal requests an upgrade. In a child this adopts the parent's handover. Every
    /// other choice is the default of [`Builder`]. To use your own choices, call [`from_builder`](Self::from_builder).
    ///
    /// # Errors
    ///
    /// As for [`Builder::start`].
    pub fn new(upgrade_signal_kind: SignalKind) -> io::Result<Self> {
        Ok(Self::from_builder(Builder::new().upgrade_on_signal(upgrade_signal_kind.as_raw_value()))?)
    }

    /// Starts with the choices of a [`Builder`]: deadlines, probation, the next generation's program and environment, a
    /// control socket that answers with the outcome, an observer of events.
    ///
    /// ```
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// use ecdysis::tokio_ecdysis::TokioEcdysisBuilder;
    /// let mut choices = ecdysis::Builder::new();
    /// choices.upgrade_on_signal(1).probation(std::time::Duration::from_secs(5));
    /// let builder = TokioEcdysisBuilder::from_builder(&mut choices)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`Builder::start`].
    pub fn from_builder(builder: &mut Builder) -> Result<Self, Error> {
        let starting = builder.start()?;
        // Before `ready` this handle refuses upgrades.
        let tokio_ecdysis = TokioEcdysis { ecdysis: Ecdysis(starting.0.clone()) };
        Ok(Self {
            starting,
            tokio_ecdysis,
            #[cfg(feature = "systemd_notify")]
            notifier: None,
        })
    }

    /// Also upgrades when this signal is delivered.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`] if it cannot be handled.
    pub fn upgrade_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::Upgrade)
    }

    /// Stops when this signal is delivered. May be called for several. A stop during an upgrade ends the child.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`] if it cannot be handled.
    pub fn stop_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::Stop)
    }

    /// Ends accepting and the triggers when this signal is delivered, and leaves everything else to the program, see
    /// [`Builder::partial_stop_on_signal`].
    ///
    /// # Errors
    ///
    /// [`Error::Signal`] if it cannot be handled.
    pub fn partial_stop_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::PartialStop)
    }

    fn on_signal(&self, kind: SignalKind, action: Action) -> io::Result<()> {
        Ok(self.starting.add_signal(kind.as_raw_value(), action)?)
    }

    /// Upgrades when a peer connects to this Unix socket, and answers with the outcome, see
    /// [`Builder::upgrade_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2).
    pub fn upgrade_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::Upgrade))
    }

    /// Stops when a peer connects to this Unix socket, see [`Builder::stop_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2).
    pub fn stop_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::Stop))
    }

    /// Stops partially when a peer connects to this Unix socket, see [`Builder::partial_stop_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2).
    pub fn partial_stop_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::PartialStop))
    }

    /// One socket for every command, which is the first line of a connection, see [`Builder::control_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2).
    pub fn control_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Command)
    }

    /// Hands everything over to a process that connects to this Unix socket and asks for it, see
    /// [`Builder::takeover_on_socket`]. A program takes over with [`Builder::take_over`] and
    /// [`from_builder`](Self::from_builder).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2).
    pub fn takeover_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Takeover)
    }

    fn on_socket(&self, path: &Path, purpose: Purpose) -> io::Result<()> {
        Ok(self.starting.add_socket(path, purpose)?)
    }

    /// Keeps the serving process's PID in this file, see [`Builder::pid_file`].
    pub fn set_pid_file<P: AsRef<Path>>(&mut self, pid_file: P) {
        self.starting.0.generation.pid_file.set(pid_file.as_ref());
    }

    /// Serves from now on: the streams begin to yield. In a child this blocks until the parent has stopped accepting, which
    /// takes less than a millisecond, or 5 seconds if the parent hangs.
    ///
    /// The future resolves when the service has ended. The streams then end, and the program finishes its open connections. A
    /// thread of the library waits for the triggers and performs the upgrades, so the runtime and an upgrade never delay
    /// each other. Dropping the future changes nothing, except that the reason is lost. It needs no runtime.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`], or [`Error::Prepare`] if no thread can be started: this generation does not
    /// serve, and the parent does.
    pub fn ready(self) -> io::Result<(Arc<TokioEcdysis>, ExitFuture)> {
        let (sender, receiver) = mpsc::sync_channel::<Ecdysis>(1);
        // Start the thread first: if that fails, nothing was sent to the parent yet.
        let exit = in_thread("ecdysis", move || match receiver.recv() {
            Ok(ecdysis) => ecdysis.run(),
            Err(_) => Err(Error::NotReady),
        })?;
        let ecdysis = self.starting.ready()?;
        let _ = sender.send(ecdysis);
        let future = ExitFuture {
            exit,
            #[cfg(feature = "systemd_notify")]
            notifier: self.notifier,
        };
        Ok((Arc::new(self.tokio_ecdysis), future))
    }

    /// Notifies the service manager of what this generation does, see [`Builder::systemd_notify`].
    ///
    /// # Errors
    ///
    /// There is no service manager (`NOTIFY_SOCKET` is not set), or its address is of an unknown kind. A program that also
    /// runs without one can ignore this.
    #[cfg(feature = "systemd_notify")]
    pub fn enable_systemd_notifications(&mut self) -> Result<(), SystemdNotifierError> {
        let notifier = SystemdNotifier::new()?;
        let enabled = start::enable_manager(&self.starting.0.generation);
        enabled.map_err(|e| SystemdNotifierError::SocketConnectError(e.into()))?;
        self.notifier = Some(notifier);
        Ok(())
    }

    /// Adopts the sockets that the service manager passed: those of its units, and, if notifications are enabled too,
    /// those of its store, see [`Builder::systemd_sockets`]. Call this before asking for any of them. In a child this
    /// does nothing, because its parent has handed them over.
    ///
    /// # Errors
    ///
    /// Nothing was passed, it cannot be used, or this is the second call. A program that also runs without a service
    /// manager can ignore this.
    #[cfg(feature = "systemd_sockets")]
    pub fn read_systemd_sockets(&mut self) -> Result<(), SystemdSocketsReadError> {
        let inherited = start::inherit_from_manager(&self.starting.0.generation);
        let first = inherited.map_err(|e| SystemdSocketsReadError::EnvironmentVariableError(e.to_string()))?;
        if self.is_child() {
            return Ok(());
        }
        passed_to_us()?;
        first.then_some(()).ok_or(SystemdSocketsReadError::DuplicateSystemdSocketsRead)
    }

    /// Sets whether a stop passes state, streams and descriptors to the next start of the service, see
    /// [`Builder::systemd_keep_passed`]. It needs both of the methods above, and `FileDescriptorStoreMax=` in the unit.
    /// Default: no.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// use ecdysis::tokio_ecdysis::{SignalKind, TokioEcdysisBuilder};
    /// let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    /// // Both fail without a service manager. The second also fails if the manager passes nothing yet.
    /// let _ = builder.enable_systemd_notifications();
    /// let _ = builder.read_systemd_sockets();
    /// builder.systemd_keep_passed(true);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
    pub fn systemd_keep_passed(&mut self, on: bool) {
        self.starting.0.generation.keep_passed.store(on, Ordering::Relaxed);
    }

    /// Refuses to serve, with a reason for the operator, see [`Starting::refuse`]. Return the error from `main`.
    pub fn refuse(self, reason: impl fmt::Display) -> Error {
        self.starting.refuse(reason)
    }
}

/// Ask for sockets before `ready`: those that are not claimed by then are closed.
impl Deref for TokioEcdysisBuilder {
    type Target = TokioEcdysis;

    fn deref(&self) -> &TokioEcdysis {
        &self.tokio_ecdysis
    }
}

impl fmt::Debug for TokioEcdysisBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioEcdysisBuilder").field("generation", &self.generation()).finish_non_exhaustive()
    }
}
