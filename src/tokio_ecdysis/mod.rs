//! The asynchronous face, feature `tokio_ecdysis`: streams for Tokio, and the end of this generation as a future.
//!
//! The [guide's chapter](crate::guide::tokio) shows a server, when a stream yields, and what differs from version 1.1.1.

mod gate;
mod seqpacket;
mod socket;
mod stream;
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
mod systemd;
mod watch;

use std::ffi::OsStr;
use std::fmt;
use std::future::{poll_fn, Future};
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{mpsc, Arc};
use std::task::{ready, Context, Poll};
use std::thread;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket, UnixDatagram, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use crate::error::chain;
use crate::shutdown::{Phase, Shutdown};
use crate::trigger::{Action, Purpose};
use crate::{Builder, Ecdysis, Error, Exit, Key, Starting, Upgraded};

use self::gate::Gate;
pub use self::gate::StopOnShutdown;
pub use self::seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener, UnixSeqpacketListenerStream};
pub use self::socket::{SockAddr, Socket};
pub use self::stream::{Source, Stoppable, StoppableStream, UdpStream};
#[cfg(feature = "systemd_notify")]
pub use self::systemd::{SystemdNotifier, SystemdNotifierError};
#[cfg(feature = "systemd_sockets")]
pub use self::systemd::{SystemdSocketError, SystemdSocketsReadError};
pub use tokio::signal::unix::SignalKind;

/// Where version 1.1.1 has them too.
pub mod supervisor {
    pub use super::{StopOnShutdown, Stoppable, StoppableStream};
}

/// How a generation's service ended.
#[derive(Debug)]
pub enum ExitMode {
    /// A new generation serves.
    Upgrade,
    /// Nobody serves any more.
    FullStop,
    /// Accepting and triggers have ended; the rest is the program's.
    PartialStop,
    /// The same, and the service manager is the program's too: it has not been told that this process stops.
    #[cfg(feature = "systemd_notify")]
    PartialStopWithSystemd(SystemdNotifier),
}

/// What asked for the upgrade or the stop.
///
/// These two and no more, as in version 1.1.1, whose programs may match both and nothing else. What came neither by a
/// signal nor by a socket has a number that no signal has: [`CALL`](Self::CALL) and [`PARENT`](Self::PARENT).
#[derive(Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// This signal.
    Signal(SignalKind),
    /// A connection to the socket at this path.
    UnixListener(PathBuf),
}

impl ExitReason {
    /// [`TokioEcdysis::upgrade`] or [`TokioEcdysis::stop`].
    pub const CALL: Self = Self::Signal(SignalKind::from_raw(0));
    /// The parent, which was asked to stop during this process's probation.
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

/// What the future of [`TokioEcdysisBuilder::ready`] gives.
pub type TokioEcdysisUpgradeResult = Result<(ExitMode, ExitReason), Error>;

/// For the `?` of programs that pass on the error of 1.1.1, which is a `String`.
impl From<Error> for String {
    fn from(error: Error) -> Self {
        chain(&error)
    }
}

/// A generation that does not serve yet.
///
/// Triggers, PID file and sockets may be chosen in any order. Dropping it gives up: the streams that it gave end
/// without having yielded anything, and in a child the parent hears of it and serves on.
pub struct TokioEcdysisBuilder {
    starting: Starting,
    tokio_ecdysis: TokioEcdysis,
    #[cfg(feature = "systemd_notify")]
    notifier: Option<SystemdNotifier>,
}

impl TokioEcdysisBuilder {
    /// Starts, with one trigger: this signal asks for an upgrade. In a child this takes over what the parent handed
    /// over. Every other choice is the default of [`Builder`]; [`from_builder`](Self::from_builder) takes yours.
    ///
    /// # Errors
    ///
    /// As for [`Builder::start`].
    pub fn new(upgrade_signal_kind: SignalKind) -> io::Result<Self> {
        Ok(Self::from_builder(Builder::new().upgrade_on_signal(upgrade_signal_kind.as_raw_value()))?)
    }

