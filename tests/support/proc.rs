//! Information about a process from /proc: descriptors, children, threads, state.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use super::timespec;

/// Returns the descriptors of a process and the objects they refer to. Empty if the process has ended.
pub fn fds(process: u32) -> BTreeMap<i32, String> {
    let Ok(dir) = fs::read_dir(format!("/proc/{process}/fd")) else { return BTreeMap::new() };
    let target = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, target.to_string_lossy().into_owned()))
    };
    dir.flatten().filter_map(target).collect()
}

/// Returns the flags of a descriptor, including O_CLOEXEC. `None` if it is no longer open.
pub fn fd_flags(process: u32, fd: i32) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{fd}")).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    Some(i32::from_str_radix(flags.trim(), 8).unwrap())
}

/// Whether exactly this number of accept loops wait for connections. Each has its own epoll. With the fallbacks for
/// other systems, its thread sleeps instead.
pub fn accept_loops_wait(process: u32, loops: usize) -> bool {
    if cfg!(ecdysis_unix) {
        return threads(process).values().filter(|state| **state == 'S').count() > loops;
    }
    fds(process).values().filter(|target| target.contains("eventpoll")).count() == loops
}

/// The same without inode numbers, which differ from run to run.
pub fn kinds(process: u32) -> BTreeMap<i32, String> {
    let kind = |target: String| match target.split_once(":[") {
        Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
        _ => target,
    };
    fds(process).into_iter().map(|(number, target)| (number, kind(target))).collect()
}

/// Returns the children of a process, with their state: 'Z' is a zombie.
pub fn children(process: u32) -> BTreeMap<u32, char> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| {
            let pid = pid.parse().ok()?;
            Some((pid, state(pid)?))
        }));
    }
    found
}

/// Returns the threads of a process, with their state.
pub fn threads(process: u32) -> BTreeMap<u32, char> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let thread = |task: fs::DirEntry| {
        let tid = task.file_name().to_string_lossy().parse().ok()?;
        Some((tid, state(tid)?))
    };
    tasks.filter_map(thread).collect()
}

/// Returns the state letter in /proc/PID/stat.
pub fn state(process: u32) -> Option<char> {
    stat(process).map(|(state, _)| state)
}

/// Returns the state letter and the process group.
pub fn stat(process: u32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.nth(1)?.parse().ok()?))
}

/// Whether a process has ended. It may still be a zombie. Its state would say so when only its first thread has ended,
/// and the others still have its descriptors.
pub fn gone(process: u32) -> bool {
    let pidfd = pidfd_open(Pid::from_raw(process as i32).unwrap(), PidfdFlags::empty());
    pidfd
        .map_or(true, |pidfd| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timespec(Duration::ZERO))) == Ok(1))
}

/// Returns a field of /proc/PID/status.
#[track_caller]
pub fn status_field(process: u32, name: &str) -> String {
    try_status_field(process, name).unwrap_or_else(|| panic!("no {name} of process {process}"))
}

pub fn try_status_field(process: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// Whether this process has a capability, by its number (capabilities(7)). In a container root has only some.
pub fn has_capability(number: u32) -> bool {
    let effective = u64::from_str_radix(&status_field(std::process::id(), "CapEff"), 16).unwrap();
    effective & (1 << number) != 0
}
