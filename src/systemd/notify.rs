//! Notifications to the service manager: the protocol of sd_notify(3), one datagram per message.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    sendmsg_addr, AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
};

use crate::sys::clock::monotonic_usec;
use crate::sys::poll::{send_until, wait_hangup, Deadline};
use crate::sys::{net, Mode};

/// The longest datagram that a manager accepts (PIPE_BUF). It discards longer ones.
const MAX_MESSAGE: usize = 4096;

/// The longest status, which is one line of `systemctl status`.
const MAX_STATUS: usize = 1000;

/// How long a message waits for room in the manager's queue, which is full only while the manager hangs.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to the service manager that started this process: systemd, or any other that sets `NOTIFY_SOCKET`.
///
/// The library itself sends the messages for upgrades and stops, see
/// [`Builder::systemd_notify`](crate::Builder::systemd_notify). Use this type for messages that only the program can
/// send: its own status, or more time for a long start.
///
/// With `NotifyAccess=main`, the default, the manager accepts messages only from the main process. It discards (and
/// logs) messages of a new generation before the end of the upgrade.
///
/// No method after [`from_env`](Self::from_env) reads or changes the environment. A message waits at most two seconds
/// for a manager that does not read. After that, only [`new_main`](Self::new_main) waits until a message gets through.
///
/// ```
/// if let Some(manager) = ecdysis::systemd::Notifier::from_env()? {
///     manager.status("reading the index, 40 %")?;
/// }
/// # Ok::<(), ecdysis::systemd::NotifyError>(())
/// ```
#[derive(Debug)]
pub struct Notifier {
    socket: OwnedFd,
    address: SocketAddrUnix,
    /// Whether the last message timed out. Until a message gets through, no other waits, because a server with many
    /// messages must not wait two seconds for each.
    hangs: AtomicBool,
}