    /// Starts with everything that [`Builder`] knows: deadlines, probation, the next generation's program and
    /// environment, a control socket that answers with the outcome, an observer of events.
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
        let tokio_ecdysis = TokioEcdysis { ecdysis: starting.handle() };
        Ok(Self {
            starting,
            tokio_ecdysis,
            #[cfg(feature = "systemd_notify")]
            notifier: None,
        })
    }

    /// Also upgrades when this signal comes.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`], for one that cannot be handled.
    pub fn upgrade_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::Upgrade)
    }

    /// Stops when this signal comes. May be called for several. During an upgrade the stop wins: the child is ended.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`], for one that cannot be handled.
    pub fn stop_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::Stop)
    }

    /// Ends accepting and the triggers when this signal comes, and leaves the rest to the program, see
    /// [`Builder::partial_stop_on_signal`].
    ///
    /// # Errors
    ///
    /// [`Error::Signal`], for one that cannot be handled.
    pub fn partial_stop_on_signal(&mut self, signal_kind: SignalKind) -> io::Result<()> {
        self.on_signal(signal_kind, Action::PartialStop)
    }

    fn on_signal(&self, kind: SignalKind, action: Action) -> io::Result<()> {
        Ok(self.starting.add_signal(kind.as_raw_value(), action)?)
    }

    /// Upgrades when somebody connects to this Unix socket, and answers with the outcome, see
    /// [`Builder::upgrade_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) said.
    pub fn upgrade_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::Upgrade))
    }

    /// Stops when somebody connects to this Unix socket, see [`Builder::stop_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) said.
    pub fn stop_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::Stop))
    }

    /// Stops partially when somebody connects to this Unix socket, see [`Builder::partial_stop_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) said.
    pub fn partial_stop_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Connect(Action::PartialStop))
    }

    /// One socket for all: the first line of a connection is the command, see [`Builder::control_on_socket`].
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) said.
    pub fn control_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Command)
    }

    /// Hands everything over to a process that connects to this Unix socket and asks, see
    /// [`Builder::takeover_on_socket`]. A program takes over with [`Builder::take_over`] and
    /// [`from_builder`](Self::from_builder).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) said.
    pub fn takeover_on_socket<P: AsRef<Path>>(&mut self, listen_path: P) -> io::Result<()> {
        self.on_socket(listen_path.as_ref(), Purpose::Takeover)
    }

    fn on_socket(&self, path: &Path, meaning: Purpose) -> io::Result<()> {
        Ok(self.starting.add_socket(path, meaning)?)
    }

    /// Keeps the serving process's PID in this file, see [`Builder::pid_file`].
    pub fn set_pid_file<P: AsRef<Path>>(&mut self, pid_file: P) {
        self.starting.set_pid_file(pid_file.as_ref());
    }

    /// Serves from here on: the streams begin to yield. In a child this returns when the parent has stopped accepting,
    /// which takes less than a millisecond unless the parent hangs; then it takes 5 seconds.
    ///
    /// The future gives the reason of the end: by then the streams end, and it is time to finish what is open. One
    /// thread of the library's waits for the triggers and makes the upgrades, so nothing that an upgrade does, and
    /// nothing that the runtime does, holds up the other. Dropping the future changes nothing but that nobody hears
    /// the reason. It needs no runtime.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`], or [`Error::Prepare`] if there can be no thread: this generation does not
    /// serve, and the parent does.
    pub fn ready(self) -> io::Result<(Arc<TokioEcdysis>, ExitFuture)> {
        let (hand, take) = mpsc::sync_channel::<Ecdysis>(1);
        // The thread first: when it cannot be made, nothing has been promised to the parent yet.
        let exit = in_thread("ecdysis", move || match take.recv() {
            Ok(ecdysis) => ecdysis.run(),
            Err(_) => Err(Error::NotReady),
        })?;
        let ecdysis = self.starting.ready()?;
        let _ = hand.send(ecdysis);
        let future = ExitFuture {
            exit,
            #[cfg(feature = "systemd_notify")]
            notifier: self.notifier,
        };
        Ok((Arc::new(self.tokio_ecdysis), future))
    }

    /// Has the service manager hear of what this generation does, see [`Builder::systemd_notify`].
    ///
    /// # Errors
    ///
    /// There is none (`NOTIFY_SOCKET` is not set), or its address is unknown here. A program that also runs without one
    /// goes on.
    #[cfg(feature = "systemd_notify")]
    pub fn enable_systemd_notifications(&mut self) -> Result<(), SystemdNotifierError> {
        let notifier = SystemdNotifier::new()?;
        let enabled = self.starting.enable_manager();
        enabled.map_err(|e| SystemdNotifierError::SocketConnectError(e.into()))?;
        self.notifier = Some(notifier);
        Ok(())
    }

    /// Takes what the service manager passed, before any of it is asked for: the sockets of its units, and, if
    /// notifications are enabled too, those of its store, see [`Builder::systemd_sockets`]. In a child that is done with:
    /// it has them from its parent.
    ///
    /// # Errors
    ///
    /// Nothing was passed, it cannot be used, or this is the second call. A program that also runs without goes on.
    #[cfg(feature = "systemd_sockets")]
    pub fn read_systemd_sockets(&mut self) -> Result<(), SystemdSocketsReadError> {
        let inherited = self.starting.inherit_from_manager();
        let first = inherited.map_err(|e| SystemdSocketsReadError::EnvironmentVariableError(chain(&e)))?;
        if self.is_child() {
            return Ok(());
        }
        systemd::passed_to_us()?;
        first.then_some(()).ok_or(SystemdSocketsReadError::DuplicateSystemdSocketsRead)
    }

    /// Refuses to serve, in words for an operator, see [`Starting::refuse`]. Return the error from `main`.
    pub fn refuse(self, reason: impl fmt::Display) -> Error {
        self.starting.refuse(reason)
    }
}

