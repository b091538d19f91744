//! The registry: every socket that the next generation is to get, and how a program asks for one.
//!
//! Asking is the same line of code in every generation: where the parent handed the socket over it is claimed, else it
//! is made. Each socket is held twice, once here for the handover and once by the program.

use std::collections::{HashSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{fstat, Mode};
use rustix::io::{fcntl_dupfd_cloexec, ioctl_fionbio};
use rustix::net::{sockopt, AddressFamily, SocketType};

use crate::error::Error;
use crate::handover::manifest::{Entry, Slot};
use crate::key::{Key, Kind};
use crate::listen::{self, FileId, Socket};
use crate::manager::Manager;
use crate::pass::Producer;
use crate::seqpacket::UnixSeqpacketListener;
use crate::takeover::TakeoverSocket;

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
    /// Made for the next generation when an upgrade begins.
    producers: Vec<(Key, Producer)>,
    /// From the parent or the service manager, until claimed. In the order of the handover, which is as a rule that of
    /// the claims: then each is found at the front.
    inherited: VecDeque<(Key, Held)>,
    /// Keys of what was inherited and closed, for the service manager to forget.
    closed: Vec<(Key, Option<FileId>)>,
    /// Keeps copies of what is ours.
    store: Option<Arc<Manager>>,
    /// The first claim that failed for want of descriptors.
    failed: Option<(Key, io::Error)>,
}

/// A descriptor in the registry.
#[derive(Debug)]
pub(crate) struct Held {
    /// Shared with an upgrade that runs: a socket retired meanwhile keeps its number until that is over.
    fd: Arc<OwnedFd>,
    inode: u64,
    /// The file of a Unix socket that some generation of ours bound.
    file: Option<FileId>,
    /// The name by which a unit of the service manager passed it. The manager has it open for as long as the unit is
    /// active, whatever we do.
    unit: Option<String>,
}

impl Held {
    pub(crate) fn new(fd: OwnedFd, inode: u64, file: Option<FileId>) -> Self {
        Self { fd: Arc::new(fd), inode, file, unit: None }
    }

    pub(crate) fn of_unit(self, unit: Option<String>) -> Self {
        Self { unit, ..self }
    }

    fn duplicate(fd: BorrowedFd<'_>, file: Option<FileId>) -> io::Result<Self> {
        Ok(Self::new(duplicate(fd)?, fstat(fd)?.st_ino, file))
    }
}

impl Sockets {
    pub(crate) fn new(inherited: Vec<(Key, Held)>) -> Self {
        let sockets = Self(Arc::default());
        sockets.inherit_more(inherited);
        sockets
    }

