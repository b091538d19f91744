//! What a program chooses before it starts.

mod next;

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::ecdysis::Ecdysis;
use crate::event::Event;
use crate::exit::Upgraded;
use crate::handover::link::Transport;
use crate::options::{BeforeUpgrade, Limits, Overlap, Verify};
use crate::program::Changes;
use crate::reporter::Observer;
use crate::sys::peer::PeerCred;
use crate::sys::spawn::Spawn;
use crate::triggers::control::{Purpose, Trust};
use crate::triggers::request::Action;

/// Chooses triggers, deadlines, and what the next generation runs. Nothing happens before [`start`](Self::start).
///
/// ```
/// # fn main() -> Result<(), ecdysis::Error> {
/// use std::time::Duration;
/// let starting = ecdysis::Ecdysis::builder()
///     .upgrade_on_signal(libc::SIGHUP)
///     .stop_on_signal(libc::SIGTERM)
///     .ready_timeout(Duration::from_secs(20))
///     .start()?;
/// assert!(!starting.is_child());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Builder {
    pub(crate) signals: Vec<(i32, Action)>,
    pub(crate) sockets: Vec<(PathBuf, Purpose)>,
    pub(crate) changes: Changes,
    pub(crate) before_upgrade: Option<BeforeUpgrade>,
    pub(crate) standalone: bool,
    pub(crate) verify: Option<Verify>,
    pub(crate) spread: Duration,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) spawn: Spawn,
    pub(crate) transport: Transport,
    pub(crate) limits: Limits,
    pub(crate) take_over: Option<PathBuf>,
    pub(crate) application: Option<String>,
    pub(crate) trust: Trust,
    pub(crate) observer: Option<Observer>,
    pub(crate) systemd_notify: bool,
    #[cfg(feature = "systemd_sockets")]
    pub(crate) systemd_sockets: bool,
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
            before_upgrade: None,
            standalone: false,
            verify: None,
            spread: Duration::ZERO,
            pid_file: None,
            spawn: Spawn::default(),
            transport: Transport::default(),
            limits: Limits::default(),
            take_over: None,
            application: None,
            trust: Arc::new(PeerCred::is_same_user_or_root),
            observer: None,
            systemd_notify: false,
            #[cfg(feature = "systemd_sockets")]
            systemd_sockets: false,
        }
    }

    /// Upgrades when this signal comes (signal(7)); SIGHUP is customary. May be called for several. Signals during
    /// an upgrade are followed by one more upgrade: by the new version after its probation, or by this one if that upgrade
    /// fails.
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

    /// One socket for all: the first line of a connection says `upgrade`, `stop`, `partial-stop`, `rollback` or `status`, within 5
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
    /// not call [`run`](crate::Ecdysis::run) use [`Sockets::listen_takeover`](crate::Sockets::listen_takeover) instead.
    pub fn takeover_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Takeover)
    }

    fn on_socket(&mut self, path: &Path, meaning: Purpose) -> &mut Self {
        self.sockets.push((path.to_owned(), meaning));
        self
    }

    /// Keeps the serving process's PID in this file, mode 0644: written at `ready`, by rename where that can be, and removed
    /// at a final stop if it is still ours. A relative path is resolved at each write.
    pub fn pid_file(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.pid_file = Some(path.as_ref().to_owned());
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

    /// Calls `verify` in a thread of its own when the new process serves. If it returns an error, the upgrade is rolled back:
    /// the new process stops accepting and drains, this process accepts again, and the upgrade fails with
    /// [`Error::Refused`](crate::Error::Refused). The verdict waits for it, for at most
    /// [`ready_timeout`](Self::ready_timeout); a panic, or no answer by then, is an error too.
    ///
    /// For a request to the service itself: only the new process answers it. An operator can do the same by the command
    /// `rollback` on the control socket.
    pub fn verify(
        &mut self,
        verify: impl Fn(&Upgraded) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    ) -> &mut Self {
        self.verify = Some(Arc::new(verify));
        self
    }

    /// How long this process goes on accepting after a stop was requested, because balancers learn of it late. Meanwhile
    /// [`Shutdown::is_ready`](crate::Shutdown::is_ready) is false, which a readiness probe should show. A second stop ends
    /// the delay. A partial stop has none. Default: zero.
    pub fn stop_delay(&mut self, time: Duration) -> &mut Self {
        self.limits.stop_delay = time;
        self
    }

    /// Once accepting is over, idle connections close at a random moment within `window` after their grace, and not all in
    /// the same instant, so that their clients do not all reconnect at once
    /// ([`Shutdown::next_request`](crate::Shutdown::next_request)). Default: zero.
    pub fn spread_drain(&mut self, window: Duration) -> &mut Self {
        self.spread = window;
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
    /// // The same two lines in every version: the second to start takes over from the first.
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

    /// Names the application that this program is a version of. A process then hands over to, and takes over from, none
    /// that has another name: two applications whose takeover sockets were mixed up would exchange their listeners. At most
    /// 100 bytes. Without a name, on one side or both, nothing is checked.
    pub fn application(&mut self, name: impl Into<String>) -> &mut Self {
        let mut name = name.into();
        while name.len() > 100 {
            name.pop();
        }
        self.application = Some(name);
        self
    }

    /// Who may be at the other end of a takeover socket, on either side. Default:
    /// [`PeerCred::is_same_user_or_root`]. For another user to get as far as being asked about, the socket file must let
    /// it in; its mode is 0600 until the program changes it.
    pub fn trust_peers(&mut self, trust: impl Fn(&PeerCred) -> bool + Send + Sync + 'static) -> &mut Self {
        self.trust = Arc::new(trust);
        self
    }

    /// Whether a stop signal that is delivered after a stop ends the [`drain`](crate::Shutdown::drain), which then returns
    /// early: an operator who presses Ctrl-C a second time does not want to wait for the connections. Default: no.
    ///
    /// It does not shorten the drain of a generation that was replaced.
    ///
    /// ```
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let starting = ecdysis::Ecdysis::builder()
    ///     .stop_on_signal(libc::SIGTERM)
    ///     .stop_on_signal(libc::SIGINT)
    ///     .second_stop_ends_drain(true)
    ///     .start()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn second_stop_ends_drain(&mut self, ends: bool) -> &mut Self {
        self.limits.second_stop_ends_drain = ends;
        self
    }

    /// What happens when an upgrade is asked for while an older generation still drains.
    pub fn overlap(&mut self, overlap: Overlap) -> &mut Self {
        self.limits.overlap = overlap;
        self
    }

    /// Calls `observer` at every [`Event`], in order, in a thread named `ecdysis-events`. The library waits until the call
    /// has returned, so what the observer does comes before what follows the event. But it waits for at most a second: an
    /// observer that blocks holds up no upgrade and no stop. Then 256 events wait for it, and further ones are lost. A
    /// panic changes nothing.
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
    /// [`start`](Self::start) fails with [`Error::ServiceManager`](crate::Error::ServiceManager) if the address in `NOTIFY_SOCKET` cannot be used.
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
    /// [`start`](Self::start) fails with [`Error::ServiceManager`](crate::Error::ServiceManager) if the variables are malformed or name what is not
    /// open.
    #[cfg(feature = "systemd_sockets")]
    pub fn systemd_sockets(&mut self, on: bool) -> &mut Self {
        self.systemd_sockets = on;
        self
    }
}

impl Ecdysis {
    /// Begins with the choices.
    pub fn builder() -> Builder {
        Builder::new()
    }
}
