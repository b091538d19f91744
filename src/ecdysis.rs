//! Builder, starting and running state, and the loop that waits for triggers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::Mode;

use crate::error::{chain, Error};
use crate::event::Event;
use crate::handover::escape::escape;
use crate::handover::frames::{send, Status, Word};
use crate::handover::link::Transport;
use crate::key::Key;
use crate::manager::{Manager, ANNOUNCE};
use crate::pid_file;
use crate::program::{Changes, Program};
use crate::shutdown::{Shutdown, State};
use crate::sockets::{Held, Sockets};
use crate::sys::peer::PeerCred;
use crate::sys::signal::{self, Handlers, Mask};
use crate::sys::spawn::Spawn;
use crate::takeover::{TakeoverSocket, Trust};
use crate::trigger::{self, Action, Calls, ControlSocket, Meaning, Outcome, Reply, Request, Triggers};
use crate::upgrade::{self, Announced, DrainLink, Inherited, Parent};

/// Chooses triggers, deadlines, and what the next generation runs. Nothing happens before [`start`](Self::start).
///
/// ```
/// # fn main() -> Result<(), ecdysis::Error> {
/// use std::time::Duration;
/// # const SIGHUP: i32 = 1;
/// # const SIGTERM: i32 = 15;
/// let starting = ecdysis::Ecdysis::builder()
///     .upgrade_on_signal(SIGHUP) // from the libc crate
///     .stop_on_signal(SIGTERM)
///     .ready_timeout(Duration::from_secs(20))
///     .start()?;
/// assert!(!starting.is_child());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Builder {
    signals: Vec<(i32, Action)>,
    sockets: Vec<(PathBuf, Meaning)>,
    changes: Changes,
    config: Config,
}

/// What the builder chose and the running process needs.
#[derive(Clone)]
pub(crate) struct Config {
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) ready_timeout: Duration,
    pub(crate) probation: Duration,
    pub(crate) spawn: Spawn,
    pub(crate) transport: Transport,
    /// Where the running process listens that this one is to take over from.
    pub(crate) take_over: Option<PathBuf>,
    pub(crate) trust: Trust,
    overlap: Overlap,
    observer: Option<Observer>,
    #[cfg(feature = "systemd_notify")]
    systemd_notify: bool,
    #[cfg(feature = "systemd_sockets")]
    systemd_sockets: bool,
}

