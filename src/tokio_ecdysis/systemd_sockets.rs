//! Sockets that the service manager passed, under the names of version 1.1.1.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process;

use tokio::net::UdpSocket;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use super::gate::StopOnShutdown;
use super::handle::{on_runtime, seqpacket, tcp, unix, TokioEcdysis};
use super::seqpacket::UnixSeqpacketListenerStream;
use super::source::UdpStream;
use super::stream::StoppableStream;
use crate::{Error, Key};

/// Why [`read_systemd_sockets`](super::TokioEcdysisBuilder::read_systemd_sockets) found nothing.
#[derive(Debug)]
pub enum SystemdSocketsReadError {
    /// Nothing was passed, or it cannot be used: the variables are absent or malformed, or name descriptors that are not
    /// open.
    EnvironmentVariableError(String),
    /// It was passed to another process.
    DoesNotMatchListenPid,
    /// This is not the first call.
    DuplicateSystemdSocketsRead,
}

impl fmt::Display for SystemdSocketsReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnvironmentVariableError(why) => write!(f, "the service manager passed nothing usable: {why}"),
            Self::DoesNotMatchListenPid => f.write_str("LISTEN_PID names another process"),
            Self::DuplicateSystemdSocketsRead => {
                f.write_str("the sockets of the service manager have been read before")
            }
        }
    }
}

impl std::error::Error for SystemdSocketsReadError {}

/// Checks that the service manager passed something to this process.
pub(super) fn passed_to_us() -> Result<(), SystemdSocketsReadError> {
    match std::env::var("LISTEN_PID") {
        Ok(pid) if pid == process::id().to_string() => Ok(()),
        Ok(_) => Err(SystemdSocketsReadError::DoesNotMatchListenPid),
        Err(why) => Err(SystemdSocketsReadError::EnvironmentVariableError(format!("LISTEN_PID: {why}"))),
    }
}

/// Why [`systemd_listen_tcp`](super::TokioEcdysis::systemd_listen_tcp) and similar methods found no socket.
#[derive(Debug)]
pub enum SystemdSocketError {
    /// [`read_systemd_sockets`](super::TokioEcdysisBuilder::read_systemd_sockets) was not called, or found nothing.
    SystemdSocketsNotInitialized,
    /// No socket with this name was passed, or all have been claimed. The text lists the sockets that were passed.
    SocketNotFoundInParent(String),
    /// The parent did not hand it over.
    SocketNotFoundInChildRegistry(String),
    /// The underlying OS error.
    IoError(io::Error),
    /// A socket with this name was passed, but its kind or address differs. The text names both.
    SockInfoIncorrect(String),
}

impl fmt::Display for SystemdSocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SystemdSocketsNotInitialized => f.write_str("the sockets of the service manager have not been read"),
            Self::SocketNotFoundInParent(why) | Self::SocketNotFoundInChildRegistry(why) => f.write_str(why),
            Self::SockInfoIncorrect(why) => f.write_str(why),
            Self::IoError(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for SystemdSocketError {}

impl From<io::Error> for SystemdSocketError {
    fn from(error: io::Error) -> Self {
        Self::IoError(error)
    }
}

/// The names that systemd uses if a unit sets none (sd_listen_fds(3)). Version 1.1.1 skips these sockets.
const RESERVED: [&str; 3] = ["unknown", "stored", "connection"];

impl TokioEcdysis {
    /// Returns the connections of the TCP listener on `addr` that a unit passed by this name. It is never created here, see
    /// [`Sockets::systemd_listen_tcp`](crate::Sockets::systemd_listen_tcp).
    ///
    /// # Errors
    ///
    /// The listener was not passed, or there is no runtime here.
    pub async fn systemd_listen_tcp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        addr: SocketAddr,
    ) -> Result<StoppableStream<TcpListenerStream>, SystemdSocketError> {
        let listener =
            self.passed(&name, Key::tcp(addr), |name| self.std_ecdysis().systemd_listen_tcp(name, addr), tcp)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// Returns the connections of the Unix stream listener at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub async fn systemd_listen_unix<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        path: P,
    ) -> Result<StoppableStream<UnixListenerStream>, SystemdSocketError> {
        let path = path.as_ref();
        let listener =
            self.passed(&name, Key::unix(path), |name| self.std_ecdysis().systemd_listen_unix(name, path), unix)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// Returns the connections of the Unix seqpacket listener at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub async fn systemd_listen_unix_seqpacket<P: AsRef<Path>>(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        path: P,
    ) -> Result<StoppableStream<UnixSeqpacketListenerStream>, SystemdSocketError> {
        let path = path.as_ref();
        let make = |name: &str| self.std_ecdysis().systemd_listen_unix_seqpacket(name, path);
        let listener = self.passed(&name, Key::unix_seqpacket(path), make, seqpacket)?;
        Ok(StoppableStream::new(listener, self.shutdown(), stop_on_shutdown))
    }

    /// Returns the UDP socket on `addr` that a unit passed by this name, without the states of the shutdown handle.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub async fn systemd_socket_udp(&self, name: String, addr: SocketAddr) -> Result<UdpSocket, SystemdSocketError> {
        let make = |name: &str| self.std_ecdysis().systemd_socket_udp(name, addr);
        self.passed(&name, Key::udp(addr), make, UdpSocket::from_std)
    }

    /// Returns the datagrams of the UDP socket on `addr` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub async fn systemd_stream_udp(
        &self,
        stop_on_shutdown: StopOnShutdown,
        name: String,
        addr: SocketAddr,
    ) -> Result<StoppableStream<UdpStream>, SystemdSocketError> {
        let stream = UdpStream::new(self.systemd_socket_udp(name, addr).await?);
        Ok(StoppableStream::new(stream, self.shutdown(), stop_on_shutdown))
    }

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
        let nothing_passed = || !self.std_ecdysis().0.generation.reporter.takes_sockets() || passed_to_us().is_err();
        if RESERVED.contains(&name) && (self.is_child() || !nothing_passed()) {
            let why = format!("{name:?} is not a name that a unit has chosen: set FileDescriptorName=");
            return Err(if self.is_child() { SocketNotFoundInChildRegistry(why) } else { SocketNotFoundInParent(why) });
        }
        on_runtime(key, || make(name), register).map_err(|error| match error {
            Error::NotPassed { .. } if self.is_child() => SocketNotFoundInChildRegistry(error.to_string()),
            Error::NotPassed { .. } if nothing_passed() => SystemdSocketsNotInitialized,
            Error::NotPassed { .. } if self.std_ecdysis().registry().has_passed(name) => {
                SockInfoIncorrect(error.to_string())
            }
            Error::NotPassed { .. } => SocketNotFoundInParent(error.to_string()),
            other => SystemdSocketError::IoError(other.into()),
        })
    }
}
