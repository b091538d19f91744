//! What a program chooses before it starts, and the start itself.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;

use crate::ecdysis::Starting;
use crate::error::Error;
use crate::event::Event;
use crate::generation::Generation;
use crate::handover::ancestors::Ancestors;
use crate::handover::link::Transport;
use crate::handover::receive::Inherited;
use crate::logging;
use crate::manager::ServiceManager;
use crate::options::{Launch, Limits, Overlap};
use crate::pid_file::PidFile;
use crate::program::{Program, ProgramOverrides};
use crate::reporter::{Observer, Reporter};
use crate::service::{Service, Started};
use crate::shutdown::Shutdown;
use crate::sockets::Sockets;
use crate::sys::attributes::Attributes;
use crate::sys::peer::PeerCred;
use crate::sys::signal::{self, Handlers};
use crate::sys::spawn::Spawn;
use crate::triggers::control::{ControlSocket, Purpose, Trust};
use crate::triggers::request::{Action, Calls};
use crate::triggers::Triggers;
use crate::upgrade::child::inherit;

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
    sockets: Vec<(PathBuf, Purpose)>,
    overrides: ProgramOverrides,
    pid_file: Option<PathBuf>,
    spawn: Spawn,
    transport: Transport,
    limits: Limits,
    take_over: Option<PathBuf>,
    trust: Trust,
    observer: Option<Observer>,
    systemd_notify: bool,
    #[cfg(feature = "systemd_sockets")]
    systemd_sockets: bool,
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
            overrides: ProgramOverrides::default(),
            pid_file: None,
            spawn: Spawn::default(),
            transport: Transport::default(),
            limits: Limits::default(),
            take_over: None,
            trust: Arc::new(PeerCred::is_same_user_or_root),
            observer: None,
            systemd_notify: false,
            #[cfg(feature = "systemd_sockets")]
            systemd_sockets: false,
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
        self.on_socket(path.as_ref(), Purpose::Connect(Action::Upgrade))
    }

    /// Stops when somebody connects to this Unix socket. The connection gets the line `stopping`, and closes when this
    /// process ends.
    pub fn stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Connect(Action::Stop))
    }

    /// As [`partial_stop_on_signal`](Self::partial_stop_on_signal), when somebody connects to this Unix socket.
    pub fn partial_stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Connect(Action::PartialStop))
    }

    /// One socket for all: the first line of a connection says `upgrade`, `stop`, `partial-stop` or `status`, within 5
    /// seconds. Otherwise as [`upgrade_on_socket`](Self::upgrade_on_socket).
    ///
    /// The answer to `status` is one line of `key=value` words: `pid`, `generation`, `uptime_ms`, `phase` (`serving`,
    /// `upgrading`, `probation`), `connections` that hold a guard, `draining` generations, separated by commas, and a
    /// `socket` for each in the registry, percent-escaped.
    pub fn control_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Command)
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
    /// not call [`run`](crate::Ecdysis::run) use [`Sockets::listen_takeover`] instead.
    pub fn takeover_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Takeover)
    }

    fn on_socket(&mut self, path: &Path, meaning: Purpose) -> &mut Self {
        self.sockets.push((path.to_owned(), meaning));
        self
    }

    /// Keeps the serving process's PID in this file, mode 0644. It is written at `ready`, by rename, and removed at a
    /// final stop if it is still ours. A relative path is resolved at each write.
    pub fn pid_file(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.pid_file = Some(path.as_ref().to_owned());
        self
    }

    /// The program that the next generation runs. A relative path starts at the directory of this process's start; no
    /// link is followed. Default: what `argv[0]` means, resolved at [`start`](Self::start) in the same way.
    pub fn exec(&mut self, program: impl AsRef<Path>) -> &mut Self {
        self.overrides.exec = Some(program.as_ref().to_owned());
        self
    }

    /// The next generation's arguments, without `argv[0]`. Default: this one's.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.overrides.args = Some(args.into_iter().map(Into::into).collect());
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
        &mut self.overrides.env
    }

    /// Where the next generation starts. Default: where this one started, or, if that directory is gone, where it is.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.overrides.directory = Some(path.as_ref().to_owned());
        self
    }

    /// How long a child may take from the trigger to its `ready`. Then it is killed, and the upgrade has failed.
    /// Default: 60 seconds.
    pub fn ready_timeout(&mut self, time: Duration) -> &mut Self {
        self.limits.ready_timeout = time;
        self
    }

    /// How long a child must live after its `ready` before the upgrade has succeeded. Meanwhile this process accepts
    /// nothing but keeps its sockets; if the child dies, it accepts again, and the upgrade has failed. Default: one
    /// second. Zero: no probation.
    pub fn probation(&mut self, time: Duration) -> &mut Self {
        self.limits.probation = time;
        self
    }

    /// How the child is made.
    pub fn spawn(&mut self, spawn: Spawn) -> &mut Self {
        self.spawn = spawn;
        self
    }

    /// What carries a handover to a child.
    pub fn transport(&mut self, transport: Transport) -> &mut Self {
        self.transport = transport;
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
        self.take_over = Some(path.as_ref().to_owned());
        self
    }

    /// Who may be at the other end of a takeover socket, on either side. Default:
    /// [`PeerCred::is_same_user_or_root`]. For another user to get as far as being asked about, the socket file must let
    /// it in; its mode is 0600 until the program changes it.
    pub fn trust_peers(&mut self, trust: impl Fn(&PeerCred) -> bool + Send + Sync + 'static) -> &mut Self {
        self.trust = Arc::new(trust);
        self
    }

    /// What happens when an upgrade is asked for while an older generation still drains.
    pub fn overlap(&mut self, overlap: Overlap) -> &mut Self {
        self.limits.overlap = overlap;
        self
    }

    /// Calls `observer` at every [`Event`], in the thread that waits for triggers: it must return soon, and must not
    /// call [`Ecdysis::upgrade`](crate::Ecdysis::upgrade). If it panics, that is logged and changes nothing.
    pub fn on_event(&mut self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> &mut Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Tells the service manager that started this process (`NOTIFY_SOCKET`) when it serves, upgrades, whether that
    /// succeeded and to which process, and when it stops; keeps its watchdog content; asks for more time while a stop
    /// makes progress. Off by default. Without a service manager nothing happens.
    ///
    /// All of it works with the default `NotifyAccess=main`: each generation announces the next. The signs of life
    /// come from [`Ecdysis::run`](crate::Ecdysis::run), so a process that does not get back to it for as long as
    /// `WatchdogSec=` is ended. See the [guide](crate::guide::systemd).
    ///
    /// # Errors
    ///
    /// [`start`](Self::start) fails with [`Error::ServiceManager`] if the address in `NOTIFY_SOCKET` cannot be used.
    #[cfg(feature = "systemd_notify")]
    pub fn systemd_notify(&mut self, on: bool) -> &mut Self {
        self.systemd_notify = on;
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
        self.systemd_sockets = on;
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
        // First of all, because only now these are as the parent made them.
        let attributes = Attributes::of_this_thread().map_err(prepare("signal mask"))?;
        let program = Program::resolve(&self.overrides);
        let launch = Launch { program, spawn: self.spawn, transport: self.transport, attributes };
        let inherited = inherit(self.take_over.as_deref(), &self.trust, self.limits.ready_timeout)?;
        let (number, entries, ancestors) = match inherited {
            Some(Inherited { generation, entries, ancestors }) => (generation + 1, entries, ancestors),
            None => (1, Vec::new(), Ancestors::default()),
        };
        logging::set_generation(number);

        signal::wake_fd().map_err(prepare("wake descriptor"))?;
        let mut handlers = Handlers::default();
        for &(signal, _) in &self.signals {
            handlers.install(signal).map_err(|source| Error::Signal { signal, source })?;
        }
        let sockets = Sockets::new(entries, ancestors.parent.is_some());
        let shutdown = Shutdown::new().map_err(prepare("shutdown handle"))?;
        let ancestors = Arc::new(ancestors);
        let reporter = Reporter::new(self.observer.clone(), ancestors.clone(), sockets.clone());
        let pid_file = PidFile::new(self.pid_file.clone());
        let generation = Generation {
            number,
            began: Instant::now(),
            launch,
            limits: self.limits,
            sockets,
            shutdown,
            ancestors,
            pid_file,
            reporter,
        };
        if self.systemd_notify {
            enable_manager(&generation)?;
        }
        #[cfg(feature = "systemd_sockets")]
        if self.systemd_sockets {
            inherit_from_manager(&generation)?;
        }
        let control = self.sockets.iter().map(|(path, purpose)| control_socket(&generation, path, *purpose));
        let control = control.collect::<Result<_, _>>()?;
        generation.sockets.registry().begin_claims();
        let calls = Arc::new(Calls::default());
        let triggers = Triggers::new(self.signals.clone(), handlers, control, self.trust.clone(), calls.clone());
        Ok(Starting(Arc::new(Service::new(generation, triggers, calls, self.trust.clone(), started))))
    }
}