type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// What happens when an upgrade is asked for while an older generation still drains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overlap {
    /// The upgrade goes ahead; any number of generations may drain.
    #[default]
    Allow,
    /// The upgrade fails with [`Error::ParentDrains`].
    Refuse,
    /// The upgrade goes ahead; when it has succeeded, the oldest generations beyond this many are told to end their
    /// [`drain`](Shutdown::drain), which then returns early. This process, which begins to drain, counts as one.
    AtMost(usize),
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// No triggers, 60 seconds to be ready, one second of probation.
    pub fn new() -> Self {
        Self {
            signals: Vec::new(),
            sockets: Vec::new(),
            changes: Changes::default(),
            config: Config {
                pid_file: None,
                ready_timeout: Duration::from_secs(60),
                probation: Duration::from_secs(1),
                spawn: Spawn::default(),
                transport: Transport::default(),
                take_over: None,
                trust: Arc::new(PeerCred::is_same_user_or_root),
                overlap: Overlap::default(),
                observer: None,
                #[cfg(feature = "systemd_notify")]
                systemd_notify: false,
                #[cfg(feature = "systemd_sockets")]
                systemd_sockets: false,
            },
        }
    }

    /// Upgrades when this signal comes (signal(7)); SIGHUP is customary. May be called for several. A signal during an
    /// upgrade asks for nothing more.
    pub fn upgrade_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::Upgrade)
    }

    /// Stops when this signal comes; SIGTERM is customary. During an upgrade the stop wins: the child is ended first.
    pub fn stop_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::Stop)
    }

    /// Ends accepting and the triggers when this signal comes, and leaves the rest to the program: PID file and socket
    /// files stay, but those of control sockets, which nobody answers any more.
    pub fn partial_stop_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::PartialStop)
    }

    fn on_signal(&mut self, signal: i32, action: Action) -> &mut Self {
        self.signals.push((signal, action));
        self
    }

    /// Upgrades when somebody connects to this Unix socket, which is made with mode 0600 and takes only the same user
    /// and root. The connection stays open until the upgrade is over, and then gets one line:
    /// `upgraded pid=… generation=… ms=…`, `failed: …`, `busy` or `stopping`.
    pub fn upgrade_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Meaning::Connect(Action::Upgrade))
    }

    /// Stops when somebody connects to this Unix socket. The connection gets the line `stopping`, and closes when this
    /// process ends.
    pub fn stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Meaning::Connect(Action::Stop))
    }

    /// As [`partial_stop_on_signal`](Self::partial_stop_on_signal), when somebody connects to this Unix socket.
    pub fn partial_stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Meaning::Connect(Action::PartialStop))
    }

    /// One socket for all: the first line of a connection says `upgrade`, `stop`, `partial-stop` or `status`, within 5
    /// seconds. Otherwise as [`upgrade_on_socket`](Self::upgrade_on_socket).
    ///
    /// The answer to `status` is one line of `key=value` words: `pid`, `generation`, `uptime_ms`, `phase` (`serving`,
    /// `upgrading`, `probation`), `connections` that hold a guard, `draining` generations, separated by commas, and a
    /// `socket` for each in the registry, percent-escaped.
    pub fn control_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Meaning::Command)
    }

    /// Hands everything over to a process that connects to this Unix socket and asks, as a process built with
    /// [`take_over`](Self::take_over) does. It need not be a child of this one, nor run in the same container.
    ///
    /// The socket is made with mode 0600 and takes only the same user and root, unless
    /// [`trust_peers`](Self::trust_peers) says otherwise. All that holds for an upgrade holds for this one: `ready`
    /// commits it, the deadline, the probation, the events and the errors are the same. One thing differs: a process that
    /// fails is not killed, since it is somebody else's, but told that this one goes on serving.
    ///
    /// The socket itself goes over too, so the next takeover finds the next generation at the same path. Programs that do
    /// not call [`run`](Ecdysis::run) use [`Sockets::listen_takeover`] instead.
    pub fn takeover_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Meaning::Takeover)
    }

    fn on_socket(&mut self, path: &Path, meaning: Meaning) -> &mut Self {
        self.sockets.push((path.to_owned(), meaning));
        self
    }

    /// Keeps the serving process's PID in this file, mode 0644. It is written at `ready`, by rename, and removed at a
    /// final stop if it is still ours. A relative path is resolved at each write.
    pub fn pid_file(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.config.pid_file = Some(path.as_ref().to_owned());
        self
    }

    /// The program that the next generation runs. A relative path starts at the directory of this process's start; no
    /// link is followed. Default: what `argv[0]` means, resolved at [`start`](Self::start) in the same way.
    pub fn exec(&mut self, program: impl AsRef<Path>) -> &mut Self {
        self.changes.exec = Some(program.as_ref().to_owned());
        self
    }

    /// The next generation's arguments, without `argv[0]`. Default: this one's.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.changes.args = Some(args.into_iter().map(Into::into).collect());
        self
    }

    /// Sets a variable in the next generation's environment, which is otherwise this one's at the time of the upgrade.
    pub fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.environment().insert(name.into(), Some(value.into()));
        self
    }

    /// Leaves a variable out of the next generation's environment.
    pub fn env_remove(&mut self, name: impl Into<OsString>) -> &mut Self {
        self.environment().insert(name.into(), None);
        self
    }

    fn environment(&mut self) -> &mut BTreeMap<OsString, Option<OsString>> {
        &mut self.changes.env
    }

    /// Where the next generation starts. Default: where this one started, or, if that directory is gone, where it is.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.changes.directory = Some(path.as_ref().to_owned());
        self
    }

    /// How long a child may take from the trigger to its `ready`. Then it is killed, and the upgrade has failed.
    /// Default: 60 seconds.
    pub fn ready_timeout(&mut self, time: Duration) -> &mut Self {
        self.config.ready_timeout = time;
        self
    }

    /// How long a child must live after its `ready` before the upgrade has succeeded. Meanwhile this process accepts
    /// nothing but keeps its sockets; if the child dies, it accepts again, and the upgrade has failed. Default: one
    /// second. Zero: no probation.
    pub fn probation(&mut self, time: Duration) -> &mut Self {
        self.config.probation = time;
        self
    }

    /// How the child is made.
    pub fn spawn(&mut self, spawn: Spawn) -> &mut Self {
        self.config.spawn = spawn;
        self
    }

    /// What carries a handover to a child.
    pub fn transport(&mut self, transport: Transport) -> &mut Self {
        self.config.transport = transport;
        self
    }

    /// Takes over from the process that listens at this Unix socket, see
    /// [`takeover_on_socket`](Self::takeover_on_socket). If nobody listens there, this process is a first generation. A
    /// process that an upgrade started ignores this: it has a parent.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = std::env::temp_dir().join(format!("take-over-{}", std::process::id()));
    /// # std::fs::create_dir_all(&dir)?;
    /// # let path = dir.join("socket");
    /// // The same two lines in every version: whoever comes second takes over from the first.
    /// let starting = ecdysis::Ecdysis::builder().take_over(&path).takeover_on_socket(&path).start()?;
    /// let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    /// let server = starting.ready()?;
    /// # server.stop();
    /// # std::fs::remove_dir(&dir)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_over(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.config.take_over = Some(path.as_ref().to_owned());
        self
    }

    /// Who may be at the other end of a takeover socket, on either side. Default:
    /// [`PeerCred::is_same_user_or_root`]. For another user to get as far as being asked about, the socket file must let
    /// it in; its mode is 0600 until the program changes it.
    pub fn trust_peers(&mut self, trust: impl Fn(&PeerCred) -> bool + Send + Sync + 'static) -> &mut Self {
        self.config.trust = Arc::new(trust);
        self
    }

    /// What happens when an upgrade is asked for while an older generation still drains.
    pub fn overlap(&mut self, overlap: Overlap) -> &mut Self {
        self.config.overlap = overlap;
        self
    }

    /// Calls `observer` at every [`Event`], in the thread that waits for triggers: it must return soon, and must not
    /// call [`Ecdysis::upgrade`].
    pub fn on_event(&mut self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> &mut Self {
        self.config.observer = Some(Arc::new(observer));
        self
    }

    /// Tells the service manager that started this process (`NOTIFY_SOCKET`) when it serves, upgrades, whether that
    /// succeeded and to which process, and when it stops; keeps its watchdog content; asks for more time while a stop
    /// makes progress. Off by default. Without a service manager nothing happens.
    ///
    /// All of it works with the default `NotifyAccess=main`: each generation announces the next. The signs of life
    /// come from [`Ecdysis::run`], so a process that does not get back to it for as long as `WatchdogSec=` is ended. See
    /// the [guide](crate::guide::systemd).
    ///
    /// # Errors
    ///
    /// [`start`](Self::start) fails with [`Error::ServiceManager`] if the address in `NOTIFY_SOCKET` cannot be used.
    #[cfg(feature = "systemd_notify")]
    pub fn systemd_notify(&mut self, on: bool) -> &mut Self {
        self.config.systemd_notify = on;
        self
    }

    /// Takes the sockets that the service manager passes to this process (`LISTEN_FDS`): those of its socket units, and,
    /// together with `systemd_notify`, those that an earlier run left in its store
    /// (`FileDescriptorStoreMax=`). Off by default. `listen_tcp` and its like then find them by their addresses, as they
    /// find those of a parent.
    ///
    /// Where several know the same address, the order is: the parent's sockets, those of the store, those of units. What
    /// is in the store and not asked for before `ready` is closed and forgotten. What a unit passed and nobody asks for
    /// stays, for the next generation to ask for.
    ///
    /// No other code of the program may take the descriptors passed.
    ///
    /// # Errors
    ///
    /// [`start`](Self::start) fails with [`Error::ServiceManager`] if the variables are malformed or name what is not
    /// open.
    #[cfg(feature = "systemd_sockets")]
    pub fn systemd_sockets(&mut self, on: bool) -> &mut Self {
        self.config.systemd_sockets = on;
        self
    }

    /// Starts: takes over what the parent handed over, if there is one, handles the chosen signals, opens the control
    /// sockets. Call it early, before other threads run and before descriptors are opened.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyStarted`], [`Error::Signal`], [`Error::Socket`] for a control socket, [`Error::Handover`]. An
    /// error in a child fails the upgrade: return it from `main`, and the parent serves on.
    pub fn start(&mut self) -> Result<Starting, Error> {
        let started = Started::claim().ok_or(Error::AlreadyStarted)?;
        let prepare = |what| move |source| Error::Prepare { what, source };
        // First of all, because these are as the parent made them only now.
        let mask = signal::mask().map_err(prepare("signal mask"))?;
        let program = Program::resolve(&self.changes);
        let inherited = upgrade::inherit(&self.config)?;
        let (generation, sockets, parent, older) = match inherited {
            Some(Inherited { generation, sockets, parent, older }) => (generation + 1, sockets, Some(parent), older),
            None => (1, Vec::new(), None, Vec::new()),
        };

        signal::wake_fd().map_err(prepare("wake descriptor"))?;
        let mut handlers = Handlers::default();
        for &(signal, _) in &self.signals {
            handlers.install(signal).map_err(|source| Error::Signal { signal, source })?;
        }
        let manager = self.config.manager(generation, parent.is_some())?.map(Arc::new);
        let sockets = self.config.sockets(sockets)?;
        let mut control = Vec::new();
        for (path, meaning) in &self.sockets {
            let listener = sockets.listen_unix_with_mode(path, Some(Mode::RUSR | Mode::WUSR))?;
            control.push(ControlSocket { path: path.clone(), listener, meaning: *meaning });
        }
        let shutdown = Shutdown::new().map_err(prepare("shutdown handle"))?;
        if let Some(manager) = &manager {
            shutdown.report_to(manager.clone());
        }
        let calls = Arc::new(Calls::default());
        let triggers = Triggers::new(self.signals.clone(), handlers, control, self.config.trust.clone(), calls.clone());
        Ok(Starting(Arc::new(Core {
            config: self.config.clone(),
            program,
            mask,
            generation,
            began: Instant::now(),
            sockets,
            shutdown,
            manager: manager.map(OnceLock::from).unwrap_or_default(),
            takes_sockets: AtomicBool::new(self.config.takes_sockets()),
            parent,
            older,
            calls,
            pid_file: Mutex::new(self.config.pid_file.clone()),
            driver: Mutex::new(Driver { triggers: Some(triggers), exit: None, stop: None }),
            changed: Condvar::new(),
            kept: Mutex::default(),
            _started: started,
        })))
    }
}

