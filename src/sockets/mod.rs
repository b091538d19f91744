//! The calls with which a program asks for its sockets.
//!
//! They are the same in every generation: a socket that the parent handed over is claimed, and any other is created.

mod by_key;
mod claim;
mod in_use;
mod keep;
mod kind;
mod late;
pub(crate) mod pass;
mod producer;
mod registry;
mod unclaimed;
mod upgrade;

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::Mode;
use rustix::net::SocketType;

pub(crate) use self::late::Late;
use self::registry::Registry;
use crate::error::Error;
use crate::handover::entry::Entry;
use crate::key::Key;
use crate::listen::{self, Bound, Socket, Start};
use crate::logging;
use crate::seqpacket::UnixSeqpacketListener;
use crate::triggers::control::{ControlSocket, TakeoverSocket};

/// The sockets of this generation: creates them, or claims those that the parent handed over.
///
/// [`Starting`](crate::Starting) and [`Ecdysis`](crate::Ecdysis) deref to this. It is a handle: clones share one registry.
///
/// Every listener is a plain std value, close-on-exec, and **nonblocking**. Parent and child share the socket and its
/// mode, so a child that changed the mode would change the parent's accept loop. Accept through
/// [`Shutdown`](crate::Shutdown).
///
/// # In the other generation
///
/// Every socket that is asked for here is handed to the next generation, which gets it by the same call. Order matters
/// only among sockets with the same address. A socket that the next generation has not asked for when it calls `ready`
/// is closed there. A socket that is asked for during an upgrade is not part of that upgrade.
#[derive(Clone, Debug)]
pub struct Sockets {
    registry: Arc<Mutex<Registry>>,
    /// The name that sockets of this handle have.
    label: Option<Arc<str>>,
}

impl Sockets {
    /// In a child (`is_child`), new listeners start to listen at the commit. With `same_paths`, a path leads to the
    /// same file here and in the parent.
    pub(crate) fn new(inherited: Vec<Entry>, is_child: bool, same_paths: bool) -> Self {
        Self { registry: Arc::new(Mutex::new(Registry::new(inherited, is_child, same_paths))), label: None }
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        // No code of the program runs under the lock, so the registry is consistent even after a panic.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a handle whose listeners have this name, which distinguishes several sockets on one address.
    ///
    /// Without names, sockets are matched in the order in which they are asked for. If a new version asks in another
    /// order or for fewer, it gets the wrong sockets, and the library cannot detect that. A named socket is handed over
    /// only to the listener with the same name. If the parent has no socket with that name, one on this address without
    /// a name is handed over.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// // Two ports that the kernel chooses.
    /// let public = starting.named("public").listen_tcp("127.0.0.1:0".parse()?)?;
    /// let admin = starting.named("admin").listen_tcp("127.0.0.1:0".parse()?)?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn named(&self, name: impl AsRef<str>) -> Self {
        Self { registry: self.registry.clone(), label: Some(name.as_ref().into()) }
    }

    /// Returns a TCP listener on `addr`, with SO_REUSEADDR and the system's largest backlog
    /// ([listen(2)](https://man7.org/linux/man-pages/man2/listen.2.html)).
    ///
    /// The listener is nonblocking. std's own [`accept`](TcpListener::accept) and [`incoming`](TcpListener::incoming)
    /// fail with `WouldBlock` whenever no connection is queued. A crate that uses them ends its loop immediately, or
    /// spins: the process is ready, but serves no client. Accept with
    /// [`Shutdown::incoming`](crate::Shutdown::incoming), and pass the *connections* to such a crate; [the
    /// guide](crate::guide::threaded) shows how. Do not make the listener blocking: an old generation would then keep
    /// accepting after an upgrade, because all generations share the mode.
    ///
    /// If a program asks for several listeners on one address, the next generation gets them in the order in which they
    /// were asked for, and logs a warning if it asks for more or fewer. Another order cannot be detected. Use
    /// [`named`](Self::named) to distinguish them.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error of bind(2) or listen(2).
    pub fn listen_tcp(&self, addr: SocketAddr) -> Result<TcpListener, Error> {
        self.build_listen_tcp(addr, |socket, addr| {
            socket.set_reuse_address(true)?;
            socket.bind(addr)?;
            socket.listen(listen::MAX_BACKLOG)?;
            Ok(socket.into())
        })
    }

