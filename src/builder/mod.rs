//! The builder: the choices of a program before it starts.

mod next;
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
mod systemd;

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::ecdysis::Ecdysis;
use crate::event::Event;
use crate::exit::Upgraded;
use crate::handover::link::Transport;
use crate::options::{Options, Overlap};
use crate::program::Changes;
use crate::reporter::Observer;
use crate::sys::peer::PeerCred;
use crate::sys::spawn::Spawn;
use crate::triggers::control::{Purpose, Trust};
use crate::triggers::request::Action;

/// Chooses triggers, deadlines, and the program of the next generation. Nothing happens before [`start`](Self::start).
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
#[derive(Clone, Default)]
pub struct Builder {
    pub(crate) signals: Vec<(i32, Action)>,
    pub(crate) sockets: Vec<(PathBuf, Purpose)>,
    pub(crate) changes: Changes,
    pub(crate) spread: Duration,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) options: Options,
    pub(crate) take_over: Option<PathBuf>,
    pub(crate) application: Option<String>,
    trust: Option<Trust>,
    pub(crate) observer: Option<Observer>,
    #[cfg(feature = "systemd_notify")]
    pub(crate) systemd_notify: bool,
    #[cfg(feature = "systemd_sockets")]
    pub(crate) systemd_sockets: bool,
    pub(crate) keep_passed: bool,
}

impl Builder {
    /// Returns a builder with no triggers, 60 seconds to be ready, and one second of probation.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decides which peers a takeover socket accepts.
    pub(crate) fn trust(&self) -> Trust {
        self.trust.clone().unwrap_or_else(|| Arc::new(PeerCred::is_same_user_or_root))
    }

