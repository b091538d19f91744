//! Processes: sending signals to them, noticing their end, and finding descendants in /proc.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{pidfd_open, wait, waitid, Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions};

use crate::signals::send;

/// A process that `hold` watches. It may be a child or not.
pub struct Process {
    pub pid: i32,
    pidfd: Option<OwnedFd>,
}

impl Process {
    pub fn of(pid: i32) -> Self {
        let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self { pid, pidfd }
    }

    /// A descriptor that is readable once the process has ended. `None` if the kernel does not support pidfds.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(|pidfd| pidfd.as_fd())
    }

    pub fn signal(&self, signal: i32) {
        let null = ptr::null::<libc::siginfo_t>();
        match &self.pidfd {
            // SAFETY: with a null pointer the kernel fills in the same siginfo as for kill(2).
            Some(pidfd) => unsafe {
                libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, null, 0);
            },
            // The PID of a child cannot be reused before `hold` reaps it.
            None => send(self.pid, signal),
        }
    }

    /// Whether it has ended and another process must reap it.
    pub fn has_ended_elsewhere(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = |pidfd| poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], Some(&now)) == Ok(1);
        self.pidfd().is_some_and(ended) && !self.is_child()
    }

    fn is_child(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Pid::from_raw(self.pid).is_some_and(|pid| waitid(WaitId::Pid(pid), options).err() != Some(Errno::CHILD))
    }

    /// Whether it is a descendant of this process.
    pub fn is_ours(&self) -> bool {
        self.is_child() || descendants().iter().any(|process| process.pid == self.pid)
    }
}

/// The outcome of `reap`.
pub enum Reaped {
    Child(i32, ExitStatus),
    /// All children are still alive.
    None,
    /// There are no children.
    NoChildren,
}

/// Reaps one child that has ended.
pub fn reap() -> Reaped {
    match wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => Reaped::Child(pid.as_raw_nonzero().get(), ExitStatus::from_raw(status.as_raw())),
        Err(Errno::CHILD) => Reaped::NoChildren,
        _ => Reaped::None,
    }
}

/// A living descendant of this process.
pub struct Descendant {
    pub pid: i32,
    parent: i32,
    /// When it was created, in ticks.
    start: u64,
    /// It has called execve itself, unlike a forked worker.
    executed: bool,
    /// Its first thread has ended. Its children are reparented only after all of its threads have ended.
    ended: bool,
}

/// Returns all descendants in the order of their start. Empty if /proc is missing or belongs to another PID namespace.
pub fn descendants() -> Vec<Descendant> {
    let me = std::process::id() as i32;
    let is_ours = fs::read_link("/proc/self").is_ok_and(|to| to.to_str() == Some(&me.to_string()));
    if !is_ours {
        return Vec::new();
    }
    let mut all = read_all();
    for _ in 0..5 {
        // If the parent of a process is missing, it ended after the process was read. The next try finds the new parent.
        let has_parent = |child: &Descendant| all.iter().any(|process| [process.pid, 0].contains(&child.parent));
        if all.iter().all(has_parent) {
            break;
        }
        all = read_all();
    }
    let mut below = vec![me];
    let mut next = 0;
    while let Some(&parent) = below.get(next) {
        below.extend(all.iter().filter(|process| process.parent == parent).map(|process| process.pid));
        next += 1;
    }
    all.retain(|process| !process.ended && process.pid != me && below.contains(&process.pid));
    all.sort_by_key(|process| (process.start, process.pid));
    all
}

fn read_all() -> Vec<Descendant> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| Descendant::read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

impl Descendant {
    fn read(pid: i32) -> Option<Self> {
        const PF_FORKNOEXEC: u64 = 0x40;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before the last parenthesis may contain any character.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
        let executed = number(6)? & PF_FORKNOEXEC == 0;
        Some(Self { pid, parent: number(1)? as i32, start: number(19)?, executed, ended: fields[0] == "Z" })
    }

    /// Whether it has itself executed the program with this name.
    pub fn runs(&self, program: &[u8]) -> bool {
        self.executed && program_of(self.pid).is_some_and(|name| name == program)
    }

    /// Whether it has a handler for the signal. A process installs its handlers during its start.
    pub fn handles(&self, signal: i32) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
    }
}

/// Returns the name under which a process was executed, which is its first argument. A process that ends during the read may
/// return only a part of it, without the null byte at its end.
pub fn program_of(pid: i32) -> Option<Vec<u8>> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let end = line.iter().position(|byte| *byte == 0).filter(|end| *end > 0)?;
    Some(line[..end].to_vec())
}