impl Notifier {
    /// Returns the notifier for the address in the environment variable `NOTIFY_SOCKET`; `None` if it is not set, as in
    /// a process that was started manually. Sends nothing.
    ///
    /// # Errors
    /// The address is neither a path that starts with `/` nor an abstract name that starts with `@`. (`vsock:`, which
    /// reaches the host of a virtual machine, is not supported.)
    pub fn from_env() -> Result<Option<Self>, NotifyError> {
        match env::var_os("NOTIFY_SOCKET") {
            Some(address) if !address.is_empty() => Self::at(address).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns the notifier for this address, written as in `NOTIFY_SOCKET`.
    ///
    /// # Errors
    /// Those of [`from_env`](Self::from_env), or no descriptor is free for a socket.
    pub fn at(address: impl AsRef<OsStr>) -> Result<Self, NotifyError> {
        let text = address.as_ref();
        let unusable = |source| NotifyError::Address { address: text.to_owned(), source };
        let address = match text.as_bytes() {
            [b'/', ..] => SocketAddrUnix::new(text).map_err(|e| unusable(e.into()))?,
            [b'@', name @ ..] if !name.is_empty() => net::abstract_address(name).map_err(unusable)?,
            _ => return Err(unusable(io::ErrorKind::Unsupported.into())),
        };
        let socket = net::socket(AddressFamily::UNIX, SocketType::DGRAM, Mode::Blocking)
            .map_err(|e| NotifyError::Socket { source: e.into() })?;
        // Not connected, because the manager may replace its socket under the same name.
        Ok(Self { socket, address, hangs: AtomicBool::new(false) })
    }

    /// Sends `READY=1`, which ends a start or a reload, with a line for `systemctl status`.
    ///
    /// # Errors
    /// The message could not be sent. The same holds for all methods below.
    pub fn ready(&self, status: &str) -> Result<(), NotifyError> {
        self.send("READY", Message::new().with("READY", "1").status(status), &[])
    }

    /// Sends `RELOADING=1` with the current time, which distinguishes this reload from an earlier one. Whatever the
    /// outcome, call [`ready`](Self::ready) or [`new_main`](Self::new_main) later, because `systemctl reload` waits for
    /// it. `at_most` is how long the reload may take, if the manager's limit is lower (`TimeoutStartSec=`).
    pub fn reloading(&self, status: &str, at_most: Duration) -> Result<(), NotifyError> {
        let message = Message::new()
            .with("RELOADING", "1")
            .with("MONOTONIC_USEC", &monotonic_usec().to_string())
            .with("EXTEND_TIMEOUT_USEC", &usec(at_most))
            // The manager extends the watchdog's timeout as well; WATCHDOG=1 resets it.
            .with("WATCHDOG", "1")
            .status(status);
        self.send("RELOADING", message, &[])
    }

    /// Sends `STOPPING=1`: this service ends.
    pub fn stopping(&self, status: &str) -> Result<(), NotifyError> {
        self.send("STOPPING", Message::new().with("STOPPING", "1").status(status), &[])
    }

    /// Sets the line that `systemctl status` shows. Newlines become spaces, and text beyond 1000 bytes is cut.
    pub fn status(&self, status: &str) -> Result<(), NotifyError> {
        self.send("STATUS", Message::new().status(status), &[])
    }

    /// Sends `READY=1` with the PID, in the order of version 1.1.1.
    pub(crate) fn ready_as(&self, pid: u32, status: &str) -> Result<(), NotifyError> {
        self.send("READY", Message::new().with("READY", "1").with("MAINPID", &pid.to_string()).status(status), &[])
    }

    /// Makes process `pid` the main process of the service, which is ready: sends `MAINPID`, `READY=1` and the first
    /// `WATCHDOG=1` of the new process in one datagram. From then on the manager accepts messages of that process, and
    /// no longer of this one. It has taken effect once a later [`barrier`](Self::barrier) has returned.
    pub fn new_main(&self, pid: u32, status: &str) -> Result<(), NotifyError> {
        self.announce(pid, None, status)
    }

    /// Like [`new_main`](Self::new_main), and clears the error of an earlier upgrade. With the process's `id` (the
    /// inode of its pidfd), systemd 257 and later refuse a PID that belongs to another process.
    pub(crate) fn announce(&self, pid: u32, id: Option<u64>, status: &str) -> Result<(), NotifyError> {
        let mut message = Message::new().with("MAINPID", &pid.to_string());
        if let Some(id) = id {
            message = message.with("MAINPIDFDID", &id.to_string());
        }
        let message = message.with("READY", "1").with("WATCHDOG", "1").with("ERRNO", "0").status(status);
        // This waits even if the manager did not read before, because a service can end without this message.
        self.hangs.store(false, Ordering::Relaxed);
        self.send("MAINPID", message, &[])
    }

    /// Sends `READY=1` at the end of a reload, with its errno or 0.
    pub(crate) fn reloaded(&self, errno: i32, status: &str) -> Result<(), NotifyError> {
        let message = Message::new().with("READY", "1").with("ERRNO", &errno.to_string()).status(status);
        self.send("READY", message, &[])
    }

    /// Asks the service manager to extend the timeout of the current start, reload or stop to `time` from now. A
    /// deadline earlier than the current one has no effect.
    pub fn extend_timeout(&self, time: Duration) -> Result<(), NotifyError> {
        self.send("EXTEND_TIMEOUT_USEC", Message::new().with("EXTEND_TIMEOUT_USEC", &usec(time)), &[])
    }

    /// Sends `WATCHDOG=1`: this process is alive, see [`watchdog_interval`](super::watchdog_interval). With
    /// [`Builder::systemd_notify`](crate::Builder::systemd_notify) the library's `run` sends it.
    pub fn alive(&self) -> Result<(), NotifyError> {
        self.send("WATCHDOG", Message::new().with("WATCHDOG", "1"), &[])
    }

    /// Stores a copy of this descriptor with the manager, which passes it to the next start of the service under this
    /// name. The unit needs `FileDescriptorStoreMax=`; the manager reports no error if the store is full or absent. It
    /// stores the same descriptor only once, and keeps it until [`forget`](Self::forget) (`FDPOLL=0`).
    ///
    /// # Errors
    /// The name is empty, longer than 255 bytes, or contains `:` or anything but printable ASCII.
    pub fn store(&self, name: &str, fd: impl AsFd) -> Result<(), NotifyError> {
        self.store_by(Deadline::NEVER, name, fd)
    }

    pub(crate) fn store_by(&self, until: Deadline, name: &str, fd: impl AsFd) -> Result<(), NotifyError> {
        let message = Message::new().with("FDSTORE", "1").with("FDNAME", fd_name(name)?).with("FDPOLL", "0");
        self.send_by(until, "FDSTORE", message, &[fd.as_fd()])
    }

    /// Removes all descriptors with this name from the manager's store.
    ///
    /// # Errors
    /// As for [`store`](Self::store).
    pub fn forget(&self, name: &str) -> Result<(), NotifyError> {
        let message = Message::new().with("FDSTOREREMOVE", "1").with("FDNAME", fd_name(name)?);
        self.send("FDSTOREREMOVE", message, &[])
    }

    /// Waits until the manager has handled all earlier messages of this process.
    ///
    /// # Errors
    /// The manager did not answer within `deadline`. Versions of systemd before 246 never answer.
    pub fn barrier(&self, deadline: Duration) -> Result<(), NotifyError> {
        let until = Deadline::after(deadline);
        let failed = |e: Errno| NotifyError::Send { what: "BARRIER", source: e.into() };
        let (reader, writer) = net::pipe().map_err(failed)?;
        self.send_by(until, "BARRIER", Message::new().with("BARRIER", "1"), &[writer.as_fd()])?;
        // The manager's copy is now the only one, and the pipe ends when the manager closes it.
        drop(writer);
        match wait_hangup(&reader, until) {
            Ok(true) => Ok(()),
            Ok(false) => Err(NotifyError::Barrier { after: deadline }),
            Err(e) => Err(failed(e)),
        }
    }

    /// Sends assignments that the program chooses, such as `ERRNO`, in one datagram. Newlines in a value become spaces.
    ///
    /// ```no_run
    /// # let manager = ecdysis::systemd::Notifier::from_env()?.unwrap();
    /// manager.notify(&[("STATUS", "the disk is full"), ("ERRNO", "28")])?;
    /// # Ok::<(), ecdysis::systemd::NotifyError>(())
    /// ```
    pub fn notify(&self, assignments: &[(&str, &str)]) -> Result<(), NotifyError> {
        let message = assignments.iter().fold(Message::new(), |message, (name, value)| message.with(name, value));
        self.send("a message", message, &[])
    }

    fn send(&self, what: &'static str, message: Message, fds: &[BorrowedFd<'_>]) -> Result<(), NotifyError> {
        self.send_by(Deadline::NEVER, what, message, fds)
    }

    /// Waits at most until this deadline, and at most for [`SEND_TIMEOUT`].
    fn send_by(
        &self,
        until: Deadline,
        what: &'static str,
        message: Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), NotifyError> {
        let failed = |source| NotifyError::Send { what, source };
        if message.0.len() > MAX_MESSAGE {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "the message is too long")));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let text = [IoSlice::new(message.0.as_bytes())];
        let (time, flags) = match self.hangs.load(Ordering::Relaxed) {
            true => (Duration::ZERO, net::NOSIGNAL | SendFlags::DONTWAIT),
            false => (SEND_TIMEOUT, net::NOSIGNAL),
        };
        let sent = send_until(&self.socket, until.min(Deadline::after(time)), || {
            sendmsg_addr(&self.socket, &self.address, &text, &mut control, flags)
        });
        self.hangs.store(sent == Err(Errno::TIMEDOUT), Ordering::Relaxed);
        sent.map(drop).map_err(|e| failed(e.into()))
    }
}