    pub(crate) fn inherit_more(&self, inherited: Vec<(Key, Held)>) {
        let known = &mut self.lock().inherited;
        let mut inodes: HashSet<u64> = known.iter().map(|(_, held)| held.inode).collect();
        for (key, held) in inherited {
            // Two sources may know the very same socket.
            let is_new = |(of, known): &(Key, Held)| known.inode != held.inode || *of != key;
            if inodes.insert(held.inode) || known.iter().all(is_new) {
                known.push_back((key, held));
            }
        }
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

    /// A Unix seqpacket listener at `path`, under the rules of [`listen_unix`](Self::listen_unix).
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
    /// [`Error::Socket`], with what bind(2) or listen(2) said.
    pub fn listen_unix_seqpacket(&self, path: impl AsRef<Path>) -> Result<UnixSeqpacketListener, Error> {
        let path = path.as_ref();
        self.claim_or(Key::unix_seqpacket(path), |_| {
            let (socket, file) = listen::bind_unix(path, SocketType::SEQPACKET, None)?;
            rustix::net::listen(&socket, listen::MAX_BACKLOG)?;
            Ok((socket, file))
        })
        .map(UnixSeqpacketListener::from)
    }

    /// A Unix datagram socket at `path`, under the rules of [`listen_unix`](Self::listen_unix).
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
    /// [`Error::Socket`], with what bind(2) said.
    pub fn listen_unix_datagram(&self, path: impl AsRef<Path>) -> Result<UnixDatagram, Error> {
        let path = path.as_ref();
        self.claim_or(Key::unix_datagram(path), |_| listen::bind_unix(path, SocketType::DGRAM, None))
            .map(UnixDatagram::from)
    }

    /// A takeover socket at `path` for a program with a loop of its own, which calls
    /// [`Ecdysis::hand_over`](crate::Ecdysis::hand_over) when it is readable. Others use
    /// [`Builder::takeover_on_socket`](crate::Builder::takeover_on_socket). Its mode is 0600 from the first moment.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`], with what bind(2) or listen(2) said.
    pub fn listen_takeover(&self, path: impl AsRef<Path>) -> Result<TakeoverSocket, Error> {
        let path = path.as_ref();
        let listener = self.listen_unix_with_mode(path, Some(Mode::RUSR | Mode::WUSR))?;
        Ok(TakeoverSocket { path: path.to_owned(), listener })
    }

    /// Hands a socket to the next generation that came from elsewhere, under a key of the program's choice. There
    /// [`claim`](Self::claim) gives it back; so does `listen_tcp` and its like if the key is theirs. A listener, or a
    /// bound datagram socket, becomes nonblocking by this, through every handle to it.
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
    /// there is none (left); or if there is no free descriptor for it, in which case `ready` fails.
    pub fn claim(&self, key: &Key) -> Option<OwnedFd> {
        self.try_claim(key).unwrap_or_else(|e| {
            log::error!("cannot duplicate the descriptor of {key}: {e}");
            // A program that now binds anew would lose the clients of the one it did not get.
            self.lock().failed.get_or_insert((key.clone(), e));
            None
        })
    }

    fn try_claim(&self, key: &Key) -> io::Result<Option<OwnedFd>> {
        let mut state = self.lock();
        let Some(at) = state.position(key) else { return Ok(None) };
        let fd = duplicate(state.inherited[at].1.fd.as_fd())?;
        let claimed = state.inherited.remove(at);
        state.ours.extend(claimed);
        Ok(Some(fd))
    }

    /// What a claim failed of, if one did and could not say so: then this generation must not serve.
    pub(crate) fn failed_claim(&self) -> Result<(), Error> {
        match self.lock().failed.take() {
            Some((key, source)) => Err(Error::Socket { key, source }),
            None => Ok(()),
        }
    }

    /// Takes every socket with this key out of the registry, so that the next generation does not get it. The program
    /// keeps its own handle, and closes it when it likes; a Unix socket's file it then removes itself. Returns how
    /// many there were.
    pub fn retire(&self, key: &Key) -> usize {
        let mut state = self.lock();
        let State { ours, producers, inherited, store, .. } = &mut *state;
        let before = ours.len() + producers.len();
        ours.retain(|(ours, held)| {
            if let (true, Some(store)) = (ours == key, &store) {
                store.forget(key, held.file);
            }
            ours != key
        });
        producers.retain(|(held, _)| held != key);
        inherited.retain(|(inherited, _)| inherited != key);
        before - ours.len() - producers.len()
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
        self.pass(Key::fd(name), fd.as_fd())
    }

    /// Takes the descriptor that the parent passed by this name. It is the program's alone then: the next generation
    /// gets it only if it is passed again.
    pub fn take_fd(&self, name: impl AsRef<OsStr>) -> Option<OwnedFd> {
        self.take(&Key::fd(name))
    }

    /// Hands a duplicate of `fd` to the next generation, in the place of what had the same key.
    pub(crate) fn pass(&self, key: Key, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let held = check_name(&key).and_then(|()| Held::duplicate(fd, None));
        let held = held.map_err(|source| Error::Socket { key: key.clone(), source })?;
        let mut state = self.lock();
        state.ours.retain(|(held, _)| held != &key);
        state.ours.push((key, held));
        Ok(())
    }

    /// Has `producer` make a descriptor for the next generation at every upgrade, in the place of what had the same key.
    pub(crate) fn pass_produced(&self, key: Key, producer: Producer) -> Result<(), Error> {
        check_name(&key).map_err(|source| Error::Socket { key: key.clone(), source })?;
        let mut state = self.lock();
        state.producers.retain(|(held, _)| held != &key);
        state.producers.push((key, producer));
        Ok(())
    }

    /// Takes what the parent handed over under this key, for good.
    pub(crate) fn take(&self, key: &Key) -> Option<OwnedFd> {
        let mut state = self.lock();
        let at = state.position(key)?;
        let (_, held) = state.inherited.remove(at)?;
        drop(state);
        // Shared only if an upgrade is handing it on just now.
        Arc::try_unwrap(held.fd).or_else(|shared| duplicate(shared.as_fd())).ok()
    }

    /// Whether something is left that a unit passed by this name.
    #[cfg(all(feature = "systemd_sockets", feature = "tokio_ecdysis"))]
    pub(crate) fn has_passed(&self, name: &str) -> bool {
        self.lock().inherited.iter().any(|(_, held)| held.unit.as_deref() == Some(name))
    }

    /// Claims the first socket that a unit passed by this name and `wanted` picks.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn claim_from_unit(
        &self,
        name: &str,
        wanted: impl Fn(&Key) -> bool,
    ) -> io::Result<Option<(Key, OwnedFd)>> {
        let mut state = self.lock();
        let is_it = |(key, held): &(Key, Held)| held.unit.as_deref() == Some(name) && wanted(key);
        let Some(at) = state.inherited.iter().position(is_it) else { return Ok(None) };
        let (key, held) = &state.inherited[at];
        let claimed = (key.clone(), duplicate(held.fd.as_fd())?);
        let held = state.inherited.remove(at);
        state.ours.extend(held);
        Ok(Some(claimed))
    }

