//! Sockets that the service manager passes at the start: the protocol of sd_listen_fds(3).

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use rustix::io::ioctl_fionbio;
use rustix::net::{getsockname, sockopt, AddressFamily, SocketAddrUnix, SocketType};

#[cfg(feature = "systemd_notify")]
use super::stored;
use crate::handover::entry::Entry;
use crate::listen::FileId;
#[cfg(feature = "systemd_notify")]
use crate::logging;
use crate::sys::{listen_fds, net, program};
use crate::{Error, Key, Sockets, UnixSeqpacketListener};

/// Sockets that units of the service manager passed; feature `systemd_sockets`, and
/// [`Builder::systemd_sockets`](crate::Builder::systemd_sockets).
///
/// `listen_tcp` and similar methods claim such a socket if its address matches. The methods here also ask by name
/// (`FileDescriptorName=`, by default the unit's own name), and never create a socket.
impl Sockets {
    /// Returns the TCP listener on `addr` that a unit passed by this name. Several sockets may have the same name, and
    /// a name may change its meaning between versions, so the address must match too.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let starting = ecdysis::Ecdysis::builder().systemd_sockets(true).start()?;
    /// let listener = starting.systemd_listen_tcp("http", "0.0.0.0:80".parse()?)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotPassed`], which says what was passed instead.
    pub fn systemd_listen_tcp(&self, name: &str, addr: SocketAddr) -> Result<TcpListener, Error> {
        self.systemd(name, Key::tcp(addr)).map(TcpListener::from)
    }

    /// Returns the Unix stream listener at `path`, or at an abstract name after an `@`, that a unit passed by this
    /// name. Its file belongs to the unit, and this process never removes it.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub fn systemd_listen_unix(&self, name: &str, path: impl AsRef<Path>) -> Result<UnixListener, Error> {
        self.systemd(name, Key::unix(path)).map(UnixListener::from)
    }

    /// Returns the Unix seqpacket listener at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub fn systemd_listen_unix_seqpacket(
        &self,
        name: &str,
        path: impl AsRef<Path>,
    ) -> Result<UnixSeqpacketListener, Error> {
        self.systemd(name, Key::unix_seqpacket(path)).map(UnixSeqpacketListener::from)
    }

    /// Returns the Unix datagram socket at `path` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub fn systemd_listen_unix_datagram(&self, name: &str, path: impl AsRef<Path>) -> Result<UnixDatagram, Error> {
        self.systemd(name, Key::unix_datagram(path)).map(UnixDatagram::from)
    }

    /// Returns the UDP socket on `addr` that a unit passed by this name.
    ///
    /// # Errors
    ///
    /// As for [`systemd_listen_tcp`](Self::systemd_listen_tcp).
    pub fn systemd_socket_udp(&self, name: &str, addr: SocketAddr) -> Result<UdpSocket, Error> {
        self.systemd(name, Key::udp(addr)).map(UdpSocket::from)
    }

    /// Returns all unclaimed descriptors that units passed by this name, each with its key. For programs that leave the
    /// number of listeners and their addresses to the unit. Sockets are nonblocking. The key of a descriptor without an
    /// address is [`Key::fd`] of the name.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let starting = ecdysis::Ecdysis::builder().systemd_sockets(true).start()?;
    /// for (key, fd) in starting.systemd_group("http")? {
    ///     println!("serving {key}");
    ///     let listener = std::net::TcpListener::from(fd);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] if no descriptor is free.
    pub fn systemd_group(&self, name: &str) -> Result<Vec<(Key, OwnedFd)>, Error> {
        let failed = |source| Error::Socket { key: Key::fd(name), source };
        let mut group = Vec::new();
        while let Some(member) = self.claim_from_unit(name, |_| true).map_err(failed)? {
            group.push(member);
        }
        Ok(group)
    }

    /// Claims the first socket that a unit passed by this name and that `wanted` accepts.
    fn claim_from_unit(&self, name: &str, wanted: impl Fn(&Key) -> bool) -> io::Result<Option<(Key, OwnedFd)>> {
        self.registry().claim_if(|entry| entry.unit.as_deref() == Some(name) && wanted(&entry.key))
    }

    fn systemd(&self, name: &str, key: Key) -> Result<OwnedFd, Error> {
        match self.claim_from_unit(name, |passed| *passed == key) {
            Ok(Some((_, fd))) => Ok(fd),
            Ok(None) => Err(Error::NotPassed { key, name: name.to_owned(), passed: self.registry().passed() }),
            Err(source) => Err(Error::Socket { key, source }),
        }
    }
}

