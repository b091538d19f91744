//! Descriptors that a program hands over under a key or name that it chooses.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::Sockets;
use crate::error::Error;
use crate::key::Key;
use crate::logging;

impl Sockets {
    /// Hands a socket that the program has created itself to the next generation, under a key that the program chooses.
    /// There [`claim`](Self::claim) returns it, and so do `listen_tcp` and similar methods if the key is theirs. A
    /// listener or a bound datagram socket becomes nonblocking, for every handle to it.
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
    /// [`Error::Socket`] if the socket is not of the key's kind, or no descriptor is free.
    pub fn adopt(&self, key: Key, socket: impl Into<OwnedFd>) -> Result<(), Error> {
        self.registry().hold(&key, socket.into().as_fd(), None, None).map_err(Error::socket(&key))
    }

    /// Returns a socket that the parent handed over under this key, and keeps it in the registry for the next
    /// generation. `None` if there is none (left), or if no descriptor is free; in the latter case `ready` fails.
    pub fn claim(&self, key: &Key) -> Option<OwnedFd> {
        let mut registry = self.registry();
        registry.claim(key).unwrap_or_else(|e| {
            logging::error!("cannot duplicate the descriptor of {key}: {e}");
            // If the program then bound a new socket, the clients in the queue of the old one would be lost.
            registry.failed.get_or_insert((key.clone(), e));
            None
        })
    }

    /// Removes every socket with this key from the registry, so that the next generation does not get it, and returns
    /// how many there were. The program keeps its own handle. When it closes that, it must remove the file of a Unix
    /// socket itself.
    pub fn retire(&self, key: &Key) -> usize {
        self.registry().retire(key)
    }

    /// Returns the keys of everything that the parent or the service manager handed over and that is not claimed or
    /// taken yet. Use it for connections and state under names that this process cannot know.
    pub fn inherited(&self) -> Vec<Key> {
        self.registry().inherited.iter().map(|entry| entry.key.clone()).collect()
    }

    /// Declares that this version intentionally drops every listener of its parent. Otherwise [`Starting::ready`] fails
    /// if none of them was asked for, because a version with an empty configuration would serve no client. Call this
    /// before `ready`.
    ///
    /// [`Starting::ready`]: crate::Starting::ready
    pub fn discard_inherited(&self) {
        self.registry().discards = true;
    }

    /// Hands any descriptor to the next generation, by name: a lock file, a timer, shared memory. The registry keeps a
    /// duplicate, which replaces an earlier one with the same name.
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
    /// [`Error::Socket`] if no descriptor is free, or the name is longer than 255 bytes.
    pub fn pass_fd(&self, name: impl AsRef<OsStr>, fd: impl AsFd) -> Result<(), Error> {
        self.pass(&Key::fd(name), fd.as_fd())
    }

    /// Returns the descriptor that the parent passed by this name, and removes it from the registry: the next generation
    /// gets it only if it is passed again.
    pub fn take_fd(&self, name: impl AsRef<OsStr>) -> Option<OwnedFd> {
        self.take(&Key::fd(name))
    }

    pub(super) fn pass(&self, key: &Key, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.registry().replace(key, fd).map_err(Error::socket(key))
    }

    pub(super) fn take(&self, key: &Key) -> Option<OwnedFd> {
        self.registry().take(key)
    }
}