    /// The inherited socket with this key, else what `make` makes: the fork in a listener's life.
    fn claim_or(
        &self,
        key: Key,
        make: impl FnOnce(&Key) -> io::Result<(OwnedFd, Option<FileId>)>,
    ) -> Result<OwnedFd, Error> {
        let claimed = (|| {
            // Its inode says that it is what the parent held under this key, and `hold` checked it when it got there. A
            // failed claim must not become a bind: on port 0 that succeeds, elsewhere.
            if let Some(fd) = self.try_claim(&key)? {
                log::debug!("claimed {key} from the parent");
                return Ok(fd);
            }
            let (fd, file) = make(&key).map_err(|e| self.explain(e))?;
            self.hold(&key, fd.as_fd(), file)?;
            log::debug!("opened {key}");
            Ok(fd)
        })();
        claimed.map_err(|source| Error::Socket { key, source })
    }

    fn hold(&self, key: &Key, fd: BorrowedFd<'_>, file: Option<FileId>) -> io::Result<()> {
        check_kind(key.kind(), fd)?;
        if key.kind().has_address() {
            // Before any other generation has it: the mode is that of all who hold the socket.
            ioctl_fionbio(fd, true)?;
        }
        let held = Held::duplicate(fd, file)?;
        let mut state = self.lock();
        if let Some(store) = &state.store {
            store.keep(key, held.fd.as_fd(), held.file);
        }
        state.ours.push((key.clone(), held));
        Ok(())
    }

    /// Leaves the files of the Unix sockets with this key alone at a final stop: they go on to be listened on.
    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn keep_files(&self, key: &Key) {
        for (_, held) in self.lock().ours.iter_mut().filter(|(held, _)| held == key) {
            held.file = None;
        }
    }

    /// "Address in use" by the service manager, which passed a socket that is not quite what was asked for, is a riddle
    /// unless both are named.
    fn explain(&self, error: io::Error) -> io::Error {
        let passed = self.passed();
        if error.kind() != io::ErrorKind::AddrInUse || passed.is_empty() {
            return error;
        }
        let why = format!("{error}; the service manager passed {passed}, which nobody has asked for");
        io::Error::new(io::ErrorKind::AddrInUse, why)
    }

    /// What a unit passed and nobody claimed, in words.
    pub(crate) fn passed(&self) -> String {
        let state = self.lock();
        let units = state.inherited.iter();
        let mut words: Vec<_> =
            units.filter_map(|(key, held)| Some(format!("{key} as {:?}", held.unit.as_ref()?))).collect();
        words.sort();
        words.join(", ")
    }

    /// Closes what nobody claimed: else the kernel would go on to complete handshakes that nobody serves. What a unit
    /// passed stays for the next generation to claim: the manager has it open anyhow, and passes it only once.
    pub(crate) fn close_unclaimed(&self) {
        let passed = self.passed();
        if !passed.is_empty() {
            log::warn!("the service manager passed {passed}, which nobody has asked for");
        }
        let mut state = self.lock();
        let State { inherited, closed, .. } = &mut *state;
        inherited.retain(|(key, held)| {
            if held.unit.is_none() {
                log::info!("closed an inherited and unclaimed {key}");
                closed.push((key.clone(), held.file));
            }
            held.unit.is_some()
        });
    }