impl Config {
    /// The service manager, if the program wants to know of it.
    fn manager(&self, generation: u64, is_child: bool) -> Result<Option<Manager>, Error> {
        #[cfg(feature = "systemd_notify")]
        if self.systemd_notify {
            let upgrade_time = self.ready_timeout.saturating_add(self.probation);
            let manager = Manager::from_env(generation, is_child, upgrade_time)?;
            return Ok(Some(manager).filter(Manager::is_there));
        }
        let _ = (generation, is_child);
        Ok(None)
    }

    fn takes_sockets(&self) -> bool {
        #[cfg(feature = "systemd_sockets")]
        return self.systemd_sockets;
        #[cfg(not(feature = "systemd_sockets"))]
        false
    }

    /// What is inherited: from the parent, and then from the service manager.
    fn sockets(&self, from_parent: Vec<(Key, Held)>) -> Result<Sockets, Error> {
        #[cfg(feature = "systemd_sockets")]
        if self.systemd_sockets {
            let passed = crate::systemd::sockets::inherit()?;
            let sockets = Sockets::new(from_parent.into_iter().chain(passed.sockets).collect());
            sockets.forget_later(passed.stale);
            return Ok(sockets);
        }
        Ok(Sockets::new(from_parent))
    }
}

/// There is one start at a time in a process: signals are the process's, and so is the handover.
struct Started;

