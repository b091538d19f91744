//! The registry: every socket that the next generation is to get, and how a program asks for one.
//!
//! Asking is the same line of code in every generation: where the parent handed the socket over it is claimed, else it
//! is made. Each socket is held twice, once here for the handover and once by the program.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{fstat, Mode};
use rustix::io::{fcntl_dupfd_cloexec, ioctl_fionbio};
use rustix::net::{sockopt, AddressFamily, SocketType};

use crate::error::Error;
use crate::handover::manifest::{Entry, Slot};
use crate::key::{Key, Kind};
use crate::listen::{self, FileId, Socket};

/// The sockets of this generation: makes them, or claims what the parent handed over.
///
/// [`Starting`](crate::Starting) and [`Ecdysis`](crate::Ecdysis) deref to this. It is a handle: clones share one set.
///
/// Every listener is a plain std value, close-on-exec, and **nonblocking**: parent and child share it, so a child that
/// changed that would change the parent's accept loop. Accept through [`Shutdown`](crate::Shutdown).
///
/// # In the other generation
///
/// What is asked for here is handed to the next generation, which gets it by asking in the same words. Order matters
/// only among sockets with the same address. What the next generation does not ask for before its `ready` is closed
/// there. A socket asked for while an upgrade runs misses that upgrade.
#[derive(Clone, Debug)]
pub struct Sockets(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Handed to the next generation, in the order asked for.
    ours: Vec<(Key, Held)>,
    /// From the parent, until claimed.
    inherited: HashMap<Key, VecDeque<Held>>,
}

/// A descriptor in the registry.
#[derive(Debug)]
pub(crate) struct Held {
    /// Shared with an upgrade that runs: a socket retired meanwhile keeps its number until that is over.
    fd: Arc<OwnedFd>,
    inode: u64,
    /// The file of a Unix socket that some generation of ours bound.
    file: Option<FileId>,
}

impl Held {
    pub(crate) fn new(fd: OwnedFd, inode: u64, file: Option<FileId>) -> Self {
        Self { fd: Arc::new(fd), inode, file }
    }

    fn duplicate(fd: BorrowedFd<'_>, file: Option<FileId>) -> io::Result<Self> {
        Ok(Self::new(duplicate(fd)?, fstat(fd)?.st_ino, file))
    }
}

impl Sockets {
    pub(crate) fn new(inherited: Vec<(Key, Held)>) -> Self {
        let mut state = State::default();
        for (key, held) in inherited {
            state.inherited.entry(key).or_default().push_back(held);
        }
        Self(Arc::new(Mutex::new(state)))
    }

    /// A TCP listener on `addr`, with SO_REUSEADDR and the system's largest backlog.
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
    /// [`Error::Socket`], with what bind(2) or listen(2) said.
    pub fn listen_tcp(&self, addr: SocketAddr) -> Result<TcpListener, Error> {
        self.build_listen_tcp(addr, |socket, addr| {
            socket.set_reuse_address(true)?;
            socket.bind(addr)?;
            socket.listen(listen::MAX_BACKLOG)?;
            Ok(socket.into())
        })
    }

    /// A TCP listener on `addr`, made by `build` unless the parent handed it over. `build` may ignore the socket it
    /// gets and return a listener from elsewhere. [`Socket`] has an example.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what `build` returned.
    pub fn build_listen_tcp<F>(&self, addr: SocketAddr, build: F) -> Result<TcpListener, Error>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<TcpListener>,
    {
        self.claim_or(Key::tcp(addr), |_| {
            let listener = build(Socket::new(addr, SocketType::STREAM)?, addr)?;
            Ok((OwnedFd::from(listener), None))
        })
        .map(TcpListener::from)
    }

    /// A UDP socket on `addr`, made by `build` unless the parent handed it over.
    ///
    /// During an upgrade both generations hold it. Receive through
    /// [`Shutdown::recv_from`](crate::Shutdown::recv_from), which leaves datagrams to the generation that serves.
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
    /// [`Error::Socket`], with what `build` returned.
    pub fn build_socket_udp<F>(&self, addr: SocketAddr, build: F) -> Result<UdpSocket, Error>
    where
        F: FnOnce(Socket, SocketAddr) -> io::Result<UdpSocket>,
    {
        self.claim_or(Key::udp(addr), |_| {
            let socket = build(Socket::new(addr, SocketType::DGRAM)?, addr)?;
            Ok((OwnedFd::from(socket), None))
        })
        .map(UdpSocket::from)
    }

