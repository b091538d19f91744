//! Descriptors that a program hands over under a key or a name of its choice.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::Sockets;
use crate::error::Error;
use crate::key::Key;
use crate::logging;

impl Sockets {
    /// Hands a socket that the program made itself to the next generation, under a key of the program's choice. There
    /// [`claim`](Self::claim) returns it; so do `listen_tcp` and the like if the key is theirs. A listener or a bound
    /// datagram socket becomes nonblocking, through every handle to it.
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
        self.hold(key, socket.into().as_fd())
    }

    /// Returns what the parent handed over under this key, and keeps it in the registry for the next generation. `None`
    /// if nothing (more) was handed over, or if no descriptor is free; in that case `ready` fails.
    pub fn claim(&self, key: &Key) -> Option<OwnedFd> {
        let mut registry = self.registry();
        registry.claim(key).unwrap_or_else(|e| {
            logging::error!("cannot duplicate the descriptor of {key}: {e}");
            // A program that binds anew after this would lose the clients in the queue of the old socket.
            registry.failed.get_or_insert((key.clone(), e));
            None
        })
    }

    /// Removes every socket with this key from the registry, so that the next generation does not get it, and returns
    /// how many there were. The program keeps its own handle until it closes it, and then removes the file of a Unix
    /// socket itself.
    pub fn retire(&self, key: &Key) -> usize {
        self.registry().retire(key)
    }

    /// Returns the keys of everything that the parent, or the service manager, handed over and that is not claimed or taken.
    /// For connections and state under names that this process cannot know.
    pub fn inherited(&self) -> Vec<Key> {
        self.registry().inherited.iter().map(|entry| entry.key.clone()).collect()
    }

    /// Declares that this version drops every listener of its parent on purpose. Otherwise [`Starting::ready`] fails if none
    /// of them was asked for, because a version with an empty configuration would leave the clients to nobody. Call this
    /// before `ready`.
    ///
    /// [`Starting::ready`]: crate::Starting::ready
    pub fn discard_inherited(&self) {
        self.registry().discards = true;
    }

    /// Hands any descriptor to the next generation, by name: a lock file, a timer, shared memory. The registry keeps a
    /// duplicate, which replaces an earlier one of the same name.
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
        self.pass(Key::fd(name), fd.as_fd())
    }

    /// Returns the descriptor that the parent passed by this name, and removes it from the registry: the next generation
    /// gets it only if it is passed again.
    pub fn take_fd(&self, name: impl AsRef<OsStr>) -> Option<OwnedFd> {
        self.take(&Key::fd(name))
    }

    pub(super) fn pass(&self, key: Key, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let passed = self.registry().replace(&key, fd);
        passed.map_err(|source| Error::Socket { key, source })
    }

    pub(super) fn take(&self, key: &Key) -> Option<OwnedFd> {
        self.registry().take(key)
    }

    fn hold(&self, key: Key, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let held = self.registry().hold(&key, fd, None, None);
        held.map_err(|source| Error::Socket { key, source })
    }
}
