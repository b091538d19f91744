//! State that a program hands over besides its listeners: connections, bytes, and a pair that links two generations.

use std::error::Error as StdError;
use std::ffi::OsStr;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType};

use super::kind::check_kind;
use super::producer::Producer;
use super::Sockets;
use crate::error::Error;
use crate::handover::blob;
use crate::key::{Key, Kind};
use crate::logging;
use crate::sys;

impl Sockets {
    /// Hands bytes to the next generation, where [`take_bytes`](Self::take_bytes) returns them: a cache, counters, a
    /// list of other passed items. `produce` is called once in every upgrade, before the child is started, in the
    /// thread that upgrades. Changes after that call are not included. An earlier callback with the same name is
    /// replaced.
    ///
    /// The bytes are handed over in a sealed memory file, at most 64 MiB. If `produce` fails or panics, the upgrade fails
    /// with [`Error::State`], and this process keeps serving.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use std::sync::Arc;
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let served = Arc::new(AtomicU64::new(0));
    /// if let Some(bytes) = starting.take_bytes("served")? {
    ///     served.store(std::str::from_utf8(&bytes)?.parse()?, Ordering::Relaxed);
    /// }
    /// starting.pass_bytes("served", move || {
    ///     Ok::<_, std::io::Error>(served.load(Ordering::Relaxed).to_string().into_bytes())
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if the name is longer than 255 bytes.
    pub fn pass_bytes<E>(
        &self,
        name: impl AsRef<OsStr>,
        produce: impl Fn() -> Result<Vec<u8>, E> + Send + Sync + 'static,
    ) -> Result<(), Error>
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        self.produce(name.as_ref(), false, move || produce().map_err(Into::into))
    }

    /// Hands bytes to the next generation like [`pass_bytes`](Self::pass_bytes), but produces them at the commit: after
    /// this process has stopped accepting, and before the child may serve. So they can be exact: they include
    /// everything that was accepted, read or written. The child gets them from [`take_bytes`](Self::take_bytes) only
    /// after `ready` has returned.
    ///
    /// `produce` runs in a separate thread. While accepting is paused (`Shutdown`), it may wait until the program's own
    /// threads no longer use their connections, and then pass them. Everything that is passed with
    /// [`pass_stream`](Self::pass_stream) and [`pass_fd`](Self::pass_fd) before the last of these callbacks returns is
    /// part of this upgrade, and the child takes it after `ready` too ([`inherited`](Self::inherited) lists it). If the
    /// upgrade fails, it stays passed: [`retire`](Self::retire) it at
    /// [`Event::UpgradeFailed`](crate::Event::UpgradeFailed).
    ///
    /// All callbacks together have 3 seconds. If one fails, panics or takes longer, the upgrade fails with
    /// [`Error::State`], and this process keeps serving. The thread of a callback that hangs remains.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::collections::BTreeMap;
    /// use std::sync::{Arc, Mutex};
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let map = Arc::new(Mutex::new(BTreeMap::<String, String>::new()));
    /// starting.pass_bytes_at_commit("map", {
    ///     let map = map.clone();
    ///     move || Ok::<_, std::io::Error>(format!("{:?}", map.lock().unwrap()).into_bytes())
    /// })?;
    /// let server = starting.ready()?;
    /// if let Some(bytes) = server.take_bytes("map")? {
    ///     // Parse them into `map` before the first request is answered.
    ///     println!("{} bytes from the old version", bytes.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if the name is longer than 255 bytes.
    pub fn pass_bytes_at_commit<E>(
        &self,
        name: impl AsRef<OsStr>,
        produce: impl Fn() -> Result<Vec<u8>, E> + Send + Sync + 'static,
    ) -> Result<(), Error>
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        self.produce(name.as_ref(), true, move || produce().map_err(Into::into))
    }

    fn produce(
        &self,
        name: &OsStr,
        at_commit: bool,
        callback: impl Fn() -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let key = Key::bytes(name);
        let producer = Producer { key: key.clone(), at_commit, callback: Arc::new(callback) };
        self.registry().produce(producer).map_err(Error::socket(&key))
    }

    /// Returns the bytes that the parent passed by this name; `None` if there are none. The next generation gets only
    /// what this one passes. Call this before `ready`, which drops everything that was not taken. For bytes that were
    /// passed [at the commit](Self::pass_bytes_at_commit), call it after `ready`.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if the parent did not pass a sealed memory file of at most 64 MiB, or there is no memory for
    /// it; or if the parent ended, or did not answer, before it could pass its state at the commit.
    pub fn take_bytes(&self, name: impl AsRef<OsStr>) -> Result<Option<Vec<u8>>, Error> {
        let key = Key::bytes(name);
        let bytes = match self.take(&key) {
            Some(fd) => blob::open(fd, blob::LIMIT).map(Some),
            None if self.registry().late_is_incomplete => {
                let why = "the parent did not pass its state at the commit";
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, why))
            }
            None => Ok(None),
        };
        bytes.map_err(Error::socket(&key))
    }

    /// Hands a connection to the next generation, by name. The registry keeps a duplicate, which replaces an earlier
    /// one with the same name.
    ///
    /// The program is responsible for three things, because only it knows its protocol:
    ///
    /// - The duplicate keeps the connection open. When the connection ends, [`retire`](Self::retire) it by
    ///   [`Key::stream`]; otherwise its peer never sees the end.
    /// - From the commit on the connection belongs to the child. Stop reading and writing at
    ///   [`Event::Committed`](crate::Event::Committed). An [`Event::UpgradeFailed`](crate::Event::UpgradeFailed) after
    ///   it returns the connection to this process. The child must not use it until `ready` has returned. If there is
    ///   data that was read but not handled, or that is buffered for writing, pass it with
    ///   [`pass_bytes`](Self::pass_bytes).
    /// - Both processes share the connection and its blocking mode. Never call `shutdown` on a connection that was
    ///   passed.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::os::unix::net::UnixStream;
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let upstream = match starting.take_stream::<UnixStream>("upstream")? {
    ///     Some(stream) => stream,
    ///     None => UnixStream::pair()?.0, // connect
    /// };
    /// starting.pass_stream("upstream", &upstream)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if no descriptor is left, or the name is longer than 255 bytes.
    pub fn pass_stream<S: Stream>(&self, name: impl AsRef<OsStr>, stream: &S) -> Result<(), Error> {
        self.pass(&Key::stream(name), stream.as_fd())
    }

    /// Returns the connection that the parent passed by this name; `None` if there is none. The next generation gets it
    /// only if it is passed again. Call this before `ready`, which closes connections that were not taken.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if it is not a connection of the requested type.
    pub fn take_stream<S: Stream>(&self, name: impl AsRef<OsStr>) -> Result<Option<S>, Error> {
        let key = Key::stream(name);
        let stream = self.take(&key).map(|fd| {
            check_kind(Kind::Stream, fd.as_fd(), false)?;
            let is_unix = sys::net::family(&fd)? == AddressFamily::UNIX;
            if is_unix != S::UNIX {
                let reason = if is_unix { "a Unix connection, not TCP" } else { "a TCP connection, not Unix" };
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
            Ok(S::from(fd))
        });
        stream.transpose().map_err(Error::socket(&key))
    }

    /// Creates a link in a chain of Unix datagram pairs through the generations. The first returned socket is connected
    /// to the parent, if the parent has created a pair with this name. The second is connected to the next child, if
    /// that asks for this name.
    ///
    /// After a failed upgrade the next child gets the same end, with the datagrams in it. Another call with the same
    /// name replaces the pair with a new one.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().start()?;
    /// let (to_parent, to_child) = starting.unix_datagram_pair("chain");
    /// if let Some(parent) = to_parent {
    ///     parent.send(b"hello from the next generation")?;
    /// }
    /// let to_child = to_child?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The second is [`Error::Socket`] if no descriptor is free for a pair, or the name is longer than 255 bytes. The
    /// first is still valid in that case.
    pub fn unix_datagram_pair(&self, name: impl AsRef<OsStr>) -> (Option<UnixDatagram>, Result<UnixDatagram, Error>) {
        let key = Key::from_parts(Kind::DatagramPair, name.as_ref().as_encoded_bytes());
        let to_parent = self.take(&key).and_then(|fd| match check_kind(Kind::DatagramPair, fd.as_fd(), false) {
            Ok(()) => Some(UnixDatagram::from(fd)),
            Err(e) => {
                logging::warn!("{key} from the parent: {e}");
                None
            }
        });
        let pair = sys::net::socketpair(SocketType::DGRAM, sys::Mode::Blocking);
        let to_child = pair.map_err(Error::socket(&key)).and_then(|(ours, childs)| {
            self.pass(&key, childs.as_fd())?;
            Ok(ours.into())
        });
        (to_parent, to_child)
    }
}

/// A connection that [`Sockets::pass_stream`] accepts: [`TcpStream`] or [`UnixStream`].
pub trait Stream: AsFd + From<OwnedFd> + sealed::Sealed {
    /// Whether it is a Unix socket.
    #[doc(hidden)]
    const UNIX: bool;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for std::net::TcpStream {}
    impl Sealed for std::os::unix::net::UnixStream {}
}

impl Stream for TcpStream {
    const UNIX: bool = false;
}

impl Stream for UnixStream {
    const UNIX: bool = true;
}