/// One datagram: lines of `NAME=value`.
struct Message(String);

impl Message {
    fn new() -> Self {
        Self(String::new())
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.0.push_str(name);
        self.0.push('=');
        // Text after a newline would become a separate assignment.
        self.0.extend(value.chars().map(|c| if c == '\n' || c == '\0' { ' ' } else { c }));
        self.0.push('\n');
        self
    }

    fn status(self, status: &str) -> Self {
        let mut end = status.len().min(MAX_STATUS);
        while !status.is_char_boundary(end) {
            end -= 1;
        }
        self.with("STATUS", &status[..end])
    }
}

/// systemd reads `u64::MAX` as "no timeout", so cap the value at one day.
fn usec(time: Duration) -> String {
    time.min(Duration::from_secs(24 * 60 * 60)).as_micros().to_string()
}

/// Checks a descriptor's name against the manager's rules.
fn fd_name(name: &str) -> Result<&str, NotifyError> {
    let fits = (1..=255).contains(&name.len()) && name.bytes().all(|b| (b' '..127).contains(&b) && b != b':');
    fits.then_some(name).ok_or_else(|| NotifyError::FdName { name: name.to_owned() })
}

/// Why a message did not reach the service manager.
#[derive(Debug)]
#[non_exhaustive]
pub enum NotifyError {
    /// The value of `NOTIFY_SOCKET` is not a supported address.
    Address {
        /// The value.
        address: OsString,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The socket could not be created.
    Socket {
        /// The underlying OS error.
        source: io::Error,
    },
    /// The message could not be sent.
    Send {
        /// The message.
        what: &'static str,
        /// The underlying OS error.
        source: io::Error,
    },
    /// The manager did not handle the messages in time.
    Barrier {
        /// The time limit.
        after: Duration,
    },
    /// The manager does not accept this name for a descriptor.
    FdName {
        /// The name.
        name: String,
    },
}

impl fmt::Display for NotifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, .. } => write!(f, "cannot use NOTIFY_SOCKET={}", address.to_string_lossy()),
            Self::Socket { .. } => write!(f, "cannot create a socket for the service manager"),
            Self::Send { what, .. } => write!(f, "cannot send {what} to the service manager"),
            Self::Barrier { after } => write!(f, "the service manager did not answer within {after:?}"),
            Self::FdName { name } => write!(f, "the service manager accepts no descriptor named {name:?}"),
        }
    }
}