    /// Upgrades when this signal is delivered (signal(7)). SIGHUP is customary. May be called for several signals. If
    /// signals are delivered during an upgrade, one more upgrade follows: the new version performs it after its
    /// probation, or this one if the first upgrade fails.
    pub fn upgrade_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::Upgrade)
    }

    /// Stops when this signal is delivered. SIGTERM is customary. A stop during an upgrade first ends the child.
    pub fn stop_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::Stop)
    }

    /// Ends accepting and the triggers when this signal is delivered, and leaves everything else to the program. The
    /// PID file and socket files stay, except the files of control sockets, which are no longer served.
    pub fn partial_stop_on_signal(&mut self, signal: i32) -> &mut Self {
        self.on_signal(signal, Action::PartialStop)
    }

    fn on_signal(&mut self, signal: i32, action: Action) -> &mut Self {
        self.signals.push((signal, action));
        self
    }

    /// Upgrades when a peer connects to this Unix socket, which is created with mode 0600 and accepts only the same
    /// user and root. The connection stays open until the upgrade is over, and then receives one line: `upgraded pid=…
    /// generation=… ms=…`, `failed: …`, `busy` or `stopping`.
    pub fn upgrade_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Connect(Action::Upgrade))
    }

    /// Stops when a peer connects to this Unix socket. The connection receives the line `stopping`, and is closed when
    /// this process ends. It receives `failed: …` if the old process of an upgrade takes the service back at that moment.
    pub fn stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Connect(Action::Stop))
    }

    /// Like [`partial_stop_on_signal`](Self::partial_stop_on_signal), when a peer connects to this Unix socket.
    pub fn partial_stop_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Connect(Action::PartialStop))
    }

    /// Serves all commands on one socket. A connection must send `upgrade`, `stop`, `partial-stop`, `rollback` or
    /// `status` as its first line, within 5 seconds. Otherwise like [`upgrade_on_socket`](Self::upgrade_on_socket).
    ///
    /// The answer to `status` is one line of `key=value` words: `pid`, `generation`, `uptime_ms`, `phase` (`serving`,
    /// `upgrading`, `probation`), `connections` (the number of guards), `draining` (generations, separated by commas),
    /// one `older` for each of these, and one `socket` for each in the registry, percent-escaped.
    pub fn control_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Command)
    }

    /// Hands everything over to a process that connects to this Unix socket and requests it, as a process with
    /// [`take_over`](Self::take_over) does. That process need not be a child of this one, nor run in the same
    /// container.
    ///
    /// The socket is created with mode 0600 and accepts only the same user and root, unless
    /// [`trust_peers`](Self::trust_peers) says otherwise. A takeover follows the rules of an upgrade: `ready` commits
    /// it, and the deadline, the probation, the events and the errors are the same. There is one difference: a process
    /// that fails is not killed, because another supervisor owns it. It is turned away, and this process keeps serving.
    ///
    /// The takeover socket itself is handed over too, so the next takeover finds the next generation at the same path.
    /// Programs that do not call [`run`](crate::Ecdysis::run) use
    /// [`Sockets::listen_takeover`](crate::Sockets::listen_takeover) instead.
    pub fn takeover_on_socket(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.on_socket(path.as_ref(), Purpose::Takeover)
    }

    fn on_socket(&mut self, path: &Path, purpose: Purpose) -> &mut Self {
        self.sockets.push((path.to_owned(), purpose));
        self
    }

    /// Keeps the serving process's PID in this file, with mode 0644. The file is written at `ready`, by rename if
    /// possible. A final stop removes it if it still contains this process's PID. A relative path is resolved at each
    /// write.
    pub fn pid_file(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.pid_file = Some(path.as_ref().to_owned());
        self
    }

    /// Sets how long a child may take from the trigger to its `ready`. After that it is killed, and the upgrade fails.
    /// Default: 60 seconds.
    pub fn ready_timeout(&mut self, time: Duration) -> &mut Self {
        self.options.ready_timeout = time;
        self
    }

    /// Sets the probation: how long a child must live after its `ready` before the upgrade has succeeded. During that
    /// time this process accepts nothing but keeps its sockets. If the child dies, this process accepts again, and the
    /// upgrade has failed. Default: one second. Zero means no probation.
    pub fn probation(&mut self, time: Duration) -> &mut Self {
        self.options.probation = time;
        self
    }

    /// Calls `verify` in a separate thread when the new process serves. If it returns an error, the upgrade is rolled
    /// back: the new process stops accepting and drains, this process accepts again, and the upgrade fails with
    /// [`Error::Refused`](crate::Error::Refused). The verdict waits for `verify`, for at most
    /// [`ready_timeout`](Self::ready_timeout). A panic, or no result by then, is an error too.
    ///
    /// Use it for a request to the service itself, which only the new process answers. An operator can do the same with
    /// the command `rollback` on the control socket.
    pub fn verify(
        &mut self,
        verify: impl Fn(&Upgraded) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    ) -> &mut Self {
        self.options.verify = Some(Arc::new(verify));
        self
    }

    /// Sets how long this process keeps accepting after a stop was requested, because load balancers notice a stop
    /// late. During the delay [`Shutdown::is_ready`](crate::Shutdown::is_ready) returns false, which a readiness probe
    /// should report. A second stop ends the delay. A partial stop has no delay. Default: zero.
    ///
    /// During the probation of an upgrade, a stop signal to the whole process group, for example Ctrl-C in a terminal,
    /// counts as one stop although it reaches both generations.
    pub fn stop_delay(&mut self, time: Duration) -> &mut Self {
        self.options.stop_delay = time;
        self
    }

    /// Once accepting is over, closes each idle connection at a random moment within `window` after its grace period,
    /// so that their clients do not all reconnect at the same time
    /// ([`Shutdown::next_request`](crate::Shutdown::next_request)). Default: zero.
    pub fn spread_drain(&mut self, window: Duration) -> &mut Self {
        self.spread = window;
        self
    }

    /// Sets how the child process is created.
    pub fn spawn(&mut self, spawn: Spawn) -> &mut Self {
        self.options.spawn = spawn;
        self
    }

    /// Sets what carries a handover to a child.
    pub fn transport(&mut self, transport: Transport) -> &mut Self {
        self.options.transport = transport;
        self
    }

    /// Takes over from the process that listens on this Unix socket, see
    /// [`takeover_on_socket`](Self::takeover_on_socket). If no process listens there, this process is a first
    /// generation. A process that an upgrade has started ignores this, because it has a parent.
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

    /// Sets the name of the application. A process never hands over to, or takes over from, a process with another
    /// name. Otherwise two applications whose takeover sockets were mixed up would exchange their listeners. The name
    /// has at most 100 bytes. It is checked only if both sides have a name.
    pub fn application(&mut self, name: impl Into<String>) -> &mut Self {
        let mut name = name.into();
        while name.len() > 100 {
            name.pop();
        }
        self.application = Some(name);
        self
    }

    /// Sets which users may be at the other end of a takeover socket, on both sides. Default:
    /// [`PeerCred::is_same_user_or_root`]. For other users, the socket file must allow the connection too: its mode is
    /// 0600 until the program changes it.
    pub fn trust_peers(&mut self, trust: impl Fn(&PeerCred) -> bool + Send + Sync + 'static) -> &mut Self {
        self.trust = Some(Arc::new(trust));
        self
    }

    /// Sets whether a stop signal that is delivered after a stop ends the [`drain`](crate::Shutdown::drain), which then
    /// returns early. An operator who presses Ctrl-C a second time does not want to wait for the connections. Default:
    /// no.
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
        self.options.second_stop_ends_drain = ends;
        self
    }

    /// Sets what happens when an upgrade is requested while an older generation still drains.
    pub fn overlap(&mut self, overlap: Overlap) -> &mut Self {
        self.options.overlap = overlap;
        self
    }

    /// Calls `observer` at every [`Event`], in order, in a thread named `ecdysis-events`. The library waits until the
    /// call has returned, except for [`Upgrading`](Event::Upgrading), [`Spawned`](Event::Spawned) and
    /// [`Committed`](Event::Committed), because clients may be waiting then. But it waits for at most one second, so an
    /// observer that blocks does not delay an upgrade or a stop any longer. Then up to 256 events are queued, and further
    /// ones are lost. A panic in the observer has no effect.
    pub fn on_event(&mut self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> &mut Self {
        self.observer = Some(Arc::new(observer));
        self
    }
}

impl Ecdysis {
    /// Returns a builder, the start of every program.
    pub fn builder() -> Builder {
        Builder::new()
    }
}