    /// Returns a TCP listener on `addr`. `build` creates it unless the parent handed it over. `build` may ignore its
    /// socket argument and return another listener. [`Socket`] has an example.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error that `build` returned.
    pub fn build_listen_tcp<F>(&self, addr: SocketAddr, build: F) -> Result<TcpListener, Error>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<TcpListener>,
    {
        self.claim_or(Key::tcp(addr), |start| {
            let listener = build(Socket::new(addr, SocketType::STREAM, start.clone())?, addr)?;
            Ok((OwnedFd::from(listener), None))
        })
        .map(TcpListener::from)
    }

    /// Returns a UDP socket on `addr`. `build` creates it unless the parent handed it over.
    ///
    /// During an upgrade both generations hold it. Receive through
    /// [`Shutdown::recv_from`](crate::Shutdown::recv_from), which leaves datagrams to the generation that serves.
    ///
    /// A socket that this version adds receives from its bind(2) on. Unlike a listener, it cannot wait for the commit.
    /// With SO_REUSEPORT the kernel immediately sends some of the datagrams to it, and they are lost if the upgrade
    /// fails. So keep the number of UDP sockets on one address the same in all versions.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let socket = starting.build_socket_udp("127.0.0.1:0".parse()?, |socket, addr| {
    ///     socket.set_recv_buffer_size(1 << 20)?;
    ///     socket.bind(addr)?;
    ///     Ok(socket.into())
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error that `build` returned.
    pub fn build_socket_udp<F>(&self, addr: SocketAddr, build: F) -> Result<UdpSocket, Error>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<UdpSocket>,
    {
        self.claim_or(Key::udp(addr), |start| {
            let socket = build(Socket::new(addr, SocketType::DGRAM, start.clone())?, addr)?;
            Ok((OwnedFd::from(socket), None))
        })
        .map(UdpSocket::from)
    }

    /// Returns a Unix stream listener at `path`, or at the abstract name after an `@` (unix(7)).
    ///
    /// A stale file, on which no process listens, is replaced; a live one is "address in use". After an upgrade the old
    /// process keeps the file. A final stop removes it if it still belongs to this socket.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let listener = starting.listen_unix(format!("@doc-{}", std::process::id()))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error of bind(2) or listen(2).
    pub fn listen_unix(&self, path: impl AsRef<Path>) -> Result<UnixListener, Error> {
        self.unix(Key::unix(path), SocketType::STREAM, None).map(UnixListener::from)
    }

    /// Returns a Unix seqpacket listener at `path`, under the rules of [`listen_unix`](Self::listen_unix).
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let listener = starting.listen_unix_seqpacket(format!("@records-{}", std::process::id()))?;
    /// let shutdown = starting.shutdown();
    /// std::thread::spawn(move || {
    ///     for connection in shutdown.incoming(&listener) {
    ///         let (connection, mut record) = (connection?, [0; 1024]);
    ///         let length = connection.recv(&mut record)?;
    ///         connection.send(&record[..length])?;
    ///     }
    ///     std::io::Result::Ok(())
    /// });
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error of bind(2) or listen(2).
    pub fn listen_unix_seqpacket(&self, path: impl AsRef<Path>) -> Result<UnixSeqpacketListener, Error> {
        self.unix(Key::unix_seqpacket(path), SocketType::SEQPACKET, None).map(UnixSeqpacketListener::from)
    }

