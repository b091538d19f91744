//! The service manager's side of sd_notify(3): receiving messages, and forwarding them to a manager above `hold`.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use crate::say;
use rustix::net::{bind, getsockname, socket_with, sockopt, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest message that systemd accepts (PIPE_BUF), and the maximum number of descriptors in one datagram (SCM_MAX_FD).
const MAX_MESSAGE: usize = 4096;
const MAX_FDS: usize = 253;

/// Where the server sends its messages.
pub struct Inbox {
    socket: OwnedFd,
    /// The value of `NOTIFY_SOCKET`.
    pub address: String,
}

/// One message with its sender, which the kernel reports (SCM_CREDENTIALS).
pub struct Message {
    pub pid: i32,
    pub uid: u32,
    pub fds: Vec<OwnedFd>,
    /// `NAME=value` lines, or the reason why the message is invalid.
    text: Result<String, &'static str>,
}

impl Inbox {
    /// A socket with an abstract name, which needs no directory: containers are often read-only. The kernel chooses the
    /// name, so two instances of `hold` never collide. Any process on the machine can send to it, hence `Message::pid`.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        sockopt::set_socket_passcred(&socket, true)?;
        bind(&socket, &SocketAddrUnix::new_unnamed())?;
        let name = SocketAddrUnix::try_from(getsockname(&socket)?)?;
        let name = name.abstract_name().ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { address: format!("@{}", String::from_utf8_lossy(name)), socket })
    }

    /// Returns the next message, if there is one.
    pub fn next(&self) -> Option<Message> {
        let mut text = [0_u8; MAX_MESSAGE];
        // An array of u64, because the headers of control messages must be aligned.
        let mut control = [0_u64; 160];
        debug_assert!(mem::size_of_val(&control) >= 2 * 32 + 4 * MAX_FDS);
        let mut iov = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
        // SAFETY: a msghdr of zeros is valid, and refers to no memory.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control) as _;
        // SAFETY: every pointer in `header` refers to a buffer above that has the given length.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
        let length = usize::try_from(length).ok()?;
        let mut message = Message { pid: 0, uid: u32::MAX, fds: Vec::new(), text: Err("not text") };
        // SAFETY: the kernel has written complete control messages into `control`, and CMSG_NXTHDR stays within it. The
        // descriptors are new, and nothing else owns them. The data may be unaligned, so it is read with `read_unaligned`.
        unsafe {
            let mut next = libc::CMSG_FIRSTHDR(&header);
            while let Some(part) = next.as_ref() {
                let data = libc::CMSG_DATA(part);
                match (part.cmsg_level, part.cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                        #[allow(clippy::unnecessary_cast)] // musl has another type there.
                        let bytes = part.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                        let numbers = data.cast::<RawFd>();
                        let fds = (0..bytes / mem::size_of::<RawFd>()).map(|i| numbers.add(i).read_unaligned());
                        message.fds.extend(fds.map(|fd| OwnedFd::from_raw_fd(fd)));
                    }
                    (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                        let sender = data.cast::<libc::ucred>().read_unaligned();
                        (message.pid, message.uid) = (sender.pid, sender.uid);
                    }
                    _ => {}
                }
                next = libc::CMSG_NXTHDR(&header, part);
            }
        }
        message.text = match std::str::from_utf8(&text[..length]) {
            _ if header.msg_flags & libc::MSG_TRUNC != 0 => Err("longer than 4096 bytes"),
            _ if header.msg_flags & libc::MSG_CTRUNC != 0 => Err("more descriptors than can be received"),
            Ok(text) if text.lines().all(|line| line.contains('=')) && !text.is_empty() => Ok(text.to_owned()),
            _ => Err("not lines of NAME=value"),
        };
        Some(message)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Message {
    /// Returns the lines.
    ///
    /// # Errors
    /// The reason why the message is invalid.
    pub fn text(&self) -> Result<&str, &'static str> {
        self.text.as_deref().map_err(|why| *why)
    }

    /// Returns the value of the last line with this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        value(self.text.as_deref().unwrap_or_default(), name)
    }

    pub fn has(&self, assignment: &str) -> bool {
        self.text.as_deref().is_ok_and(|text| text.lines().any(|line| line == assignment))
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }
}

fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).next_back()
}

/// The manager above `hold` that waits for the server to be ready: systemd, podman on behalf of a container, or s6.
pub struct Above {
    manager: Option<(UnixDatagram, SocketAddr)>,
    ready_fd: Option<File>,
}

impl Above {
    /// The variables that are forwarded. PIDs are not, because `hold` is the main process. Descriptors are not, because
    /// `hold` stores them.
    const PASSED_ON: [&'static str; 8] =
        ["READY", "RELOADING", "MONOTONIC_USEC", "STOPPING", "STATUS", "ERRNO", "EXTEND_TIMEOUT_USEC", "WATCHDOG"];

    pub fn new(ready_fd: Option<OwnedFd>) -> Self {
        let connect = || {
            let address = env::var_os("NOTIFY_SOCKET")?;
            let address = match address.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
                _ => SocketAddr::from_pathname(&address),
            };
            let socket = UnixDatagram::unbound().ok()?;
            // A manager that does not read must not block `hold`.
            socket.set_nonblocking(true).ok()?;
            Some((socket, address.ok()?))
        };
        Self { manager: connect(), ready_fd: ready_fd.map(File::from) }
    }

    /// Forwards a message of the serving generation.
    pub fn send(&self, message: &Message) {
        let Some((socket, address)) = &self.manager else { return };
        let known = |line: &&str| line.split_once('=').is_some_and(|(name, _)| Self::PASSED_ON.contains(&name));
        let lines: Vec<&str> = message.text().unwrap_or_default().lines().filter(known).collect();
        if !lines.is_empty() {
            let _ = socket.send_to_addr(lines.join("\n").as_bytes(), address);
        }
    }

    /// Reports that the server is ready for the first time.
    pub fn is_ready(&mut self) {
        if let Some(mut fd) = self.ready_fd.take() {
            let _ = fd.write_all(b"\n");
        }
    }
}

/// Logs refused messages: the first immediately, then at most one line per second with their number, so that a flood does not
/// fill the log.
#[derive(Default)]
pub struct Refusals {
    quiet_until: Option<Instant>,
    suppressed: u64,
}

impl Refusals {
    pub fn log(&mut self, pid: i32, uid: u32, why: &str) {
        if self.quiet_until.is_some() {
            self.suppressed += 1;
            return;
        }
        say(&format!("refused a message from pid={pid} uid={uid}: {why}"));
        self.quiet_until = Some(Instant::now() + Duration::from_secs(1));
    }

    /// Returns the time at which `log_suppressed` is due.
    pub fn due(&self) -> Option<Instant> {
        self.quiet_until
    }

    pub fn log_suppressed(&mut self, now: Instant) {
        if self.quiet_until.take_if(|until| *until <= now).is_some() && self.suppressed > 0 {
            say(&format!("refused {} more messages", self.suppressed));
            self.suppressed = 0;
        }
    }
}