fn control_socket(generation: &Generation, path: &Path, purpose: Purpose) -> Result<ControlSocket, Error> {
    let listener = generation.sockets.listen_unix_with_mode(path, Some(Mode::RUSR | Mode::WUSR))?;
    Ok(ControlSocket { path: path.to_owned(), listener, purpose })
}

/// Reports to the service manager from now on, if there is one.
fn enable_manager(generation: &Generation) -> Result<(), Error> {
    if let Some(manager) = find_manager(generation)? {
        if generation.reporter.set_manager(manager.clone()) {
            generation.shutdown.on_progress(move |left| manager.progress(left));
        }
    }
    Ok(())
}

#[cfg(feature = "systemd_notify")]
fn find_manager(generation: &Generation) -> Result<Option<Arc<dyn ServiceManager>>, Error> {
    let Limits { ready_timeout, probation, .. } = generation.limits;
    let is_child = generation.ancestors.parent.is_some();
    let systemd = crate::systemd::manager::Systemd::from_env(
        generation.number,
        is_child,
        ready_timeout.saturating_add(probation),
    )?;
    Ok(systemd.map(|systemd| Arc::new(systemd) as _))
}

#[cfg(not(feature = "systemd_notify"))]
fn find_manager(_: &Generation) -> Result<Option<Arc<dyn ServiceManager>>, Error> {
    Ok(None)
}