static STARTED: AtomicBool = AtomicBool::new(false);

impl Started {
    fn claim() -> Option<Self> {
        (!STARTED.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        STARTED.store(false, Ordering::Release);
    }
}

/// A generation that does not serve yet: it claims or makes its sockets, reads its configuration, warms up. A parent,
/// if there is one, serves meanwhile.
///
/// Dropping it gives up: in a child, the parent hears of it and serves on.
pub struct Starting(Arc<Core>);

impl Starting {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.parent.is_some()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// The handle through which this generation accepts, once it is ready.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
    }

    /// Serves from here on. In a child: closes what was inherited and not claimed, writes the PID file, tells the
    /// parent, and returns when the parent has stopped accepting. If the parent is dead, or does not answer within 5
    /// seconds, this process serves without it.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`]: this generation does not serve, and the parent does.
    pub fn ready(self) -> Result<Ecdysis, Error> {
        if let Err(error) = upgrade::ready(&self.0) {
            self.0.tell_parent(&Status::Refused(chain(&error)));
            return Err(error);
        }
        self.0.shutdown.set(State::Accepting);
        if self.0.is_main() {
            self.0.store_sockets();
        }
        self.0.emit(&Event::Serving { generation: self.0.generation });
        // From here `Starting` has nothing left to give up.
        Ok(Ecdysis(self.0.clone()))
    }

    /// Refuses to serve, in words for an operator: the parent's upgrade fails with [`Error::Refused`] and this reason.
    /// Return the error from `main`.
    ///
    /// ```
    /// # fn config() -> Result<(), std::num::ParseIntError> { Ok(()) }
    /// fn main() -> Result<(), Box<dyn std::error::Error>> {
    ///     let starting = ecdysis::Ecdysis::builder().start()?;
    ///     if let Err(e) = config() {
    ///         return Err(starting.refuse(format!("config: {e}")).into());
    ///     }
    ///     starting.ready()?;
    ///     Ok(())
    /// }
    /// ```
    pub fn refuse(self, reason: impl fmt::Display) -> Error {
        let reason = reason.to_string();
        self.0.tell_parent(&Status::Refused(reason.clone()));
        Error::RefusedHere { reason }
    }
}

/// For the asynchronous face: its builder starts first, and hears of triggers later.
#[cfg(feature = "tokio_ecdysis")]
impl Starting {
    /// The handle that this generation will have. Before `ready` it upgrades nothing.
    pub(crate) fn handle(&self) -> Ecdysis {
        Ecdysis(self.0.clone())
    }

    pub(crate) fn add_signal(&self, signal: i32, action: Action) -> Result<(), Error> {
        match &mut self.0.lock().triggers {
            Some(triggers) => triggers.add_signal(signal, action).map_err(|source| Error::Signal { signal, source }),
            None => Err(Error::Busy),
        }
    }

