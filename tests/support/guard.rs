//! Ends every process of a test run, also those of a test that was killed, and lets no test signal a stranger.
//!
//! Each process that a test starts carries a mark in its environment, which every later generation inherits. A process
//! that daemonizes or joins another group keeps it, and PR_SET_PDEATHSIG, which reaches the first generation alone, does not
//! matter. A guard process holds the reading end of a pipe. When the test program has ended, however it did, the pipe
//! ends, and the guard kills whatever carries the mark.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::SystemTime;

use rustix::process::{pidfd_open, pidfd_send_signal, set_child_subreaper, Pid, PidfdFlags, Signal};

const MARK: &str = "ECDYSIS_TEST";
const GUARD: &str = "ECDYSIS_TEST_GUARD";

/// Marks what the command will start, and its descendants. `part` tells apart the servers of one test program.
pub fn mark(command: &mut Command, part: usize) -> &mut Command {
    command.env(MARK, format!("{}.{part}.", run()))
}

/// The mark of this test program.
fn run() -> &'static str {
    static RUN: OnceLock<(String, ChildStdin)> = OnceLock::new();
    // It ends after this process, so it cannot be waited for.
    #[allow(clippy::zombie_processes)]
    let start = || {
        // Orphaned generations become our children. Until the test is over nobody reaps them, so that no number is used again.
        set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let run = format!("{}-{:x}", std::process::id(), now.as_nanos());
        let mut guard = Command::new(std::env::current_exe().unwrap());
        guard.args(["--exact", "support::guard::watch", "--nocapture", "--test-threads=1"]).env(GUARD, &run);
        // A group of its own: Ctrl-C is for the tests, and the guard ends what they leave.
        guard.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut guard = guard.spawn().unwrap();
        (run, guard.stdin.take().unwrap())
    };
    &RUN.get_or_init(start).0
}

/// Not a test: the guard, if the environment says so.
#[test]
fn watch() {
    let Ok(run) = std::env::var(GUARD) else { return };
    let _ = io::stdin().read_to_end(&mut Vec::new());
    end(&format!("{run}."));
}

/// Kills the server that is this part of the test program, and all that has come of it.
pub fn end_part(part: usize) {
    end(&format!("{}.{part}.", run()));
}

/// Again until there is none: one may have forked in between.
fn end(mark: &str) {
    loop {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let found: Vec<_> = pids.filter_map(Pid::from_raw).filter_map(|pid| open(pid, mark)).collect();
        if found.is_empty() {
            return;
        }
        for pidfd in found {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// A process that carries the mark and has not ended. The descriptor is opened first, so it is the one that was looked at.
fn open(pid: Pid, mark: &str) -> Option<OwnedFd> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok()?;
    let start = format!("{MARK}={mark}");
    environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(start.as_bytes())).then_some(pidfd)
}

/// Sends a signal to a process of this test program, if it has not ended. False if it has.
pub fn try_send_signal(to: u32, signal: Signal) -> bool {
    let pidfd = Pid::from_raw(to as i32).and_then(|pid| open(pid, &format!("{}.", run())));
    pidfd.is_some_and(|pidfd| pidfd_send_signal(&pidfd, signal).is_ok())
}

/// Sends a signal to a process of this test program. Any other process with that number is left alone.
pub fn send_signal(to: u32, signal: Signal) {
    let pid = Pid::from_raw(to as i32).unwrap();
    match open(pid, &format!("{}.", run())) {
        Some(pidfd) => pidfd_send_signal(&pidfd, signal).unwrap(),
        // A zombie has no environment, and needs no signal.
        None => assert_eq!(super::state(to), Some('Z'), "process {to} is not one of this test's"),
    }
}