/// The descriptors that the manager passed.
#[derive(Default)]
pub(crate) struct PassedSockets {
    /// Entries for the registry: first those that an earlier run has stored, then those of units.
    pub(crate) sockets: Vec<Entry>,
    /// Stored entries that can no longer be used.
    pub(crate) stale: Vec<(Key, Option<FileId>)>,
    /// The state that the last stop has passed.
    #[cfg(feature = "systemd_notify")]
    pub(crate) pieces: stored::Pieces,
}

/// Takes ownership of the descriptors that the manager passed, and finds their keys by name or address.
pub(crate) fn inherit() -> Result<PassedSockets, Error> {
    let failed = |unusable: Unusable| Error::ServiceManager { what: unusable.what, source: unusable.source };
    let (mut inherited, mut from_units) = (PassedSockets::default(), Vec::new());
    for Passed { name, fd } in take().map_err(failed)? {
        let failed = |source: io::Error| Error::ServiceManager { what: format!("descriptor {name:?}"), source };
        #[cfg(feature = "systemd_notify")]
        let Err(fd) = inherited.pieces.take(&name, fd) else {
            continue;
        };
        #[cfg(feature = "systemd_notify")]
        if let Some((key, file)) = stored::parse(&name) {
            // If the file was replaced in the meantime, the path leads to another socket.
            let at = PathBuf::from(OsStr::from_bytes(key.raw_name()));
            if file.is_none() || crate::listen::file_id(&at).ok() == file {
                inherited.sockets.push(Entry { file, ..Entry::new(key, fd).map_err(failed)? });
            } else {
                logging::info!("closed the stored {key}: its file is gone");
                inherited.stale.push((key, file));
            }
            continue;
        }
        let key = match key_of(fd.as_fd()).map_err(failed)? {
            Some(key) => {
                // Accept loops rely on this, and the manager may have chosen another mode.
                ioctl_fionbio(&fd, true).map_err(|e| failed(e.into()))?;
                key
            }
            None => Key::fd(&name),
        };
        let entry = Entry::new(key, fd).map_err(failed)?;
        from_units.push(Entry { unit: Some(name), ..entry });
    }
    inherited.sockets.append(&mut from_units);
    Ok(inherited)
}