    /// Has the service manager forget, too, what was of no use.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn forget_later(&self, stale: Vec<(Key, Option<FileId>)>) {
        self.lock().closed.extend(stale);
    }

    /// From now on `store` keeps a copy of every socket that is made here, and forgets what is retired. It need not keep
    /// what a unit keeps.
    pub(crate) fn store_in(&self, store: Arc<Manager>) {
        let mut state = self.lock();
        // By name all of a name are forgotten, also those that we have; so that comes first.
        for (key, file) in std::mem::take(&mut state.closed) {
            store.forget(&key, file);
        }
        let ours = state.ours.iter();
        let own: Vec<_> = ours.filter(|(key, held)| held.unit.is_none() && key.kind().has_address()).collect();
        if own.len() > store.room() {
            log::warn!("{} sockets, but FileDescriptorStoreMax= is {}", own.len(), store.room());
        }
        for (key, held) in own {
            store.keep(key, held.fd.as_fd(), held.file);
        }
        state.store = Some(store);
    }

    /// Lets go of every socket. What a successor holds stays open there; the program's own handles are its own.
    pub(crate) fn close_all(&self) {
        let mut state = self.lock();
        state.ours.clear();
        state.producers.clear();
        state.inherited.clear();
    }

    /// At a stop: removes the files of those of our Unix sockets, unless the sockets outlive us in a store.
    pub(crate) fn unlink(&self, which: impl Fn(&Key) -> bool) {
        let state = self.lock();
        if state.store.is_some() {
            return;
        }
        for (key, held) in state.ours.iter().filter(|(key, _)| which(key)) {
            if let Some(file) = held.file {
                let path = Path::new(OsStr::from_bytes(key.name()));
                if let Err(e) = listen::unlink_if_ours(path, file) {
                    log::warn!("cannot remove {}: {e}", path.display());
                }
            }
        }
    }

    /// What an upgrade would hand over, without producing it.
    pub(crate) fn keys(&self) -> Vec<Key> {
        let state = self.lock();
        let producers = state.producers.iter().map(|(key, _)| key);
        state.ours.iter().map(|(key, _)| key).chain(producers).cloned().collect()
    }

    /// What an upgrade hands over: the manifest's entries, and the descriptors they name, in the same order. State is
    /// produced now, so that it is fresh.
    pub(crate) fn snapshot(&self) -> Result<(Vec<Entry>, Vec<Arc<OwnedFd>>), Error> {
        let entry = |key: &Key, held: &Held| {
            let slot = Slot { number: held.fd.as_raw_fd() as u32, inode: held.inode };
            (Entry { slot, key: key.clone(), file: held.file, unit: held.unit.clone() }, held.fd.clone())
        };
        let (mut all, producers): (Vec<_>, _) = {
            let state = self.lock();
            let ours = state.ours.iter().map(|(key, held)| (key, held));
            // Inherited and still here is what a unit passed and nobody has asked for yet.
            let unclaimed = state.inherited.iter().map(|(key, held)| (key, held));
            (ours.chain(unclaimed).map(|(key, held)| entry(key, held)).collect(), state.producers.clone())
        };
        for (key, producer) in producers {
            let fd = producer.produce(&key)?;
            let inode = fstat(&fd).map_err(|e| Error::Socket { key: key.clone(), source: e.into() })?.st_ino;
            all.push(entry(&key, &Held::new(fd, inode, None)));
        }
        Ok(all.into_iter().unzip())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the program's runs under the lock, so the state is whole even then.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The longest name of a program's choice, in bytes.
const MAX_NAME: usize = 255;

fn check_name(key: &Key) -> io::Result<()> {
    if key.name().len() > MAX_NAME {
        let reason = format!("the name is longer than {MAX_NAME} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(())
}

impl State {
    /// Where the first inherited socket with this key is.
    fn position(&self, key: &Key) -> Option<usize> {
        self.inherited.iter().position(|(inherited, _)| inherited == key)
    }
}

/// The lowest number from 3 up: numbers must not climb with the generations.
fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(fd, 3)?)
}

/// A socket of the wrong kind would only fail much later, in the accept loop.
pub(crate) fn check_kind(kind: Kind, fd: BorrowedFd<'_>) -> io::Result<()> {
    const IP: &[AddressFamily] = &[AddressFamily::INET, AddressFamily::INET6];
    const UNIX: &[AddressFamily] = &[AddressFamily::UNIX];
    const ANY: &[AddressFamily] = &[AddressFamily::INET, AddressFamily::INET6, AddressFamily::UNIX];
    let (families, socket_type, listening) = match kind {
        Kind::Tcp => (IP, SocketType::STREAM, true),
        Kind::Udp => (IP, SocketType::DGRAM, false),
        Kind::Unix => (UNIX, SocketType::STREAM, true),
        Kind::Seqpacket => (UNIX, SocketType::SEQPACKET, true),
        Kind::UnixDatagram | Kind::DatagramPair => (UNIX, SocketType::DGRAM, false),
        Kind::Stream => (ANY, SocketType::STREAM, false),
        // No socket; bytes prove themselves when they are read.
        Kind::Bytes | Kind::Fd | Kind::Drain => return Ok(()),
    };
    if sockopt::socket_type(fd)? == socket_type
        && families.contains(&sockopt::socket_domain(fd)?)
        && sockopt::socket_acceptconn(fd)? == listening
    {
        return Ok(());
    }
    let wanted = if listening { "a listening socket" } else { "a socket" };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not {wanted} of kind {}", kind.word())))
}
