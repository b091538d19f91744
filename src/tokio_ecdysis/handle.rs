//! The handle of a generation: sockets as streams, and calls as futures.

use std::ffi::OsStr;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket, UnixDatagram, UnixListener};
use tokio::runtime::Handle;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use super::gate::StopOnShutdown;
use super::seqpacket::{UnixSeqpacketListener, UnixSeqpacketListenerStream};
use super::socket::Socket;
use super::source::{Source, UdpStream};
use super::stoppable::Stoppable;
use super::stream::StoppableStream;
use super::thread::{in_thread, thread_ended};
use crate::shutdown::Shutdown;
use crate::{Ecdysis, Error, Key, Upgraded};

/// The shared handle of a generation: sockets as streams, and calls.
///
/// Its listeners are handed to the next generation, which gets each one by asking for the same address, see
/// [`Sockets`](crate::Sockets).
///
/// # Panics
///
/// Like Tokio's own listeners, those created here panic on a runtime without `enable_io`.
pub struct TokioEcdysis {
    pub(super) ecdysis: Ecdysis,
}

impl TokioEcdysis {
    /// Returns whether this process was started by an upgrade.
    pub fn is_child(&self) -> bool {
        self.ecdysis.is_child()
    }

    /// Returns the number of this process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.ecdysis.generation()
    }

    /// Returns the synchronous handle, for std sockets and everything that has no asynchronous form. Its listeners are
    /// nonblocking: accept through [`shutdown`](Self::shutdown).
    pub fn std_ecdysis(&self) -> &Ecdysis {
        &self.ecdysis
    }

    /// Returns the shutdown handle, for threads and to count connections ([`guard`](Shutdown::guard)).
    pub fn shutdown(&self) -> Shutdown {
        self.ecdysis.shutdown()
    }

    /// Resolves when accepting is over: after the probation of a successful upgrade, or at a stop. Needs no runtime.
    pub fn over(&self) -> impl Future<Output = ()> + Send + Unpin + 'static {
        self.shutdown().over()
    }

    /// Upgrades now and waits for the outcome, see [`Ecdysis::upgrade`]. Dropping the future does not end the upgrade.
    ///
    /// # Errors
    ///
    /// As for [`Ecdysis::upgrade`], and [`Error::Prepare`] if no thread can be started.
    pub async fn upgrade(&self) -> Result<Upgraded, Error> {
        let ecdysis = self.ecdysis.clone();
        in_thread("ecdysis-upgrade", move || ecdysis.upgrade())?.await.map_err(thread_ended)?
    }

    /// Stops, see [`Ecdysis::stop`]. Does not block: await the exit future or [`over`](Self::over).
    pub fn stop(&self) {
        let ecdysis = self.ecdysis.clone();
        // It may have to finish an upgrade first, and no thread of the runtime should wait for that.
        if in_thread("ecdysis-stop", move || ecdysis.stop()).is_err() {
            self.ecdysis.stop();
        }
    }

    /// Waits until every stream has ended and every guard is dropped, see [`Shutdown::drain`]. Returns the remaining
    /// number.
    ///
    /// # Errors
    ///
    /// [`Error::Prepare`] if no thread can be started.
    pub async fn drain(&self, deadline: Duration) -> Result<usize, Error> {
        let shutdown = self.shutdown();
        in_thread("ecdysis-drain", move || shutdown.drain(deadline))?.await.map_err(thread_ended)
    }

    /// Waits until the parent has ended, see [`Ecdysis::wait_for_parent`].
    ///
    /// # Errors
    ///
    /// As for [`Ecdysis::wait_for_parent`], and [`Error::Prepare`] if no thread can be started.
    pub async fn wait_for_parent(&self, deadline: Duration) -> Result<(), Error> {
        let ecdysis = self.ecdysis.clone();
        in_thread("ecdysis-parent", move || ecdysis.wait_for_parent(deadline))?.await.map_err(thread_ended)?
    }

    /// Asks the service manager to extend the current start or stop timeout to `extension` from now.
    ///
    /// Does nothing without
    /// [`enable_systemd_notifications`](super::TokioEcdysisBuilder::enable_systemd_notifications), and nothing in a process
    /// whose messages the manager ignores: a child before it is announced, whose parent extends the timeout; and a process
    /// that was replaced.
    ///
    /// # Errors
    ///
    /// The message was not sent.
    #[cfg(feature = "systemd_notify")]
    pub async fn extend_systemd_timeouts(&self, extension: Duration) -> io::Result<()> {
        self.ecdysis.extend_timeout(extension).map_err(io::Error::other)
    }

    /// Listens on `addr` and returns the connections, see [`Sockets::listen_tcp`](crate::Sockets::listen_tcp).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2) or listen(2), or because there is no runtime here.
    pub fn listen_tcp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        addr: SocketAddr,
    ) -> io::Result<StoppableStream<TcpListenerStream>> {
        self.stream(stop_on_shutdown, Key::tcp(addr), || self.ecdysis.listen_tcp(addr), tcp)
    }

    /// Like [`listen_tcp`](Self::listen_tcp), with a socket from `sock_build` unless the parent handed it over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of `sock_build`, or because there is no runtime here.
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

    /// Listens on the Unix stream socket at `path`, or at an abstract name after an `@`, and returns the connections, see
    /// [`Sockets::listen_unix`](crate::Sockets::listen_unix).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2) or listen(2), or because there is no runtime here.
    pub fn listen_unix<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        path: P,
    ) -> io::Result<StoppableStream<UnixListenerStream>> {
        let path = path.as_ref();
        self.stream(stop_on_shutdown, Key::unix(path), || self.ecdysis.listen_unix(path), unix)
    }

    /// Listens on the Unix seqpacket socket at `path`, or at an abstract name after an `@`, and returns the
    /// connections, see [`Sockets::listen_unix_seqpacket`](crate::Sockets::listen_unix_seqpacket).
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of bind(2) or listen(2), or because there is no runtime here.
    pub fn listen_unix_seqpacket<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        path: P,
    ) -> io::Result<StoppableStream<UnixSeqpacketListenerStream>> {
        let path = path.as_ref();
        let make = || self.ecdysis.listen_unix_seqpacket(path);
        self.stream(stop_on_shutdown, Key::unix_seqpacket(path), make, seqpacket)
    }

    /// Returns two ends of a chain of datagram sockets through the generations: the first is connected to the parent's pair
    /// of this name, if it created one; the second to the future child, see
    /// [`Sockets::unix_datagram_pair`](crate::Sockets::unix_datagram_pair).
    ///
    /// # Errors
    ///
    /// Each end has its own: [`Error::Socket`], or the error of epoll_ctl(2).
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

    /// Returns the datagrams of a UDP socket on `addr`, which comes from `sock_build` unless the parent handed it over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of `sock_build`, or because there is no runtime here.
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

    /// Returns a UDP socket on `addr` whose operations end when accepting is over. It comes from `sock_build` unless the
    /// parent handed it over.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of `sock_build`, or because there is no runtime here.
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

    fn stream<S, L: Source>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        key: Key,
        make: impl FnOnce() -> Result<S, Error>,
        register: impl FnOnce(S) -> io::Result<L>,
    ) -> io::Result<StoppableStream<L>> {
        let source = on_runtime(key.clone(), make, register)?;
        if stop_on_shutdown == StopOnShutdown::No {
            self.ecdysis.registry().keep_files(&key);
        }
        Ok(StoppableStream::new(source, self.shutdown(), stop_on_shutdown))
    }
}

impl fmt::Debug for TokioEcdysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioEcdysis").field("generation", &self.generation()).finish_non_exhaustive()
    }
}

pub(super) fn tcp(listener: std::net::TcpListener) -> io::Result<TcpListenerStream> {
    TcpListener::from_std(listener).map(TcpListenerStream::new)
}

pub(super) fn unix(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListenerStream> {
    UnixListener::from_std(listener).map(UnixListenerStream::new)
}

pub(super) fn seqpacket(listener: crate::UnixSeqpacketListener) -> io::Result<UnixSeqpacketListenerStream> {
    UnixSeqpacketListener::from_std(listener).map(UnixSeqpacketListenerStream::new)
}

/// Creates a socket and registers it with the current runtime.
pub(super) fn on_runtime<S, L>(
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