/// Takes what the service manager passed, in addition to what the parent handed over. Returns false if that was done
/// before.
#[cfg(feature = "systemd_sockets")]
fn inherit_from_manager(generation: &Generation) -> Result<bool, Error> {
    if generation.reporter.take_sockets() {
        return Ok(false);
    }
    let passed = crate::systemd::sockets::inherit()?;
    generation.sockets.registry().inherit(passed.sockets);
    generation.sockets.registry().forget_later(passed.stale);
    Ok(true)
}

/// For the asynchronous face: its builder starts first, and the program chooses triggers later.
#[cfg(feature = "tokio_ecdysis")]
impl Starting {
    /// The handle that this generation will have. Before `ready` it upgrades nothing.
    pub(crate) fn handle(&self) -> crate::Ecdysis {
        crate::Ecdysis(self.0.clone())
    }

    pub(crate) fn add_signal(&self, signal: i32, action: Action) -> Result<(), Error> {
        self.with_triggers(|triggers| triggers.add_signal(signal, action))?
            .map_err(|source| Error::Signal { signal, source })
    }

    pub(crate) fn add_socket(&self, path: &Path, purpose: Purpose) -> Result<(), Error> {
        let socket = control_socket(&self.0.generation, path, purpose)?;
        self.with_triggers(|triggers| triggers.add_socket(socket))
    }

    fn with_triggers<T>(&self, change: impl FnOnce(&mut Triggers) -> T) -> Result<T, Error> {
        self.0.lead().triggers.as_mut().map(change).ok_or(Error::Busy)
    }

    #[cfg(feature = "systemd_notify")]
    pub(crate) fn enable_manager(&self) -> Result<(), Error> {
        enable_manager(&self.0.generation)
    }

    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn inherit_from_manager(&self) -> Result<bool, Error> {
        inherit_from_manager(&self.0.generation)
    }

    pub(crate) fn set_pid_file(&self, path: &Path) {
        self.0.generation.pid_file.set(path);
    }
}
