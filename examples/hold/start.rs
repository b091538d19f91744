//! Starting a program: its environment, its descriptors, its session.

use std::convert::Infallible;
use std::env;
use std::ffi::{c_char, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::ptr;

use rustix::io::{fcntl_setfd, FdFlags};

use crate::options::Options;
use crate::process::Process;
use crate::say;
use crate::signals::{check, Signals};
use crate::store::{Entry, Store};

/// The first descriptor that is passed, SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;

/// Variables that are meant for this process and not for the programs it starts.
const OURS: [&str; 8] = [
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "FDSTORE",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
];

/// Returns this process's environment without the variables that are meant only for this process.
pub fn inherited() -> Vec<CString> {
    let for_others = env::vars_os().filter(|(name, _)| name.to_str().is_none_or(|name| !OURS.contains(&name)));
    let joined = for_others.map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='));
    // Neither can contain a NUL, because both come from C strings.
    joined.filter_map(|variable| CString::new(variable).ok()).collect()
}

/// Returns the server's environment, which names `hold` as its service manager.
pub fn environment(options: &Options, notify_socket: &str) -> Vec<CString> {
    let mut environment = inherited();
    let mut set = |name: &str, value: String| {
        let prefix = format!("{name}=");
        environment.retain(|variable| !variable.as_bytes().starts_with(prefix.as_bytes()));
        environment.extend(CString::new(prefix + &value));
    };
    set("NOTIFY_SOCKET", notify_socket.into());
    if options.store > 0 {
        set("FDSTORE", options.store.to_string());
    }
    if let Some(every) = options.watchdog {
        set("WATCHDOG_USEC", every.as_micros().to_string());
    }
    environment
}

/// Stores the descriptors that were passed to `hold` by LISTEN_FDS, for the server. Call it before any descriptor is opened.
pub fn adopt_passed(store: &mut Store) {
    let number = |name| env::var(name).ok()?.parse::<i32>().ok();
    let (Some(pid), Some(count)) = (number("LISTEN_PID"), number("LISTEN_FDS")) else { return };
    if pid != std::process::id() as i32 {
        return;
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    for number in FIRST..FIRST.saturating_add(count) {
        let name = names.next().unwrap_or("unknown");
        if let Err(why) = adopt(number).map_err(|e| e.to_string()).and_then(|fd| Ok(store.put(name, fd, false)?)) {
            say(&format!("cannot pass on descriptor {number}, {name:?}: {why}"));
            break;
        }
    }
}

/// Takes ownership of a descriptor that this process was started with.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call is harmless for any number, and fails if it is not open.
    fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and was passed to this process to own, because `hold` has not opened a descriptor yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Starts a program as the leader of a new session, so that the signals of a terminal reach only `hold`. Passes the
/// descriptors by LISTEN_FDS.
pub fn start(argv: &[CString], environment: &[CString], passed: &[Entry], signals: &Signals) -> io::Result<Process> {
    // SAFETY: this process has one thread, so no lock is held in the child, which may allocate. It does not return.
    match unsafe { check(libc::fork())? } {
        0 => {
            let Err(error) = execute(argv, environment, passed, signals);
            say(&format!("cannot execute {}: {error}", argv[0].to_string_lossy()));
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(Process::of(pid)),
    }
}

fn execute(argv: &[CString], environment: &[CString], passed: &[Entry], signals: &Signals) -> io::Result<Infallible> {
    let mut environment = environment.to_vec();
    // This tells the server that it is the main process, not a helper that inherited NOTIFY_SOCKET.
    environment.push(CString::new(format!("SYSTEMD_EXEC_PID={}", std::process::id()))?);
    if !passed.is_empty() {
        // Copy them above the numbers that they will have, so that no dup2 closes one. The copies are close-on-exec.
        let beyond = FIRST + passed.len() as RawFd;
        // SAFETY: duplicates an open descriptor.
        let copy = |entry: &Entry| check(unsafe { libc::fcntl(entry.fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, beyond) });
        let copies: Vec<RawFd> = passed.iter().map(copy).collect::<io::Result<_>>()?;
        for (number, copy) in (FIRST..).zip(copies) {
            // SAFETY: replaces the descriptor of that number only in this child, which no longer uses it.
            check(unsafe { libc::dup2(copy, number) })?;
        }
        let names: Vec<&str> = passed.iter().map(|entry| entry.name.as_str()).collect();
        environment.push(CString::new(format!("LISTEN_PID={}", std::process::id()))?);
        environment.push(CString::new(format!("LISTEN_FDS={}", passed.len()))?);
        environment.push(CString::new(format!("LISTEN_FDNAMES={}", names.join(":")))?);
    }
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, environment) = (pointers(argv), pointers(&environment));
    rustix::process::setsid()?;
    signals.restore();
    // SAFETY: both lists end with a null pointer, and the strings outlive the call.
    unsafe { libc::execvpe(argv[0], argv.as_ptr(), environment.as_ptr()) };
    Err(io::Error::last_os_error())
}