    pub(crate) fn add_socket(&self, path: &Path, meaning: Meaning) -> Result<(), Error> {
        let listener = self.0.sockets.listen_unix_with_mode(path, Some(Mode::RUSR | Mode::WUSR))?;
        match &mut self.0.lock().triggers {
            Some(triggers) => triggers.add_socket(ControlSocket { path: path.to_owned(), listener, meaning }),
            None => return Err(Error::Busy),
        }
        Ok(())
    }

    /// Has the service manager, if there is one, hear of this generation.
    #[cfg(feature = "systemd_notify")]
    pub(crate) fn enable_manager(&self) -> Result<(), Error> {
        let config = Config { systemd_notify: true, ..self.0.config.clone() };
        if self.0.manager.get().is_none() {
            if let Some(manager) = config.manager(self.0.generation, self.is_child())?.map(Arc::new) {
                self.0.shutdown.report_to(manager.clone());
                let _ = self.0.manager.set(manager);
            }
        }
        Ok(())
    }

    /// Takes what the service manager passed. False if that was done before.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn inherit_from_manager(&self) -> Result<bool, Error> {
        if self.0.takes_sockets.swap(true, Ordering::Relaxed) {
            return Ok(false);
        }
        let passed = crate::systemd::sockets::inherit()?;
        self.0.sockets.inherit_more(passed.sockets);
        self.0.sockets.forget_later(passed.stale);
        Ok(true)
    }

    pub(crate) fn set_pid_file(&self, path: &Path) {
        *self.0.pid_file.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    }
}

impl Deref for Starting {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.sockets
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // After `ready` there are two owners.
        if self.0.shutdown.state() == State::Starting {
            self.0.shutdown.set(State::HandedOver);
        }
    }
}

/// A generation that serves. A clone is the same one.
#[derive(Clone)]
pub struct Ecdysis(Arc<Core>);

/// A successful upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Upgraded {
    /// The process that serves now.
    pub pid: u32,
    /// Its generation.
    pub generation: u64,
    /// The time from the trigger to the moment from which it served.
    pub commit: Duration,
}

/// Why [`Ecdysis::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exit {
    /// What happened.
    pub mode: ExitMode,
    /// What asked for it.
    pub reason: ExitReason,
}

/// How a generation's service ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitMode {
    /// A new generation serves.
    Upgraded(Upgraded),
    /// Nobody serves any more.
    Stopped,
    /// Accepting and triggers have ended; the rest is the program's.
    PartiallyStopped,
}

/// What asked for an upgrade or a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// This signal.
    Signal(i32),
    /// A connection to this control socket.
    Socket(PathBuf),
    /// [`Ecdysis::upgrade`] or [`Ecdysis::stop`].
    Call,
    /// The parent, which was asked to stop during this process's probation.
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
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Socket(path) => write!(f, "socket {}", path.display()),
            Self::Call => write!(f, "a call"),
            Self::Parent => write!(f, "the parent"),
        }
    }
}