    /// A Unix stream listener at `path`, or at an abstract name after an `@` (unix(7)).
    ///
    /// A stale file, where nobody listens, is replaced; a live one is "address in use". After an upgrade the old
    /// process leaves the file alone; a final stop removes it if it is still this socket's own.
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
    /// [`Error::Socket`], with what bind(2) or listen(2) said.
    pub fn listen_unix(&self, path: impl AsRef<Path>) -> Result<UnixListener, Error> {
        self.listen_unix_with_mode(path.as_ref(), None)
    }

    pub(crate) fn listen_unix_with_mode(&self, path: &Path, mode: Option<Mode>) -> Result<UnixListener, Error> {
        self.claim_or(Key::unix(path), |_| {
            let (socket, file) = listen::bind_unix(path, SocketType::STREAM, mode)?;
            rustix::net::listen(&socket, listen::MAX_BACKLOG)?;
            Ok((socket, file))
        })
        .map(UnixListener::from)
    }

    /// Hands a socket to the next generation that came from elsewhere, under a key of the program's choice. There
    /// [`claim`](Self::claim) gives it back; so does `listen_tcp` and its like if the key is theirs.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// use ecdysis::Key;
    /// let addr = "127.0.0.1:0".parse()?;
    /// let listener = match starting.claim(&Key::tcp(addr)) {
    ///     Some(fd) => fd.into(),
    ///     None => {
    ///         let listener = std::net::TcpListener::bind(addr)?;
    ///         listener.set_nonblocking(true)?;
    ///         starting.adopt(Key::tcp(addr), listener.try_clone()?)?;
    ///         listener
    ///     }
    /// };
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if it is not of the key's kind, or no descriptor is left.
    pub fn adopt(&self, key: Key, socket: impl Into<OwnedFd>) -> Result<(), Error> {
        let fd = socket.into();
        self.hold(&key, fd.as_fd(), None).map_err(|source| Error::Socket { key, source })
    }

    /// Takes what the parent handed over under this key. It stays in the registry for the next generation. `None` if
    /// there is none (left).
    pub fn claim(&self, key: &Key) -> Option<OwnedFd> {
        let mut state = self.lock();
        let held = state.take_inherited(key)?;
        match duplicate(held.fd.as_fd()) {
            Ok(fd) => {
                state.ours.push((key.clone(), held));
                Some(fd)
            }
            Err(e) => {
                log::warn!("cannot duplicate the descriptor of {key}: {e}");
                state.inherited.entry(key.clone()).or_default().push_front(held);
                None
            }
        }
    }

    /// Takes every socket with this key out of the registry, so that the next generation does not get it. The program
    /// keeps its own handle, and closes it when it likes; a Unix socket's file it then removes itself. Returns how
    /// many there were.
    pub fn retire(&self, key: &Key) -> usize {
        let mut state = self.lock();
        let before = state.ours.len();
        state.ours.retain(|(held, _)| held != key);
        before - state.ours.len()
    }

    /// Hands any descriptor to the next generation, by name: a lock file, a timer, a shared memory. The registry keeps
    /// a duplicate; an earlier one of the same name is replaced.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let lock = match starting.take_fd("lock") {
    ///     Some(fd) => std::fs::File::from(fd),
    ///     None => std::fs::File::open("/dev/null")?,
    /// };
    /// starting.pass_fd("lock", &lock)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if no descriptor is left, or the name is longer than 255 bytes.
    pub fn pass_fd(&self, name: impl AsRef<OsStr>, fd: impl AsFd) -> Result<(), Error> {
        let key = Key::fd(name);
        if key.name().len() > MAX_NAME {
            return Err(Error::Socket { key, source: io::ErrorKind::InvalidInput.into() });
        }
        let held = Held::duplicate(fd.as_fd(), None).map_err(|source| Error::Socket { key: key.clone(), source })?;
        let mut state = self.lock();
        state.ours.retain(|(held, _)| held != &key);
        state.ours.push((key, held));
        Ok(())
    }

    /// Takes the descriptor that the parent passed by this name. It is the program's alone then: the next generation
    /// gets it only if it is passed again.
    pub fn take_fd(&self, name: impl AsRef<OsStr>) -> Option<OwnedFd> {
        // Nothing shares an inherited descriptor: only an upgrade does, and only those that are ours.
        Arc::into_inner(self.lock().take_inherited(&Key::fd(name))?.fd)
    }