/// Sockets may be asked for before `ready`, and should be: what is not claimed by then is closed.
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

/// Runs what may block in a thread of its own. The runtime's threads for that would keep the runtime from ending.
fn in_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, Error> {
    let (tell, told) = oneshot::channel();
    let body = move || drop(tell.send(work()));
    match thread::Builder::new().name(name.into()).spawn(body) {
        Ok(_) => Ok(told),
        Err(source) => Err(Error::Prepare { what: "thread", source }),
    }
}

/// Only a panic in the program's own observer ends one of our threads without a word.
fn thread_ended(_: oneshot::error::RecvError) -> Error {
    Error::Wait { source: io::Error::other("the thread for it has panicked") }
}

/// The end of this generation's service, see [`TokioEcdysisBuilder::ready`].
#[derive(Debug)]
pub struct ExitFuture {
    exit: oneshot::Receiver<Result<Exit, Error>>,
    #[cfg(feature = "systemd_notify")]
    notifier: Option<SystemdNotifier>,
}

impl Future for ExitFuture {
    /// The mode and the reason. An [`Error::Wait`] means that no trigger is heard any more; the service goes on.
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

/// The shared handle of a generation: sockets as streams, and calls.
///
/// What is listened on is handed to the next generation, which gets it by listening in the same words, see
/// [`Sockets`](crate::Sockets).
///
/// # Panics
///
/// As Tokio's own listeners do, those made here panic on a runtime that was built without `enable_io`.
pub struct TokioEcdysis {
    ecdysis: Ecdysis,
}

impl TokioEcdysis {
    /// Whether this process was started by an upgrade.
    pub fn is_child(&self) -> bool {
        self.ecdysis.is_child()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.ecdysis.generation()
    }

    /// The synchronous handle, for std sockets and whatever has no asynchronous form. Its listeners are nonblocking:
    /// accept through [`shutdown`](Self::shutdown).
    pub fn std_ecdysis(&self) -> &Ecdysis {
        &self.ecdysis
    }

    /// The shutdown handle, for threads, and to count connections (`guard`).
    pub fn shutdown(&self) -> Shutdown {
        self.ecdysis.shutdown()
    }

    /// Waits until accepting is over: after the probation of a successful upgrade, or at a stop. Needs no runtime.
    pub fn over(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut gate = Gate::new(self.shutdown(), StopOnShutdown::Yes);
        poll_fn(move |cx| match gate.phase(cx) {
            Phase::Wait | Phase::Accept => Poll::Pending,
            Phase::AcceptQueued | Phase::End => Poll::Ready(()),
        })
    }