impl Ecdysis {
    /// Begins with the choices.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.parent.is_some()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// The handle through which this generation accepts.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
    }

    /// Waits for triggers, in one poll, and does what they ask for. After a failed upgrade it goes on. Returns when
    /// this generation's service is over: accepting has ended, and it is time to [`drain`](Shutdown::drain).
    ///
    /// A second call, or one after [`upgrade`](Self::upgrade) or [`stop`](Self::stop) ended the service, returns the
    /// same.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] before `ready`, where an asynchronous program has this handle already. [`Error::Wait`] if the poll itself fails. The service goes on, without triggers.
    pub fn run(&self) -> Result<Exit, Error> {
        let core = &*self.0;
        if core.shutdown.state() == State::Starting {
            return Err(Error::NotReady);
        }
        let mut driver = core.lock();
        loop {
            if let Some(exit) = &driver.exit {
                return Ok(exit.clone());
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    let mut turn = Turn { core, triggers: Some(triggers) };
                    while !turn.serve()? {}
                    drop(turn);
                    driver = core.lock();
                }
                // Another thread upgrades; it gives the triggers back.
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Upgrades now, from any thread, and waits for the verdict: after the probation of the child. If `run` runs in
    /// another thread, that does the work and then returns too.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let server = ecdysis::Ecdysis::builder().start()?.ready()?;
    /// match server.upgrade() {
    ///     Ok(new) => println!("pid {} serves", new.pid),
    ///     Err(e) => println!("{e}; this process serves on"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Whatever failed, this process serves on as before; [`Error::Busy`] during another upgrade, [`Error::NotReady`]
    /// before `ready`, [`Error::Over`] when this process's service has ended.
    pub fn upgrade(&self) -> Result<Upgraded, Error> {
        self.wait_upgraded(Reply::Call)
    }

    /// Hands over to the process that has connected to `socket` and asks to take over; for programs with a loop of their
    /// own. Otherwise as [`upgrade`](Self::upgrade), which does the same with a child. `None` if nobody has connected, or
    /// nobody who may take over and asks within 5 seconds.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use ecdysis::Readable;
    /// let path = "/run/app/takeover";
    /// let starting = ecdysis::Ecdysis::builder().take_over(path).start()?;
    /// let socket = starting.listen_takeover(path)?;
    /// let server = starting.ready()?;
    /// // Any poll, select or epoll does; this is the one at hand.
    /// while server.shutdown().readable(&socket, None)? == Readable::Ready {
    ///     match server.hand_over(&socket) {
    ///         Ok(Some(new)) => println!("pid {} serves", new.pid),
    ///         Ok(None) => {}
    ///         Err(e) => println!("{e}; this process serves on"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`upgrade`](Self::upgrade), and [`Error::Connect`] if accept(2) fails.
    pub fn hand_over(&self, socket: &TakeoverSocket) -> Result<Option<Upgraded>, Error> {
        let Some(taker) = socket.accept(&self.0.config.trust)? else { return Ok(None) };
        self.wait_upgraded(|outcome| Reply::Taker(taker, Some(outcome))).map(Some)
    }

    fn wait_upgraded(&self, reply: impl FnOnce(Outcome) -> Reply) -> Result<Upgraded, Error> {
        let core = &*self.0;
        if core.shutdown.state() == State::Starting {
            return Err(Error::NotReady);
        }
        let outcome = Outcome::default();
        self.post(Action::Upgrade, reply(outcome.clone()));
        let mut driver = core.lock();
        loop {
            if let Some(outcome) = outcome.lock().unwrap_or_else(PoisonError::into_inner).take() {
                drop(driver);
                if outcome.is_ok() {
                    core.shutdown.wait();
                }
                return outcome;
            }
            if driver.exit.is_some() {
                return Err(Error::Over);
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    Turn { core, triggers: Some(triggers) }.serve()?;
                    driver = core.lock();
                }
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Stops: accepting ends, and `run` returns. If nobody is in `run`, that is done here. A child of an upgrade that
    /// is under way is ended. Asked before `ready`, it stops at once after it.
    pub fn stop(&self) {
        self.post(Action::Stop, Reply::Nobody);
        if self.0.shutdown.state() == State::Starting {
            return;
        }
        let triggers = self.0.lock().triggers.take();
        if let Some(triggers) = triggers {
            let mut turn = Turn { core: &self.0, triggers: Some(triggers) };
            while let Ok(false) = turn.serve() {}
        }
    }

    /// Waits until the parent has ended, for what only one process may use: a lock, a write-ahead log. Returns at once
    /// if there is no parent. The parent ends when its connections do.
    ///
    /// # Errors
    ///
    /// [`Error::ParentLives`] after `deadline`; [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_parent(&self, deadline: Duration) -> Result<(), Error> {
        let Some(parent) = &self.0.parent else { return Ok(()) };
        match parent.wait_end(deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::ParentLives { after: deadline }),
            Err(source) => Err(Error::Wait { source }),
        }
    }

    /// Waits until this process is asked to stop, by a signal chosen for that or by [`stop`](Self::stop), although
    /// another one serves already. To be called after [`run`](Self::run) and the drain, in a process whose supervisor
    /// would start it again if it ended by itself: that of a container, say, whose new version is another container.
    /// Started again, it would take everything back.
    ///
    /// Returns at once what `run` gave as the reason if that was a stop.
    ///
    /// # Errors
    ///
    /// [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_stop(&self) -> Result<ExitReason, Error> {
        let exit = self.run()?;
        if !matches!(exit.mode, ExitMode::Upgraded(_)) {
            return Ok(exit.reason);
        }
        let core = &*self.0;
        let mut driver = core.lock();
        loop {
            if let Some(reason) = &driver.stop {
                return Ok(reason.clone());
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    let mut turn = Turn { core, triggers: Some(triggers) };
                    let reason = turn.wait_for_stop()?;
                    core.lock().stop = Some(reason);
                    drop(turn);
                    driver = core.lock();
                }
                // Another thread waits for the same.
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn post(&self, action: Action, reply: Reply) {
        let request = Request { action, reason: ExitReason::Call, since: Instant::now(), reply };
        self.0.calls.post(request);
    }
}

#[cfg(feature = "tokio_ecdysis")]
impl Ecdysis {
    /// Asks the service manager, if it listens to this process, for so much more time.
    #[cfg(feature = "systemd_notify")]
    pub(crate) fn extend_timeout(&self, time: Duration) -> Result<(), crate::systemd::NotifyError> {
        let manager = self.0.manager();
        match manager.notifier().filter(|_| manager.is_main() && !self.0.shutdown.is_handed_over()) {
            Some(notifier) => notifier.extend_timeout(time),
            None => Ok(()),
        }
    }

    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn takes_sockets(&self) -> bool {
        self.0.takes_sockets.load(Ordering::Relaxed)
    }
}

impl Deref for Ecdysis {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.sockets
    }
}

/// What all handles of a generation share.
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) program: Program,
    /// The signal mask this process started with, and every child will.
    pub(crate) mask: Mask,
    pub(crate) generation: u64,
    began: Instant,
    pub(crate) sockets: Sockets,
    pub(crate) shutdown: Shutdown,
    /// Empty if there is none, or nobody asked for it.
    manager: OnceLock<Arc<Manager>>,
    /// What the manager passed is taken, so it may store what it is to pass.
    takes_sockets: AtomicBool,
    pub(crate) parent: Option<Parent>,
    /// The generations before the parent that lived when this one began.
    older: Vec<DrainLink>,
    calls: Arc<Calls>,
    pid_file: Mutex<Option<PathBuf>>,
    driver: Mutex<Driver>,
    /// The triggers are free again, or a call has its answer.
    changed: Condvar,
    /// Open until this process ends.
    kept: Mutex<Kept>,
    _started: Started,
}

