//! The key of a descriptor in a handover: its kind and the address or name that was asked for.

use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::path::DecInt;

/// Kind and address, as **asked for**. A listener on port 0 has port 0 in its key, so that the next generation, which
/// runs the same line of code, gets the same socket. TCP and UDP on one port have different keys. Several sockets may
/// share one key (SO_REUSEPORT). They are claimed in the order in which they were created.
///
/// ```
/// let key = ecdysis::Key::tcp("127.0.0.1:8080".parse().unwrap());
/// assert_eq!(key.to_string(), "tcp 127.0.0.1:8080");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    kind: Kind,
    /// Shared, because every upgrade copies the keys of all sockets that it hands over.
    name: Arc<[u8]>,
    /// The program's name for it, see [`named`](Self::named).
    label: Option<Arc<str>>,
}

/// What a descriptor is used for. [`word`](Self::word) is part of the handover protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Tcp,
    Udp,
    Unix,
    Seqpacket,
    UnixDatagram,
    DatagramPair,
    Stream,
    Bytes,
    Fd,
    /// The socket over which the parent sends state and descriptors at the commit.
    Late,
    /// The link on which an older generation, named by its number, can be asked to end its drain.
    Drain,
    /// The file in which that generation writes how many connections remain.
    DrainStatus,
}

impl Kind {
    /// The words, in the order of the variants.
    pub(crate) const ALL: [(Self, &'static str); 12] = [
        (Self::Tcp, "tcp"),
        (Self::Udp, "udp"),
        (Self::Unix, "unix"),
        (Self::Seqpacket, "unix-seqpacket"),
        (Self::UnixDatagram, "unix-datagram"),
        (Self::DatagramPair, "unix-datagram-pair"),
        (Self::Stream, "stream"),
        (Self::Bytes, "bytes"),
        (Self::Fd, "fd"),
        (Self::Late, "late"),
        (Self::Drain, "drain"),
        (Self::DrainStatus, "drain-status"),
    ];

    pub(crate) fn word(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Returns whether it is a socket that peers reach by an address.
    pub(crate) fn has_address(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Unix | Self::Seqpacket | Self::UnixDatagram)
    }

    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == word).map(|(kind, _)| kind)
    }
}

impl Key {
    /// Returns the key of a TCP listener.
    pub fn tcp(addr: SocketAddr) -> Self {
        Self::from_parts(Kind::Tcp, address(addr))
    }

    /// Returns the key of a UDP socket.
    pub fn udp(addr: SocketAddr) -> Self {
        Self::from_parts(Kind::Udp, address(addr))
    }

    /// Returns the key of a Unix stream listener. A path that starts with `@` is an abstract name.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self::from_parts(Kind::Unix, path.as_ref().as_os_str().as_bytes())
    }

    /// Returns the key of a Unix seqpacket listener. A path that starts with `@` is an abstract name.
    pub fn unix_seqpacket(path: impl AsRef<Path>) -> Self {
        Self::from_parts(Kind::Seqpacket, path.as_ref().as_os_str().as_bytes())
    }

    /// Returns the key of a bound Unix datagram socket. A path that starts with `@` is an abstract name.
    pub fn unix_datagram(path: impl AsRef<Path>) -> Self {
        Self::from_parts(Kind::UnixDatagram, path.as_ref().as_os_str().as_bytes())
    }

    /// Returns the key of a connection with a name that the program chooses.
    pub fn stream(name: impl AsRef<OsStr>) -> Self {
        Self::from_parts(Kind::Stream, name.as_ref().as_bytes())
    }

    /// Returns the key of state in bytes with a name that the program chooses.
    pub fn bytes(name: impl AsRef<OsStr>) -> Self {
        Self::from_parts(Kind::Bytes, name.as_ref().as_bytes())
    }

    /// Returns the key of any descriptor with a name that the program chooses.
    pub fn fd(name: impl AsRef<OsStr>) -> Self {
        Self::from_parts(Kind::Fd, name.as_ref().as_bytes())
    }

    pub(crate) fn late() -> Self {
        Self::from_parts(Kind::Late, *b"commit")
    }

    pub(crate) fn drain(generation: u64) -> Self {
        Self::from_parts(Kind::Drain, generation.to_string().into_bytes())
    }

    pub(crate) fn drain_status(generation: u64) -> Self {
        Self::from_parts(Kind::DrainStatus, generation.to_string().into_bytes())
    }

    pub(crate) fn drain_generation(&self) -> Option<u64> {
        match self.kind {
            Kind::Drain | Kind::DrainStatus => std::str::from_utf8(&self.name).ok()?.parse().ok(),
            _ => None,
        }
    }

    pub(crate) fn from_parts(kind: Kind, name: impl Into<Arc<[u8]>>) -> Self {
        Self { kind, name: name.into(), label: None }
    }

    /// Returns this key with a name, which distinguishes several sockets with the same address. See
    /// [`Sockets::named`](crate::Sockets::named).
    ///
    /// ```
    /// let key = ecdysis::Key::tcp("127.0.0.1:0".parse().unwrap()).named("admin");
    /// assert_eq!(key.to_string(), "tcp 127.0.0.1:0 named \"admin\"");
    /// ```
    #[must_use]
    pub fn named(self, name: impl Into<String>) -> Self {
        Self { label: Some(name.into().into()), ..self }
    }

    pub(crate) fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// Returns whether a program that asks for this key may get `other`, whose name differs, because no socket has
    /// exactly this key. So a version may add or remove names of its sockets, but a named socket is never given to
    /// another name.
    pub(crate) fn falls_back_to(&self, other: &Self) -> bool {
        self.kind == other.kind && self.name == other.name && (self.label.is_none() || other.label.is_none())
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the address, path or name that was asked for: `127.0.0.1:0`, `/run/app.sock`, `upstream`.
    ///
    /// ```
    /// assert_eq!(ecdysis::Key::stream("upstream").name(), "upstream");
    /// ```
    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }

    pub(crate) fn raw_name(&self) -> &[u8] {
        &self.name
    }
}

/// Returns the same as `to_string`, but faster for IPv4, because a service may have thousands of addresses.
fn address(addr: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(addr) = addr else { return addr.to_string().into_bytes() };
    let mut text = Vec::with_capacity("255.255.255.255:65535".len());
    for (octet, end) in addr.ip().octets().into_iter().zip(*b"...:") {
        text.extend_from_slice(DecInt::new(octet).as_bytes());
        text.push(end);
    }
    text.extend_from_slice(DecInt::new(addr.port()).as_bytes());
    text
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.word(), String::from_utf8_lossy(&self.name))?;
        match &self.label {
            Some(label) => write!(f, " named {label:?}"),
            None => Ok(()),
        }
    }
}