    /// Upgrades now, and waits for the verdict, see [`Ecdysis::upgrade`]. Dropping the future does not end the upgrade.
    ///
    /// # Errors
    ///
    /// As for [`Ecdysis::upgrade`], and [`Error::Prepare`] if there can be no thread.
    pub async fn upgrade(&self) -> Result<Upgraded, Error> {
        let ecdysis = self.ecdysis.clone();
        in_thread("ecdysis-upgrade", move || ecdysis.upgrade())?.await.map_err(thread_ended)?
    }

    /// Stops, see [`Ecdysis::stop`]. Does not wait.
    pub fn stop(&self) {
        self.ecdysis.stop();
    }

    /// Waits until every stream has ended and every guard is dropped, see [`Shutdown::drain`]; gives how many are left.
    ///
    /// # Errors
    ///
    /// [`Error::Prepare`] if there can be no thread.
    pub async fn drain(&self, deadline: Duration) -> Result<usize, Error> {
        let shutdown = self.shutdown();
        in_thread("ecdysis-drain", move || shutdown.drain(deadline))?.await.map_err(thread_ended)
    }

    /// Waits until the parent has ended, see [`Ecdysis::wait_for_parent`].
    ///
    /// # Errors
    ///
    /// As for [`Ecdysis::wait_for_parent`], and [`Error::Prepare`] if there can be no thread.
    pub async fn wait_for_parent(&self, deadline: Duration) -> Result<(), Error> {
        let ecdysis = self.ecdysis.clone();
        in_thread("ecdysis-parent", move || ecdysis.wait_for_parent(deadline))?.await.map_err(thread_ended)?
    }

    /// Asks the service manager for so much more time to start or to stop, from now on. Nothing happens without
    /// [`enable_systemd_notifications`](TokioEcdysisBuilder::enable_systemd_notifications), nor in a process that the
    /// manager does not listen to: a child before it is announced, whose parent has asked for what an upgrade may take;
    /// and one that was replaced.
    ///
    /// # Errors
    ///
    /// That of the message, which may be lost.
    #[cfg(feature = "systemd_notify")]
    pub async fn extend_systemd_timeouts(&self, extension: Duration) -> io::Result<()> {
        self.ecdysis.extend_timeout(extension).map_err(io::Error::other)
    }

    /// The connections of a TCP listener on `addr`, see [`Sockets::listen_tcp`](crate::Sockets::listen_tcp).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) or listen(2) said, or that there is no runtime here.
    pub fn listen_tcp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        addr: SocketAddr,
    ) -> io::Result<StoppableStream<TcpListenerStream>> {
        self.stream(stop_on_shutdown, Key::tcp(addr), || self.ecdysis.listen_tcp(addr), tcp)
    }