impl std::error::Error for NotifyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Address { source, .. } | Self::Socket { source } | Self::Send { source, .. } => Some(source),
            Self::Barrier { .. } | Self::FdName { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    use std::io::IoSliceMut;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::thread;
    use std::time::Instant;

    /// Returns the manager's end, an abstract socket, and the notifier that sends to it.
    fn pair(test: &str) -> (UnixDatagram, Notifier) {
        let name = format!("ecdysis-notify-{}-{test}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (manager, Notifier::at(format!("@{name}")).unwrap())
    }

    fn receive(manager: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = vec![0; 8192];
        let message =
            rustix::net::recvmsg(manager, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)
                .unwrap();
        text.truncate(message.bytes);
        let fds = control
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                _ => Vec::new(),
            })
            .collect();
        (String::from_utf8(text).unwrap(), fds)
    }

    #[test]
    fn each_message_is_one_datagram() {
        let (manager, notifier) = pair("messages");
        notifier.ready("generation 1").unwrap();
        assert_eq!(receive(&manager).0, "READY=1\nSTATUS=generation 1\n");
        notifier.new_main(812, "generation 2").unwrap();
        assert_eq!(receive(&manager).0, "MAINPID=812\nREADY=1\nWATCHDOG=1\nERRNO=0\nSTATUS=generation 2\n");
        notifier.announce(812, Some(7), "").unwrap();
        assert_eq!(receive(&manager).0, "MAINPID=812\nMAINPIDFDID=7\nREADY=1\nWATCHDOG=1\nERRNO=0\nSTATUS=\n");
        notifier.reloaded(110, "generation 2").unwrap();
        assert_eq!(receive(&manager).0, "READY=1\nERRNO=110\nSTATUS=generation 2\n");
        notifier.stopping("").unwrap();
        assert_eq!(receive(&manager).0, "STOPPING=1\nSTATUS=\n");
        notifier.extend_timeout(Duration::from_millis(1500)).unwrap();
        assert_eq!(receive(&manager).0, "EXTEND_TIMEOUT_USEC=1500000\n");
        notifier.extend_timeout(Duration::MAX).unwrap();
        assert_eq!(receive(&manager).0, "EXTEND_TIMEOUT_USEC=86400000000\n");
        notifier.alive().unwrap();
        assert_eq!(receive(&manager).0, "WATCHDOG=1\n");
        notifier.notify(&[("ERRNO", "28")]).unwrap();
        assert_eq!(receive(&manager).0, "ERRNO=28\n");
    }

    #[test]
    fn a_reload_carries_the_time_of_its_beginning() {
        let (manager, notifier) = pair("reload");
        let before = monotonic_usec();
        notifier.reloading("upgrading", Duration::from_secs(2)).unwrap();
        let text = receive(&manager).0;
        let (time, rest) = text.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().split_once('\n').unwrap();
        assert_eq!(rest, "EXTEND_TIMEOUT_USEC=2000000\nWATCHDOG=1\nSTATUS=upgrading\n");
        assert!((before..=monotonic_usec()).contains(&time.parse().unwrap()), "{text}");
    }

    #[test]
    fn a_status_cannot_smuggle_and_is_cut_at_a_character() {
        let (manager, notifier) = pair("status");
        notifier.status("failed:\nREADY=1\0x").unwrap();
        assert_eq!(receive(&manager).0, "STATUS=failed: READY=1 x\n");
        notifier.status(&"ä".repeat(3000)).unwrap();
        assert_eq!(receive(&manager).0, format!("STATUS={}\n", "ä".repeat(500)));
        notifier.status(&format!("x{}", "ä".repeat(3000))).unwrap();
        assert_eq!(receive(&manager).0, format!("STATUS=x{}\n", "ä".repeat(499)));
    }

    #[test]
    fn a_descriptor_is_stored_by_name() {
        let (manager, notifier) = pair("store");
        let (reader, writer) = net::pipe().unwrap();
        notifier.store("tcp 1.2.3.4%3A80", &writer).unwrap();
        let (text, fds) = receive(&manager);
        assert_eq!(text, "FDSTORE=1\nFDNAME=tcp 1.2.3.4%3A80\nFDPOLL=0\n");
        drop(writer);
        rustix::io::write(&fds[0], b"x").unwrap();
        assert_eq!(rustix::io::read(&reader, &mut [0; 4]).unwrap(), 1, "the same pipe arrived");
        notifier.forget("a b").unwrap();
        assert_eq!(receive(&manager).0, "FDSTOREREMOVE=1\nFDNAME=a b\n");
        for name in ["", "a:b", "a\nb", "ä", &"x".repeat(256)] {
            assert!(matches!(notifier.store(name, &reader), Err(NotifyError::FdName { .. })), "{name:?}");
        }
    }

    #[test]
    fn the_barrier_waits_for_the_manager_and_no_longer_than_its_deadline() {
        let (manager, notifier) = pair("barrier");
        let error = notifier.barrier(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, NotifyError::Barrier { .. }), "{error}");
        assert_eq!(receive(&manager).0, "BARRIER=1\n");
        // The manager answers by closing the received descriptor.
        let answer = thread::spawn(move || {
            let (text, fds) = receive(&manager);
            assert_eq!((text.as_str(), fds.len()), ("BARRIER=1\n", 1));
        });
        notifier.barrier(Duration::from_secs(5)).unwrap();
        answer.join().unwrap();
    }

    #[test]
    fn the_deadline_of_a_barrier_includes_its_message() {
        let (_manager, notifier) = pair("full");
        while notifier.alive().is_ok() {}
        let begin = Instant::now();
        for _ in 0..20 {
            notifier.hangs.store(false, Ordering::Relaxed);
            assert!(notifier.barrier(Duration::from_millis(10)).is_err());
        }
        // With the limit of a message, this would take 40 seconds.
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    #[test]
    fn a_manager_that_hangs_costs_two_seconds_once() {
        let (manager, notifier) = pair("hang");
        let begin = Instant::now();
        let error = loop {
            if let Err(error) = notifier.alive() {
                break error;
            }
        };
        assert!(begin.elapsed() >= SEND_TIMEOUT, "the first one waits");
        assert!(matches!(&error, NotifyError::Send { source, .. } if source.kind() == io::ErrorKind::TimedOut));
        // A hundred waits of two seconds would take minutes.
        let begin = Instant::now();
        for _ in 0..100 {
            assert!(notifier.alive().is_err());
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "those after it do not: {:?}", begin.elapsed());
        let begin = Instant::now();
        assert!(notifier.announce(1, None, "").is_err());
        assert!(begin.elapsed() >= SEND_TIMEOUT, "an announcement always waits");
        // As soon as there is room, messages get through and wait again.
        receive(&manager);
        notifier.alive().unwrap();
        assert!(!notifier.hangs.load(Ordering::Relaxed));
        drop(manager);
        assert!(notifier.alive().is_err(), "and one that is gone is an error");
    }

    #[test]
    fn addresses() {
        let directory = std::env::temp_dir().join(format!("ecdysis-notify-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        Notifier::at(&path).unwrap().alive().unwrap();
        assert_eq!(receive(&manager).0, "WATCHDOG=1\n");
        std::fs::remove_dir_all(directory).unwrap();
        for bad in ["", "@", "relative/path", "vsock:2:1234", &format!("/{}", "x".repeat(200))] {
            let error = Notifier::at(bad).unwrap_err();
            assert!(matches!(error, NotifyError::Address { .. }), "{bad:?}: {error}");
            assert!(error.to_string().contains(bad), "{error}");
        }
    }
}