/// Who waits on the triggers, and what came of it.
struct Driver {
    /// `None` while some thread has them.
    triggers: Option<Triggers>,
    exit: Option<Exit>,
    /// What has asked this process to stop although it was replaced.
    stop: Option<ExitReason>,
}

/// What stays open until this process ends, because others wait for that.
#[derive(Default)]
pub(crate) struct Kept {
    /// The link to the child that took over.
    pub(crate) link: Option<Arc<OwnedFd>>,
    /// Control connections that asked for a stop.
    stopping: Vec<UnixStream>,
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn manager(&self) -> Arc<Manager> {
        self.manager.get().cloned().unwrap_or_default()
    }

    /// Logs an event and tells the observer.
    pub(crate) fn emit(&self, event: &Event<'_>) {
        event.log();
        if self.is_main() {
            self.manager().hear(event);
        }
        if let Some(observer) = &self.config.observer {
            observer(event);
        }
    }

    /// Whether the service manager listens to this process, as it does to a child once the parent has announced it.
    pub(crate) fn is_main(&self) -> bool {
        if !self.manager().is_there() || self.manager().is_main() {
            return self.manager().is_there();
        }
        match self.parent.as_ref().map(Parent::announced) {
            Some(Announced::Yes) => self.manager().become_main(true),
            Some(Announced::Never) => self.manager().become_main(false),
            Some(Announced::NotYet) | None => return false,
        }
        self.store_sockets();
        true
    }

    fn store_sockets(&self) {
        if self.takes_sockets.load(Ordering::Relaxed) && self.manager().room() > 0 {
            self.sockets.store_in(self.manager());
        }
    }

    /// Tells the service manager who serves now, before we may end. Our child becomes the main process of the service; a
    /// process that took over belongs to another unit or to none, so for this one it is the end.
    pub(crate) fn announce(&self, upgraded: &Upgraded, is_child: bool, link: &OwnedFd) {
        if !self.manager().is_there() {
            return;
        }
        // We may be a child whose own parent is about to announce it.
        if let Some(parent) = self.parent.as_ref().filter(|_| !self.manager().is_main()) {
            parent.wait_announced(ANNOUNCE);
        }
        if self.is_main() {
            self.manager().announce(upgraded, is_child);
        }
        if is_child {
            // It may have ended since, on purpose.
            let _ = send(link, Word::Main.line());
        }
    }

    /// Keeps the service manager's watchdog content, and says when that has to be done again.
    pub(crate) fn beat(&self) -> Option<Instant> {
        self.manager().beat(|| self.is_main())
    }

    /// Says something to a parent that may be gone, which then does not matter.
    pub(crate) fn tell_parent(&self, status: &Status) {
        if let Some(Err(e)) = self.parent.as_ref().map(|parent| parent.tell(status)) {
            log::debug!("the parent does not hear {status:?}: {e}");
        }
    }

    fn pid_file(&self) -> Option<PathBuf> {
        self.pid_file.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn write_pid_file(&self) -> Result<(), Error> {
        match self.pid_file() {
            Some(path) => pid_file::write(&path).map_err(|source| Error::PidFile { path, source }),
            None => Ok(()),
        }
    }

    /// After a failed upgrade, whose child may have written its own PID.
    pub(crate) fn rewrite_pid_file(&self) {
        if let Err(e) = self.write_pid_file() {
            log::error!("{}", chain(&e));
        }
    }

    /// The older generations that still live, oldest first, with the pipe on which each can be told something.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &DrainLink> {
        let parent = self.parent.as_ref().map(Parent::drain_link);
        self.older.iter().chain(parent).filter(|link| link.lives())
    }