/// Returns the key with which a program would ask for this socket; `None` for anything else.
fn key_of(fd: BorrowedFd<'_>) -> io::Result<Option<Key>> {
    let kind = match sockopt::socket_type(fd) {
        Ok(kind) => kind,
        Err(rustix::io::Errno::NOTSOCK) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let family = net::family(fd)?;
    let listening = net::is_listening(fd)?;
    let address = getsockname(fd)?;
    Ok(match (family, kind, listening) {
        (AddressFamily::INET | AddressFamily::INET6, SocketType::STREAM, true) => {
            SocketAddr::try_from(address).ok().map(Key::tcp)
        }
        (AddressFamily::INET | AddressFamily::INET6, SocketType::DGRAM, _) => {
            SocketAddr::try_from(address).ok().map(Key::udp)
        }
        (AddressFamily::UNIX, kind, listening) => {
            let path = SocketAddrUnix::try_from(address).ok().and_then(|address| unix_path(&address));
            match (path, kind, listening) {
                (Some(path), SocketType::STREAM, true) => Some(Key::unix(path)),
                (Some(path), SocketType::SEQPACKET, true) => Some(Key::unix_seqpacket(path)),
                (Some(path), SocketType::DGRAM, _) => Some(Key::unix_datagram(path)),
                _ => None,
            }
        }
        _ => None,
    })
}

/// Returns the path in the form that `listen_unix` accepts.
fn unix_path(address: &SocketAddrUnix) -> Option<PathBuf> {
    if let Some(path) = address.path_bytes() {
        return Some(PathBuf::from(OsStr::from_bytes(path)));
    }
    let name = net::abstract_name(address)?;
    Some(PathBuf::from(OsStr::from_bytes(&[b"@", name].concat())))
}

/// A descriptor that the manager passed, with its name: `FileDescriptorName=` of a socket unit (by default the unit's
/// own name), or the name under which an earlier run has stored it. Several may have the same name.
#[derive(Debug)]
struct Passed {
    name: String,
    fd: OwnedFd,
}

/// The maximum number of open descriptors of a process, unless the system's limit (fs.nr_open) was raised.
const MAX_PASSED: usize = 1 << 20;

/// Why the passed descriptors cannot be used.
#[derive(Debug)]
struct Unusable {
    what: String,
    source: io::Error,
}

/// Takes ownership of the descriptors that the manager passed to this process, in the manager's order: socket units
/// first, then its store. Empty for a process that the manager did not start, such as a child of one that it started.
/// The environment does not change.
fn take() -> Result<Vec<Passed>, Unusable> {
    let Some(names) = announced(|name| env::var_os(name), std::process::id(), program::own_pidfd_id)? else {
        return Ok(Vec::new());
    };
    if program::is_secure() {
        let why = "not used by a process with more rights than its caller (AT_SECURE: a set-user-ID program, or file \
                   capabilities); give it ambient capabilities instead (AmbientCapabilities=)";
        let source = io::Error::new(io::ErrorKind::PermissionDenied, why);
        return Err(Unusable { what: "LISTEN_FDS".into(), source });
    }
    let fds =
        listen_fds::take(names.len()).map_err(|(fd, source)| Unusable { what: format!("descriptor {fd}"), source })?;
    Ok(names.into_iter().zip(fds).map(|(name, fd)| Passed { name, fd }).collect())
}

/// Returns the names of the descriptors passed to process `me`; `None` if the variables are absent, or meant for
/// another process.
fn announced(
    variable: impl Fn(&str) -> Option<OsString>,
    me: u32,
    own_pidfd_id: impl FnOnce() -> Option<u64>,
) -> Result<Option<Vec<String>>, Unusable> {
    fn number<T: std::str::FromStr>(name: &str, value: &OsString) -> Result<T, Unusable> {
        value.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| malformed(name, value))
    }
    fn malformed(name: &str, value: &OsString) -> Unusable {
        let what = format!("{name}={}", value.to_string_lossy());
        Unusable { what, source: io::ErrorKind::InvalidInput.into() }
    }

    let Some(pid) = variable("LISTEN_PID") else { return Ok(None) };
    if number::<u32>("LISTEN_PID", &pid)? != me {
        return Ok(None);
    }
    // Since systemd 259, this distinguishes the process from a later one with the same PID. Kernels before Linux 6.9
    // have no such id. Then the PID must suffice, as in systemd's own library.
    if let Some(id) = variable("LISTEN_PIDFDID") {
        let id: u64 = number("LISTEN_PIDFDID", &id)?;
        if own_pidfd_id().is_some_and(|own| own != id) {
            return Ok(None);
        }
    }
    let count = match variable("LISTEN_FDS") {
        None => None,
        Some(text) => match number::<usize>("LISTEN_FDS", &text)? {
            n if n <= MAX_PASSED => Some(n),
            _ => return Err(malformed("LISTEN_FDS", &text)),
        },
    };
    let names = match variable("LISTEN_FDNAMES") {
        None => return Ok(count.map(|count| vec!["unknown".into(); count])),
        Some(list) if list.is_empty() && count.is_none_or(|count| count == 0) => return Ok(count.map(|_| Vec::new())),
        Some(list) => list,
    };
    let list = names.to_str().ok_or_else(|| malformed("LISTEN_FDNAMES", &names))?;
    let list: Vec<String> = list.split(':').map(str::to_owned).collect();
    // Without LISTEN_FDS, count the names: version 1.1.1 read nothing else, so the tests of its users set nothing else.
    if let Some(count) = count.filter(|count| *count != list.len()) {
        let why = format!("{} names for {count} descriptors", list.len());
        let source = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(Unusable { what: format!("LISTEN_FDNAMES={}", names.to_string_lossy()), source });
    }
    Ok(Some(list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::manifest::{self, Manifest, Origin};

    fn names(variables: &[(&str, &str)]) -> Result<Option<Vec<String>>, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        announced(variable, 7, || Some(99)).map_err(|e| format!("{}: {}", e.what, e.source))
    }

    fn some(list: &[&str]) -> Result<Option<Vec<String>>, String> {
        Ok(Some(list.iter().map(|&name| name.to_owned()).collect()))
    }

    #[test]
    fn names_may_repeat_be_empty_or_be_missing() {
        let passed = |count, list| names(&[("LISTEN_PID", "7"), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", list)]);
        assert_eq!(passed("3", "http:http:admin"), some(&["http", "http", "admin"]));
        assert_eq!(passed("2", ":"), some(&["", ""]));
        assert_eq!(passed("1", ""), some(&[""]));
        assert_eq!(passed("0", ""), some(&[]));
        assert_eq!(names(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "2")]), some(&["unknown", "unknown"]));
        assert_eq!(names(&[("LISTEN_PID", "7"), ("LISTEN_FDNAMES", "a:b")]), some(&["a", "b"]));
        assert_eq!(names(&[("LISTEN_PID", "7"), ("LISTEN_FDNAMES", "")]), Ok(None));
        assert_eq!(passed("2", "a").unwrap_err(), "LISTEN_FDNAMES=a: 1 names for 2 descriptors");
        assert!(passed("1", "a:b").is_err());
    }

    #[test]
    fn variables_for_another_process_are_ignored() {
        assert_eq!(names(&[]), Ok(None));
        assert_eq!(names(&[("LISTEN_FDS", "2")]), Ok(None));
        assert_eq!(names(&[("LISTEN_PID", "8"), ("LISTEN_FDS", "2")]), Ok(None));
        let with_id = |id| names(&[("LISTEN_PID", "7"), ("LISTEN_PIDFDID", id), ("LISTEN_FDS", "1")]);
        assert_eq!(with_id("99"), some(&["unknown"]));
        assert_eq!(with_id("98"), Ok(None));
        assert!(with_id("x").is_err());
        let no_id_known = |name: &str| match name {
            "LISTEN_PID" => Some("7".into()),
            "LISTEN_FDS" => Some("1".into()),
            "LISTEN_PIDFDID" => Some("98".into()),
            _ => None,
        };
        assert!(announced(no_id_known, 7, || None).is_ok_and(|names| names.is_some()));
    }

    #[test]
    fn a_malformed_variable_is_named() {
        for (variable, value) in
            [("LISTEN_PID", "seven"), ("LISTEN_FDS", "-1"), ("LISTEN_FDS", "many"), ("LISTEN_FDS", "99999999")]
        {
            let error = names(&[("LISTEN_PID", "7"), (variable, value)].into_iter().rev().collect::<Vec<_>>());
            assert!(error.as_ref().is_err_and(|e| e.contains(variable) && e.contains(value)), "{error:?}");
        }
    }

    fn entry(key: Key, socket: impl Into<OwnedFd>, unit: Option<&str>) -> Entry {
        Entry { unit: unit.map(str::to_owned), ..Entry::new(key, socket.into()).unwrap() }
    }

    fn inode(fd: impl AsFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    #[test]
    fn sources_are_merged_in_order_and_the_same_socket_counts_once() {
        let (first, second) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let key = Key::tcp("127.0.0.1:80".parse().unwrap());
        let (first_inode, second_inode) = (inode(&first), inode(&second));
        let entries = vec![
            entry(key.clone(), first.try_clone().unwrap(), None),
            entry(key.clone(), first, Some("http")),
            entry(key.clone(), second, Some("http")),
        ];
        let sockets = Sockets::new(entries, false, true);
        assert_eq!(inode(sockets.claim(&key).unwrap()), first_inode);
        assert_eq!(inode(sockets.claim(&key).unwrap()), second_inode);
        assert!(sockets.claim(&key).is_none());
    }

    #[test]
    fn what_a_unit_passed_is_claimed_by_name_and_kept_for_the_next_generation() {
        let listeners = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let inodes = listeners.each_ref().map(inode);
        let key = |port: u16| Key::tcp(([127, 0, 0, 1], port).into());
        let [a, b, c, d] = listeners;
        let entries = vec![
            entry(key(1), a, None),
            entry(key(2), b, Some("http")),
            entry(key(3), c, Some("admin")),
            entry(key(4), d, Some("admin")),
        ];
        let sockets = Sockets::new(entries, false, true);
        let error = sockets.systemd_listen_tcp("http", "127.0.0.1:3".parse().unwrap()).unwrap_err().to_string();
        for part in ["tcp 127.0.0.1:3", "\"http\"", "tcp 127.0.0.1:2 as \"http\"", "tcp 127.0.0.1:3 as \"admin\""] {
            assert!(error.contains(part), "{error}");
        }
        let listener = sockets.systemd_listen_tcp("http", "127.0.0.1:2".parse().unwrap()).unwrap();
        assert_eq!(inode(listener), inodes[1]);
        sockets.close_unclaimed().unwrap();
        let (entries, _) = sockets.snapshot().unwrap();
        let mut handed_on: Vec<_> = entries.iter().map(|entry| (&entry.key, entry.unit.as_deref())).collect();
        handed_on.sort_by_key(|(key, _)| key.to_string());
        assert_eq!(handed_on, [(&key(2), Some("http")), (&key(3), Some("admin")), (&key(4), Some("admin"))]);
        let text = manifest::encode(
            &Origin { generation: 1, ..Origin::default() },
            None,
            entries.iter().map(|entry| (entry.number(), entry)),
        );
        let read = Manifest::decode(text.as_bytes()).unwrap();
        let numbered: Vec<_> = entries.iter().map(|entry| entry.clone().with_fd(entry.number())).collect();
        assert_eq!(read.entries, numbered, "the names are handed on");
        // A later version asks for the group.
        let group = sockets.systemd_group("admin").unwrap();
        let members: Vec<_> = group.iter().map(|(key, fd)| (key.clone(), inode(fd))).collect();
        assert_eq!(members, [(key(3), inodes[2]), (key(4), inodes[3])]);
        assert!(sockets.systemd_group("admin").unwrap().is_empty());
    }

    #[test]
    fn the_key_of_a_socket_is_found() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let path = env::temp_dir().join(format!("ecdysis-key-of-{}", std::process::id()));
        let unix = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let datagram = UnixDatagram::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let name = format!("ecdysis-key-of-{}", std::process::id());
        let seqpacket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::bind(&seqpacket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap()).unwrap();
        let key = |fd: BorrowedFd<'_>| key_of(fd).unwrap();
        assert_eq!(key(seqpacket.as_fd()), None, "it does not listen yet");
        rustix::net::listen(&seqpacket, 1).unwrap();
        assert_eq!(key(seqpacket.as_fd()), Some(Key::unix_seqpacket(format!("@{name}"))));
        assert_eq!(key(datagram.as_fd()), Some(Key::unix_datagram(&path)));
        assert_eq!(key(tcp.as_fd()), Some(Key::tcp(tcp.local_addr().unwrap())));
        assert_eq!(key(udp.as_fd()), Some(Key::udp(udp.local_addr().unwrap())));
        assert_eq!(key(unix.as_fd()), Some(Key::unix(path)));
        let connected = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        assert_eq!(key(connected.as_fd()), None);
        assert_eq!(key(std::fs::File::open("/dev/null").unwrap().as_fd()), None);
    }

    #[test]
    fn the_id_of_this_process_does_not_change() {
        assert_eq!(program::own_pidfd_id(), program::own_pidfd_id());
    }
}