    /// As [`listen_tcp`](Self::listen_tcp), with a socket made by `sock_build` unless the parent handed it over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what `sock_build` returned, or that there is no runtime here.
    pub fn build_listen_tcp<F>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        addr: SocketAddr,
        sock_build: F,
    ) -> io::Result<StoppableStream<TcpListenerStream>>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<std::net::TcpListener>,
    {
        let make = || self.ecdysis.build_listen_tcp(addr, |socket, addr| sock_build(Socket::new(socket), addr));
        self.stream(stop_on_shutdown, Key::tcp(addr), make, tcp)
    }

    /// The connections of a Unix stream listener at `path`, or at an abstract name after an `@`, see
    /// [`Sockets::listen_unix`](crate::Sockets::listen_unix).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) or listen(2) said, or that there is no runtime here.
    pub fn listen_unix<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        path: P,
    ) -> io::Result<StoppableStream<UnixListenerStream>> {
        let path = path.as_ref();
        let stream = self.stream(stop_on_shutdown, Key::unix(path), || self.ecdysis.listen_unix(path), unix)?;
        if stop_on_shutdown == StopOnShutdown::No {
            self.ecdysis.registry().keep_files(&Key::unix(path));
        }
        Ok(stream)
    }

    /// The connections of a Unix seqpacket listener at `path`, or at an abstract name after an `@`, see
    /// [`Sockets::listen_unix_seqpacket`](crate::Sockets::listen_unix_seqpacket).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) or listen(2) said, or that there is no runtime here.
    pub fn listen_unix_seqpacket<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        path: P,
    ) -> io::Result<StoppableStream<UnixSeqpacketListenerStream>> {
        let (path, key) = (path.as_ref(), Key::unix_seqpacket(path.as_ref()));
        let make = || self.ecdysis.listen_unix_seqpacket(path);
        let stream = self.stream(stop_on_shutdown, key.clone(), make, seqpacket)?;
        if stop_on_shutdown == StopOnShutdown::No {
            self.ecdysis.registry().keep_files(&key);
        }
        Ok(stream)
    }

    /// A chain of datagram sockets through the generations: the first end goes to the parent's pair of this name, if it
    /// made one; the second to the future child, see
    /// [`Sockets::unix_datagram_pair`](crate::Sockets::unix_datagram_pair).
    ///
    /// # Errors
    ///
    /// Of each end its own: [`Error::Socket`], or what epoll_ctl(2) says.
    ///
    /// # Panics
    ///
    /// Outside a runtime with I/O, as Tokio's own types do.
    pub fn unix_datagram_pair(
        &self,
        name: impl AsRef<OsStr>,
    ) -> (Option<io::Result<UnixDatagram>>, io::Result<UnixDatagram>) {
        let (to_parent, to_child) = self.ecdysis.unix_datagram_pair(name);
        let register = |socket: std::os::unix::net::UnixDatagram| {
            socket.set_nonblocking(true)?;
            UnixDatagram::from_std(socket)
        };
        (to_parent.map(register), to_child.map_err(io::Error::from).and_then(register))
    }

    /// The datagrams of a UDP socket on `addr`, made by `sock_build` unless the parent handed it over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what `sock_build` returned, or that there is no runtime here.
    pub fn build_stream_udp<F>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        addr: SocketAddr,
        sock_build: F,
    ) -> io::Result<StoppableStream<UdpStream>>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<std::net::UdpSocket>,
    {
        let make = || self.ecdysis.build_socket_udp(addr, |socket, addr| sock_build(Socket::new(socket), addr));
        self.stream(stop_on_shutdown, Key::udp(addr), make, |socket| UdpSocket::from_std(socket).map(UdpStream::new))
    }

    /// A UDP socket on `addr`, made by `sock_build` unless the parent handed it over, whose operations end when it is
    /// over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what `sock_build` returned, or that there is no runtime here.
    pub fn build_stoppable_socket_udp<F>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        addr: SocketAddr,
        sock_build: F,
    ) -> io::Result<Stoppable<UdpSocket>>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<std::net::UdpSocket>,
    {
        let make = || self.ecdysis.build_socket_udp(addr, |socket, addr| sock_build(Socket::new(socket), addr));
        let socket = on_runtime(Key::udp(addr), make, UdpSocket::from_std)?;
        Ok(Stoppable::new(socket, self.shutdown(), stop_on_shutdown))
    }

    /// The connections of the TCP listener on `addr` that a unit passed by this name. It is never made here, see
    /// [`Sockets::systemd_listen_tcp`](crate::Sockets::systemd_listen_tcp).
    ///
    /// # Errors
    ///
    /// It was not passed, or there is no runtime here.
    #[cfg(feature = "systemd_sockets")]
    pub async fn systemd_listen_tcp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        addr: SocketAddr,
    ) -> Result<StoppableStream<TcpListenerStream>, SystemdSocketError> {
        let listener = self.passed(&name, Key::tcp(addr), |name| self.ecdysis.systemd_listen_tcp(name, addr), tcp)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// The connections of the Unix stream listener at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    #[cfg(feature = "systemd_sockets")]
    pub async fn systemd_listen_unix<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        path: P,
    ) -> Result<StoppableStream<UnixListenerStream>, SystemdSocketError> {
        let path = path.as_ref();
        let listener =
            self.passed(&name, Key::unix(path), |name| self.ecdysis.systemd_listen_unix(name, path), unix)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// The connections of the Unix seqpacket listener at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    #[cfg(feature = "systemd_sockets")]
    pub async fn systemd_listen_unix_seqpacket<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        path: P,
    ) -> Result<StoppableStream<UnixSeqpacketListenerStream>, SystemdSocketError> {
        let path = path.as_ref();
        let make = |name: &str| self.ecdysis.systemd_listen_unix_seqpacket(name, path);
        let listener = self.passed(&name, Key::unix_seqpacket(path), make, seqpacket)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// The UDP socket on `addr` that a unit passed by this name, without the states of the shutdown handle.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    #[cfg(feature = "systemd_sockets")]
    pub async fn systemd_socket_udp(&self, name: String, addr: SocketAddr) -> Result<UdpSocket, SystemdSocketError> {
        let make = |name: &str| self.ecdysis.systemd_socket_udp(name, addr);
        self.passed(&name, Key::udp(addr), make, UdpSocket::from_std)
    }

    /// The datagrams of the UDP socket on `addr` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    #[cfg(feature = "systemd_sockets")]
    pub async fn systemd_stream_udp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        addr: SocketAddr,
    ) -> Result<StoppableStream<UdpStream>, SystemdSocketError> {
        let stream = UdpStream::new(self.systemd_socket_udp(name, addr).await?);
        Ok(StoppableStream::new(stream, self.shutdown(), stop_on_shutdown))
    }

    #[cfg(feature = "systemd_sockets")]
    fn passed<S, L>(
        &self,
        name: &str,
        key: Key,
        make: impl FnOnce(&str) -> Result<S, Error>,
        register: impl FnOnce(S) -> io::Result<L>,
    ) -> Result<L, SystemdSocketError> {
        use SystemdSocketError::{
            SockInfoIncorrect, SocketNotFoundInChildRegistry, SocketNotFoundInParent, SystemdSocketsNotInitialized,
        };
        on_runtime(key, || make(name), register).map_err(|error| match error {
            Error::NotPassed { .. } if self.is_child() => SocketNotFoundInChildRegistry(error.to_string()),
            Error::NotPassed { .. } if !self.ecdysis.takes_sockets() || systemd::passed_to_us().is_err() => {
                SystemdSocketsNotInitialized
            }
            Error::NotPassed { .. } if self.ecdysis.registry().has_passed(name) => SockInfoIncorrect(error.to_string()),
            Error::NotPassed { .. } => SocketNotFoundInParent(error.to_string()),
            other => SystemdSocketError::IoError(other.into()),
        })
    }

    fn stream<S, L: Source>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        key: Key,
        make: impl FnOnce() -> Result<S, Error>,
        register: impl FnOnce(S) -> io::Result<L>,
    ) -> io::Result<StoppableStream<L>> {
        let source = on_runtime(key, make, register)?;
        Ok(StoppableStream::new(source, self.shutdown(), stop_on_shutdown))
    }
}

impl fmt::Debug for TokioEcdysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioEcdysis").field("generation", &self.generation()).finish_non_exhaustive()
    }
}

fn tcp(listener: std::net::TcpListener) -> io::Result<TcpListenerStream> {
    TcpListener::from_std(listener).map(TcpListenerStream::new)
}

fn unix(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListenerStream> {
    UnixListener::from_std(listener).map(UnixListenerStream::new)
}

fn seqpacket(listener: crate::UnixSeqpacketListener) -> io::Result<UnixSeqpacketListenerStream> {
    UnixSeqpacketListener::from_std(listener).map(UnixSeqpacketListenerStream::new)
}

/// Makes a socket, and registers it with the runtime that we are on.
fn on_runtime<S, L>(
    key: Key,
    make: impl FnOnce() -> Result<S, Error>,
    register: impl FnOnce(S) -> io::Result<L>,
) -> Result<L, Error> {
    // Tokio would panic without one.
    if let Err(none) = Handle::try_current() {
        return Err(Error::Socket { key, source: io::Error::other(none) });
    }
    register(make()?).map_err(|source| Error::Socket { key, source })
}
