//! Ends every process of a test run, even after a test was killed, and prevents tests from signaling foreign processes.
//!
//! Each process that a test starts has a mark in its environment, which every later generation inherits. A process
//! keeps it even if it daemonizes or joins another group. (PR_SET_PDEATHSIG would reach only the first generation.) A
//! guard process holds the reading end of a pipe. When the test program ends for any reason, the pipe ends, and the
//! guard kills every process with the mark.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::SystemTime;

use rustix::process::{pidfd_open, pidfd_send_signal, set_child_subreaper, Pid, PidfdFlags, Signal};

const MARK: &str = "ECDYSIS_TEST";
const GUARD: &str = "ECDYSIS_TEST_GUARD";

/// Marks the command's process and its descendants. `part` distinguishes the servers of one test program.
pub fn mark(command: &mut Command, part: usize) -> &mut Command {
    command.env(MARK, format!("{}.{part}.", run()))
}

/// Returns the mark of this test program, and starts the guard.
fn run() -> &'static str {
    static RUN: OnceLock<(String, ChildStdin)> = OnceLock::new();
    // The guard ends after this process, so this process cannot wait for it.
    #[allow(clippy::zombie_processes)]
    let start = || {
        // Orphaned generations become children of this process. They are not reaped before the test is over, so no PID
        // is reused.
        set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let run = format!("{}-{:x}", std::process::id(), now.as_nanos());
        let mut guard = Command::new(std::env::current_exe().unwrap());
        guard.args(["--exact", "support::guard::watch", "--nocapture", "--test-threads=1"]).env(GUARD, &run);
        // A separate process group, so that Ctrl-C ends only the tests, and the guard can end the remaining processes.
        guard.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut guard = guard.spawn().unwrap();
        (run, guard.stdin.take().unwrap())
    };
    &RUN.get_or_init(start).0
}

/// Not a test: runs the guard, if the environment says so.
#[test]
fn watch() {
    let Ok(run) = std::env::var(GUARD) else { return };
    let _ = io::stdin().read_to_end(&mut Vec::new());
    end(&format!("{run}."), |_| false);
}

/// Kills this server of the test program, and all its descendants. `group` is its process group, whose leader must not
/// have been reaped, so that no other group has that number.
pub fn end_part(part: usize, group: Pid) {
    let group = group.as_raw_nonzero().get();
    end(&format!("{}.{part}.", run()), |pid| super::proc::stat(pid).is_some_and(|(_, of)| of == group));
}

/// Repeats until there is none, because a process may have forked in between.
fn end(mark: &str, is_known: impl Fn(u32) -> bool) {
    let mut found = Vec::new();
    let ended = super::try_eventually("every process ends that was killed", || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        found = pids.filter_map(|pid| Some((pid, open(pid, mark, &is_known)?))).collect();
        for (_, pidfd) in &found {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        found.is_empty()
    });
    let pids = || found.iter().map(|(pid, _)| pid.as_raw_nonzero()).collect::<Vec<_>>();
    ended.unwrap_or_else(|e| fail(format!("{e}: {:?}", pids())));
}

/// Panics, unless the test already does: a second panic would abort all other tests.
pub fn fail(error: String) {
    if thread::panicking() {
        eprintln!("{error}");
    } else {
        panic!("{error}");
    }
}

/// A process that has the mark and has not ended. The descriptor is opened before the check, so it refers to the
/// process that was checked. In a container even root may not read the environment of another user's process (it has no
/// CAP_SYS_PTRACE); then `is_known` decides.
fn open(pid: Pid, mark: &str, is_known: impl Fn(u32) -> bool) -> Option<OwnedFd> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let number = pid.as_raw_nonzero().get() as u32;
    let start = format!("{MARK}={mark}");
    let is_marked = match fs::read(format!("/proc/{number}/environ")) {
        Ok(variables) => variables.split(|byte| *byte == 0).any(|variable| variable.starts_with(start.as_bytes())),
        Err(e) => e.kind() == io::ErrorKind::PermissionDenied && is_known(number),
    };
    (is_marked && super::state(number) != Some('Z')).then_some(pidfd)
}

/// Opens a process of this test program. All of them are its descendants, because it is a subreaper.
fn open_own(pid: u32) -> Option<OwnedFd> {
    let parent = |pid: &u32| super::try_status_field(*pid, "PPid")?.parse().ok();
    let is_known = |pid| std::iter::successors(Some(pid), parent).any(|pid| pid == std::process::id());
    open(Pid::from_raw(pid as i32)?, &format!("{}.", run()), is_known)
}

/// Sends a signal to a process of this test program. Returns false if it has ended.
pub fn try_send_signal(to: u32, signal: Signal) -> bool {
    open_own(to).is_some_and(|pidfd| pidfd_send_signal(&pidfd, signal).is_ok())
}

/// Sends a signal to a process of this test program. Panics if another process has that number.
pub fn send_signal(to: u32, signal: Signal) {
    match open_own(to) {
        Some(pidfd) => pidfd_send_signal(&pidfd, signal).unwrap(),
        // A process that ends loses its environment before it is a zombie, and does not need a signal.
        None => super::eventually(&format!("process {to} belongs to this test"), || super::state(to) == Some('Z')),
    }
}