    /// The answer to `status`.
    pub(crate) fn status(&self, phase: &str) -> String {
        let draining: Vec<_> = self.draining().map(|link| link.generation.to_string()).collect();
        let mut line = format!(
            "pid={} generation={} uptime_ms={} phase={phase} connections={} draining={}",
            std::process::id(),
            self.generation,
            self.began.elapsed().as_millis(),
            self.shutdown.guarded(),
            draining.join(","),
        );
        for key in self.sockets.keys() {
            line.push_str(" socket=");
            escape(key.to_string().as_bytes(), &mut line);
        }
        line.push('\n');
        line
    }

    /// After a successful upgrade: ends the drains that are too many.
    fn bound_overlap(&self) {
        let Overlap::AtMost(most) = self.config.overlap else { return };
        let draining: Vec<_> = self.draining().collect();
        let too_many = (draining.len() + 1).saturating_sub(most);
        for link in draining.iter().take(too_many) {
            log::info!("tells generation {} to end its drain", link.generation);
            link.end_drain();
        }
        if too_many > draining.len() {
            self.shutdown.end_drain();
        }
    }
}

/// A thread's turn at the triggers. It gives them back however it ends.
struct Turn<'a> {
    core: &'a Core,
    triggers: Option<Triggers>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.core.lock().triggers = self.triggers.take();
        self.core.changed.notify_all();
    }
}

impl Turn<'_> {
    /// Waits for requests, or does what the first of them asks for. True if the service is over.
    fn serve(&mut self) -> Result<bool, Error> {
        let core = self.core;
        let Some(triggers) = &mut self.triggers else { return Ok(true) };
        let Some(Request { action, reason, since, reply }) = triggers.next_request() else {
            let parent = core.parent.as_ref().filter(|parent| !parent.has_ended());
            let fds: Vec<_> = parent.iter().map(|parent| (parent.reader.as_fd(), PollFlags::IN)).collect();
            triggers.wait(core, &fds, None, trigger::Sockets::Answer)?;
            // The announcement is among what the parent may have said.
            core.is_main();
            // In the probation the parent is still the one that is asked to stop.
            if parent.and_then(Parent::next_word) == Some(Word::Stop) {
                let (reason, since) = (ExitReason::Parent, Instant::now());
                triggers.requests.push_back(Request { action: Action::Stop, reason, since, reply: Reply::Nobody });
            }
            return Ok(false);
        };
        let (mode, state) = match action {
            Action::Stop => {
                core.tell_parent(&Status::Stopping);
                core.sockets.unlink(|_| true);
                if let Some(Err(e)) = core.pid_file().as_deref().map(pid_file::remove_if_ours) {
                    log::warn!("cannot remove the PID file: {e}");
                }
                core.kept().stopping.extend(reply.stopping());
                (ExitMode::Stopped, State::Stopped)
            }
            Action::PartialStop => {
                core.tell_parent(&Status::Stopping);
                core.sockets.unlink(|key| triggers.listens_on(key));
                core.kept().stopping.extend(reply.stopping());
                (ExitMode::PartiallyStopped, State::Stopped)
            }
            Action::Status => {
                reply.status(&core.status("serving"));
                return Ok(false);
            }
            Action::Upgrade => {
                let refused = core.config.overlap == Overlap::Refuse && core.draining().next().is_some();
                let outcome = if refused {
                    Err(Error::ParentDrains)
                } else {
                    upgrade::upgrade(core, reply.taker(), triggers, since)
                };
                let upgraded = outcome.as_ref().ok().cloned();
                match &outcome {
                    Ok(upgraded) => {
                        core.bound_overlap();
                        core.emit(&Event::Upgraded(upgraded));
                    }
                    Err(error) => core.emit(&Event::UpgradeFailed { error, after: since.elapsed() }),
                }
                reply.upgrade(outcome);
                core.changed.notify_all();
                match upgraded {
                    Some(upgraded) => (ExitMode::Upgraded(upgraded), State::HandedOver),
                    None => return Ok(false),
                }
            }
        };
        core.sockets.close_all();
        core.lock().stop = triggers.stop_reason();
        core.kept().stopping.extend(triggers.answer_over());
        triggers.close_sockets();
        let exit = Exit { mode, reason };
        core.emit(&Event::Ended(&exit));
        // Last: a program that waits for the shutdown handle may end the process at once, and by then whoever is to
        // hear of this has heard. After an upgrade nothing is accepted meanwhile: it is paused since the commit.
        core.shutdown.set(state);
        core.lock().exit = Some(exit);
        core.changed.notify_all();
        Ok(true)
    }

    /// After the service is over: waits until this process is asked to stop.
    fn wait_for_stop(&mut self) -> Result<ExitReason, Error> {
        let core = self.core;
        let Some(triggers) = &mut self.triggers else { return Err(Error::Over) };
        loop {
            if let Some(reason) = triggers.stop_reason() {
                return Ok(reason);
            }
            triggers.answer_over();
            triggers.wait(core, &[], None, trigger::Sockets::Leave)?;
        }
    }
}
