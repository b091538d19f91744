//! Signals as readable events, and sending them.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

const NAMES: [(&str, i32); 10] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("TERM", libc::SIGTERM),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("WINCH", libc::SIGWINCH),
    ("PWR", libc::SIGPWR),
    ("CONT", libc::SIGCONT),
    ("TSTP", libc::SIGTSTP),
];

pub fn by_name(name: &str) -> Option<i32> {
    let name = name.strip_prefix("SIG").unwrap_or(name);
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
}

/// Every signal that `hold` receives or forwards, blocked and readable.
pub struct Signals {
    fd: OwnedFd,
    /// The mask that `hold` was started with. The server starts with it too.
    before: libc::sigset_t,
    /// SIGHUP was not ignored at the start. Under nohup(1) it is ignored.
    pub hangup_counts: bool,
}

impl Signals {
    /// Blocks every signal that is forwarded, and makes it readable. A signal that was ignored at the start stays ignored: a
    /// shell script ignores SIGINT for its background jobs.
    pub fn take() -> io::Result<Self> {
        // With SIGCHLD ignored the kernel would reap the children, and their status would be lost.
        // SAFETY: SIG_DFL is a valid disposition.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        let named = NAMES.iter().map(|(_, signal)| *signal);
        let all = named.filter(|&signal| signal == libc::SIGHUP || !is_ignored(signal));
        let all = all.chain(libc::SIGRTMIN()..=libc::SIGRTMAX()).chain([libc::SIGCHLD]);
        let mut set = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes `set` before it is read, and sigprocmask initializes `before`. The descriptor is
        // new, and nothing else owns it.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in all {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr()))?;
            let fd = check(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
            let (fd, before) = (OwnedFd::from_raw_fd(fd), before.assume_init());
            Ok(Self { fd, before, hangup_counts: !is_ignored(libc::SIGHUP) })
        }
    }

    /// Returns the next pending signal.
    pub fn next(&self) -> Option<i32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = mem::size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer has that size, and the kernel writes only complete structures.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        // SAFETY: the kernel has written the complete structure.
        (read == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo as i32)
    }

    /// Restores the mask and SIGPIPE for the server, between fork and execve. (Rust's runtime ignores SIGPIPE.)
    pub fn restore(&self) {
        // SAFETY: sigprocmask initialized `before`.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::sigprocmask(libc::SIG_SETMASK, &self.before, ptr::null_mut());
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends a signal to a process, or with a negative number to a process group. It may already have ended.
pub fn send(pid: i32, signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid, signal) };
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only writes the current one. If it fails, the zeros are a valid action.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