    /// The inherited socket with this key, else what `make` makes: the fork in a listener's life.
    fn claim_or(
        &self,
        key: Key,
        make: impl FnOnce(&Key) -> io::Result<(OwnedFd, Option<FileId>)>,
    ) -> Result<OwnedFd, Error> {
        let claimed = (|| {
            if let Some(fd) = self.claim(&key) {
                check_kind(key.kind(), fd.as_fd())?;
                log::debug!("claimed {key} from the parent");
                return Ok(fd);
            }
            let (fd, file) = make(&key)?;
            ioctl_fionbio(&fd, true)?;
            self.hold(&key, fd.as_fd(), file)?;
            log::debug!("opened {key}");
            Ok(fd)
        })();
        claimed.map_err(|source| Error::Socket { key, source })
    }

    fn hold(&self, key: &Key, fd: BorrowedFd<'_>, file: Option<FileId>) -> io::Result<()> {
        check_kind(key.kind(), fd)?;
        let held = Held::duplicate(fd, file)?;
        self.lock().ours.push((key.clone(), held));
        Ok(())
    }

    /// Leaves the files of the Unix sockets with this key alone at a final stop: they go on to be listened on.
    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn keep_files(&self, key: &Key) {
        for (_, held) in self.lock().ours.iter_mut().filter(|(held, _)| held == key) {
            held.file = None;
        }
    }

    /// Closes what nobody claimed: else the kernel would go on to complete handshakes that nobody serves.
    pub(crate) fn close_unclaimed(&self) {
        for (key, left) in self.lock().inherited.drain() {
            log::info!("closed {} inherited and unclaimed: {key}", left.len());
        }
    }

    /// Lets go of every socket. What a successor holds stays open there; the program's own handles are its own.
    pub(crate) fn close_all(&self) {
        let mut state = self.lock();
        state.ours.clear();
        state.inherited.clear();
    }

    /// At a final stop: removes the files of our Unix sockets.
    pub(crate) fn unlink_all(&self) {
        for (key, held) in &self.lock().ours {
            if let Some(file) = held.file {
                let path = Path::new(OsStr::from_bytes(key.name()));
                if let Err(e) = listen::unlink_if_ours(path, file) {
                    log::warn!("cannot remove {}: {e}", path.display());
                }
            }
        }
    }

    /// What an upgrade hands over: the manifest's entries, and the descriptors they name.
    pub(crate) fn snapshot(&self) -> (Vec<Entry>, Vec<Arc<OwnedFd>>) {
        let entry = |(key, held): &(Key, Held)| {
            let slot = Slot { number: held.fd.as_raw_fd() as u32, inode: held.inode };
            (Entry { slot, key: key.clone(), file: held.file }, held.fd.clone())
        };
        self.lock().ours.iter().map(entry).unzip()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the program's runs under the lock, so the state is whole even then.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const MAX_NAME: usize = 255;

impl State {
    fn take_inherited(&mut self, key: &Key) -> Option<Held> {
        self.inherited.get_mut(key)?.pop_front()
    }
}

/// The lowest number from 3 up: numbers must not climb with the generations.
fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(fd, 3)?)
}

/// A socket of the wrong kind would only fail much later, in the accept loop.
fn check_kind(kind: Kind, fd: BorrowedFd<'_>) -> io::Result<()> {
    let (socket_type, families): (_, &[AddressFamily]) = match kind {
        Kind::Tcp => (SocketType::STREAM, &[AddressFamily::INET, AddressFamily::INET6]),
        Kind::Udp => (SocketType::DGRAM, &[AddressFamily::INET, AddressFamily::INET6]),
        Kind::Unix => (SocketType::STREAM, &[AddressFamily::UNIX]),
        Kind::Fd | Kind::Drain => return Ok(()),
    };
    let listening = socket_type != SocketType::DGRAM;
    if sockopt::socket_type(fd)? == socket_type
        && families.contains(&sockopt::socket_domain(fd)?)
        && sockopt::socket_acceptconn(fd)? == listening
    {
        return Ok(());
    }
    let wanted = if listening { "a listening socket" } else { "a datagram socket" };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not {wanted} of kind {}", kind.word())))
}