    /// Returns a Unix datagram socket at `path`, under the rules of [`listen_unix`](Self::listen_unix).
    ///
    /// During an upgrade both generations hold it. Receive through
    /// [`Shutdown::recv_from`](crate::Shutdown::recv_from), which leaves datagrams to the generation that serves.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let socket = starting.listen_unix_datagram(format!("@log-{}", std::process::id()))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error of bind(2).
    pub fn listen_unix_datagram(&self, path: impl AsRef<Path>) -> Result<UnixDatagram, Error> {
        self.unix(Key::unix_datagram(path), SocketType::DGRAM, None).map(UnixDatagram::from)
    }

    /// Returns a takeover socket at `path` for a program with its own event loop, which calls
    /// [`Ecdysis::hand_over`](crate::Ecdysis::hand_over) when it is readable. Other programs use
    /// [`Builder::takeover_on_socket`](crate::Builder::takeover_on_socket). Its mode is 0600 from the start.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with the error of bind(2) or listen(2).
    pub fn listen_takeover(&self, path: impl AsRef<Path>) -> Result<TakeoverSocket, Error> {
        self.listen_control(path.as_ref()).map(|socket| TakeoverSocket { socket })
    }

    pub(crate) fn listen_control(&self, path: &Path) -> Result<ControlSocket, Error> {
        let listener = self.unix(Key::unix(path), SocketType::STREAM, Some(Mode::RUSR | Mode::WUSR))?;
        Ok(ControlSocket { path: path.to_owned(), listener: listener.into() })
    }

    fn unix(&self, key: Key, kind: SocketType, mode: Option<Mode>) -> Result<OwnedFd, Error> {
        let path = PathBuf::from(key.name());
        self.claim_or(key, |start| {
            let bound = listen::bind_unix(&path, kind, mode)?;
            if kind != SocketType::DGRAM {
                start.listen(&bound.0, listen::MAX_BACKLOG)?;
            }
            Ok(bound)
        })
    }

    /// Returns the inherited socket with this key, or otherwise the one that `make` creates.
    fn claim_or(&self, key: Key, make: impl FnOnce(&Start) -> io::Result<Bound>) -> Result<OwnedFd, Error> {
        let key = match &self.label {
            Some(label) => key.named(&**label),
            None => key,
        };
        self.claim_or_make(&key, make).map_err(|source| Error::Socket { key, source })
    }

    /// Also creates a socket if the path no longer leads to the inherited one. If that fails, keeps the inherited one,
    /// because clients that have connected to it are in its queue.
    fn claim_or_make(&self, key: &Key, make: impl FnOnce(&Start) -> io::Result<Bound>) -> io::Result<OwnedFd> {
        let lost = self.registry().take_lost(key);
        if lost.is_none() {
            // The inode verifies that it is the parent's socket with this key, whose kind `hold` has checked there. A
            // failed claim must not lead to a bind: for port 0 that would succeed, on another port.
            let inherited = self.registry().claim(key)?;
            if let Some(fd) = inherited {
                logging::debug!("claimed {key} from the parent");
                return Ok(fd);
            }
        }
        match (self.make(key, make), lost) {
            (made, None) => made,
            (Ok(fd), Some(lost)) => {
                logging::warn!("{key} no longer leads to the inherited socket: opened a new one");
                // The parent serves the old socket until it is over.
                let mut registry = self.registry();
                registry.claimed = true;
                registry.retired.push(lost);
                Ok(fd)
            }
            (Err(e), Some(lost)) => {
                logging::warn!("{key} no longer leads to the inherited socket, and a new one cannot be opened: {e}");
                self.registry().claim_lost(key, lost)
            }
        }
    }

    fn make(&self, key: &Key, make: impl FnOnce(&Start) -> io::Result<Bound>) -> io::Result<OwnedFd> {
        let start = self.registry().start();
        let (fd, file) = make(&start).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => self.registry().explain_in_use(key, error),
            _ => error,
        })?;
        self.registry().hold(key, fd.as_fd(), file, start.pending())?;
        logging::debug!("opened {key}");
        Ok(fd)
    }
}
