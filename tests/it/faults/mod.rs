//! The fault sweep and the death sweep: every system call of an upgrade fails once with each error that it can return,
//! and at every call a process is killed or stopped. Each point is a separate run under load.
//!
//! `cargo test --test it faults:: -- --nocapture` shows the figures. It runs only a sample of the stops, because each
//! takes a full deadline, and of the killings with fork and with a socket. `cargo test --test it faults:: -- --ignored
//! --nocapture` runs all.

mod errors;
pub mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use errors::{errnos, name};
use rustix::process::Signal;
use trace::{Call, Fault, Role, Seen};

use crate::support::*;

/// TCP on port 0, so that a child that bound again would get another port; a Unix path; and all options that write
/// files.
const SERVER: [&str; 12] = [
    "--listen",
    "127.0.0.1:0",
    "--listen",
    "unix:DIR/sock",
    "--pid-file",
    "DIR/pid",
    "--control-socket",
    "DIR/control",
    "--probation",
    "30",
    "--drain",
    "60",
];

#[derive(Clone, Copy)]
struct Setup {
    fork: bool,
    transport: &'static str,
    ready_timeout: &'static str,
}

const CLONE: Setup = Setup { fork: false, transport: "pipes", ready_timeout: "60000" };
const FORK: Setup = Setup { fork: true, transport: "pipes", ready_timeout: "60000" };
const SOCKET: Setup = Setup { fork: false, transport: "socket", ready_timeout: "60000" };

/// The number of points that run in parallel. Most of the time they wait.
const AT_ONCE: usize = 6;

impl Setup {
    fn server(self) -> Server {
        let mut args = SERVER.to_vec();
        args.extend(["--ready-timeout", self.ready_timeout, "--transport", self.transport]);
        if self.fork {
            args.push("--fork");
        }
        Server::whoami(&args)
    }
}

/// The descriptors and threads of a process that serves and is otherwise idle.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Level {
    fds: BTreeMap<i32, String>,
    threads: usize,
}

impl Level {
    /// Waits until every accept loop of this generation has waited, and so has an epoll, and earlier connections are
    /// gone.
    fn settled(server: &Server, pid: u32, sockets: usize) -> Result<Self, String> {
        let addrs = server.stream_addrs();
        for addr in &addrs {
            ask(addr).map_err(|e| e.to_string())?;
        }
        let mut level = Self::of(pid);
        try_eventually("a settled server", || {
            level = Self::of(pid);
            let of_kind = |kind: &str| level.fds.values().filter(|fd| *fd == kind).count();
            of_kind("socket") == sockets && of_kind("anon_inode:[eventpoll]") == addrs.len() && level.threads == 4
        })?;
        Ok(level)
    }

    fn difference(&self, other: &Self) -> String {
        let new: Vec<_> = other.fds.iter().filter(|fd| self.fds.get(fd.0) != Some(fd.1)).collect();
        let lost: Vec<_> = self.fds.iter().filter(|fd| other.fds.get(fd.0) != Some(fd.1)).collect();
        format!("new {new:?}, lost {lost:?}, threads {} to {}", self.threads, other.threads)
    }

    fn of(pid: u32) -> Self {
        Self { fds: kinds(pid), threads: threads(pid).len() }
    }
}

/// Two listeners, twice each, and the control socket, twice.
const SOCKETS: usize = 6;

/// Traces a clean upgrade. Returns its system calls, and the state of the new process.
struct Clean {
    calls: Vec<Call>,
    new: Level,
}

fn record(setup: Setup) -> Clean {
    let server = setup.server();
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(2));
    let at = server.log.len();
    let seen = traced(&server, &load, None, DEADLINE).unwrap();
    let pid = field(&server.verdict(at).unwrap(), "pid");
    eventually("the old process ends", || gone(server.first_pid()));
    load.stop().assert_none_failed();
    for role in [Role::Parent, Role::Forked, Role::Child] {
        assert!(seen.calls.iter().any(|call| call.role == role), "no calls of {role:?}");
    }
    let link = usize::from(setup.transport == "socket");
    Clean { new: Level::settled(&server, pid, SOCKETS + link).unwrap(), calls: seen.calls }
}

fn traced(server: &Server, load: &Load, fault: Option<(Call, Fault)>, time: Duration) -> Result<Seen, String> {
    let at = server.log.len();
    let log = server.log.clone();
    let deadline = Instant::now() + time;
    let verdict = move || log.since(at).iter().any(|line| line.starts_with("upgrade "));
    // A tracer waits for events without a deadline. If there are none, this ends the wait.
    let (over, watchdog) = std::sync::mpsc::channel::<()>();
    let (log_too, pid) = (server.log.clone(), server.first_pid());
    thread::spawn(move || {
        if watchdog.recv_timeout(time) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            println!("  the tracer hangs: {:#?}", log_too.since(0));
            send_signal(pid, Signal::KILL);
        }
    });
    let _over = over;
    // Accepted connections die with a process. So the process is killed while it has none, and every failure counts.
    let (mut quiet, mut holds) = (None, false);
    let before_kill = |process| {
        quiet = Some(load.quiet());
        holds = holds_a_connection(process);
    };
    let mut seen = trace::upgrade(pid as i32, fault, || send_signal(pid, Signal::HUP), before_kill, verdict, deadline)
        .map_err(|e| format!("tracer: {e}"))?;
    // The stopped thread holds a lock that the answer needs, so this run proves nothing.
    seen.hit = seen.hit.filter(|_| !holds);
    Ok(seen)
}

/// Whether the process has accepted a connection that it has not answered.
fn holds_a_connection(process: u32) -> bool {
    let sockets: BTreeSet<_> = fds(process).into_values().collect();
    let net = |name: &str| std::fs::read_to_string(format!("/proc/{process}/net/{name}")).unwrap_or_default();
    let has = |inode: &str| sockets.contains(&format!("socket:[{inode}]"));
    let tcp = net("tcp").lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        matches!(fields[..], [_, _, _, "01" | "08", _, _, _, _, _, inode, ..] if has(inode))
    });
    tcp || net("unix").lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        matches!(fields[..], [_, _, _, _, _, "03", inode, path] if has(inode) && path.ends_with("/sock"))
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Survival {
    /// The call did not occur this time.
    Missed,
    Survived,
}

/// Makes one upgrade with one fault, and checks everything that must hold afterward.
fn fail(setup: Setup, clean: &Level, call: Call, errno: i32) -> Result<Survival, String> {
    let server = setup.server();
    let before = Level::settled(&server, server.first_pid(), SOCKETS)?;
    let at = server.log.len();
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(2));
    let seen = traced(&server, &load, Some((call, Fault::Errno(errno))), DEADLINE)?;
    let verdict = server.verdict(at)?;
    let serving = if verdict.starts_with("upgrade ok") {
        let new = try_field(&verdict, "pid").ok_or("no pid")?;
        try_eventually("the old process ends", || gone(server.first_pid()))?;
        // The new process may lack something because of the fault, but it must not have more than usual.
        let mut level = Level::of(new);
        try_eventually("descriptors and threads of a new process", || {
            level = Level::of(new);
            // The file that std keeps open if there is no getrandom.
            level.fds.retain(|_, to| to != "/dev/urandom");
            level.fds.len() <= clean.fds.len() && level.threads <= clean.threads
        })
        .map_err(|e| format!("{e}: {}; {verdict}", clean.difference(&level)))?;
        new
    } else {
        try_eventually("descriptors and threads as before", || Level::of(server.first_pid()) == before)
            .map_err(|e| format!("{e}: {}; {verdict}", before.difference(&Level::of(server.first_pid()))))?;
        names_the_cause(&verdict, call, errno)?;
        server.first_pid()
    };
    try_eventually("no child is left", || children(serving).is_empty())
        .map_err(|e| format!("{e}: {:?}; {verdict}", children(serving)))?;
    if let Some(child) = seen.child.map(|child| child as u32).filter(|child| *child != serving) {
        try_eventually("the child ends", || gone(child))?;
    }
    let pid = server.answers()?;
    if pid != serving {
        return Err(format!("{pid} serves, not {serving}; {verdict}"));
    }
    let pid_file = std::fs::read_to_string(server.dir().join("pid")).map_err(|e| e.to_string())?;
    if pid_file.trim() != serving.to_string() {
        return Err(format!("the PID file names {pid_file:?}, {serving} serves; {verdict}"));
    }
    if std::fs::read_dir(server.dir()).map_err(|e| e.to_string())?.count() != 3 {
        return Err(format!("files are left over; {verdict}"));
    }
    let next = server.try_upgrade(serving)?;
    if !next.starts_with("upgrade ok") {
        return Err(format!("the next upgrade: {next}; the one before: {verdict}"));
    }
    let failures = load.stop().failures;
    if !failures.is_empty() {
        return Err(format!("requests failed: {failures:?}; {verdict}"));
    }
    Ok(if seen.hit.is_some() { Survival::Survived } else { Survival::Missed })
}

/// The error is the caller's only information. Failures inside the new program are reported by that program.
fn names_the_cause(verdict: &str, call: Call, errno: i32) -> Result<(), String> {
    let cause = std::io::Error::from_raw_os_error(errno).to_string();
    let named = match call.role {
        Role::Parent => verdict.contains(&cause) || call.late && verdict.contains("died"),
        Role::Forked => verdict.contains(&cause) || verdict.contains("cannot"),
        Role::Child => verdict.contains("child"),
    };
    if named {
        Ok(())
    } else {
        Err(format!("the error does not name the cause ({cause}): {verdict}"))
    }
}

/// Makes one upgrade in which a process is killed or stopped at one call, and checks everything that must hold
/// afterward.
fn die(setup: Setup, call: Call, signal: i32) -> Result<Survival, String> {
    let server = setup.server();
    let before = Level::settled(&server, server.first_pid(), SOCKETS)?;
    let at = server.log.len();
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(2));
    let seen = traced(&server, &load, Some((call, Fault::Signal(signal))), DEADLINE)?;
    if seen.hit.is_none() {
        return Ok(Survival::Missed);
    }
    // An interrupted wait may change the count, so that a call comes earlier.
    let Some(child) = seen.child.map(|child| child as u32) else { return Ok(Survival::Missed) };
    if signal == libc::SIGSTOP {
        // At this moment the tracer detaches from every thread, and a signal may get lost.
        let stopped = if call.role == Role::Parent { server.first_pid() } else { child };
        let until = Instant::now() + Duration::from_secs(2);
        while state(stopped) != Some('T') {
            if Instant::now() > until {
                return Ok(Survival::Missed);
            }
            thread::yield_now();
        }
    }
    let serving = if call.role == Role::Parent {
        // The child decides on its own: immediately if the parent is dead, after 5 seconds if it is silent.
        server.log.wait(at, |line| line.starts_with("serving gen=2 "))?;
        try_eventually("the child answers", || server.answers().is_ok_and(|pid| pid == child))?;
        if signal == libc::SIGSTOP {
            send_signal(server.first_pid(), Signal::CONT);
        }
        try_eventually("the parent ends", || gone(server.first_pid()))
            .map_err(|e| format!("{e}: {:#?}, {}", server.log.since(at), activity(server.first_pid())))?;
        child
    } else {
        let verdict = server.verdict(at)?;
        if !verdict.starts_with("upgrade failed: child ") {
            return Err(verdict);
        }
        try_eventually("the child ends", || gone(child))?;
        try_eventually("no child is left", || children(server.first_pid()).is_empty())?;
        try_eventually("descriptors and threads as before", || Level::of(server.first_pid()) == before)
            .map_err(|e| format!("{e}: {}; {verdict}", before.difference(&Level::of(server.first_pid()))))?;
        server.first_pid()
    };
    let pid = server.answers()?;
    if pid != serving {
        return Err(format!("{pid} serves, not {serving}"));
    }
    let next = server.try_upgrade(serving)?;
    if !next.starts_with("upgrade ok") {
        return Err(format!("the next upgrade: {next}"));
    }
    let failures = load.stop().failures;
    if !failures.is_empty() {
        return Err(format!("requests failed: {failures:?}"));
    }
    Ok(Survival::Survived)
}

/// Describes what each thread of a process does, for an error message.
fn activity(pid: u32) -> String {
    let read = |task: &std::path::Path, name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let task = |path: std::path::PathBuf| format!("{} {}", read(&path, "stat"), read(&path, "syscall"));
    tasks.map(|entry| task(entry.path())).collect()
}

/// The calls at which a process is killed: all of the child's, and those of the parent once the child exists.
fn deaths(calls: &[Call]) -> Vec<Call> {
    let spawned = calls.iter().position(|call| call.role == Role::Forked).unwrap_or(calls.len());
    let parents = calls[spawned..].iter().filter(|call| call.role == Role::Parent);
    let children = calls.iter().filter(|call| call.role != Role::Parent);
    children.chain(parents).filter(|call| is_step(call)).copied().collect()
}

/// Resetting 62 handlers counts as one step.
fn is_step(call: &Call) -> bool {
    call.number != libc::SYS_rt_sigaction || call.nth == 30
}

/// A process that is stopped after it has sent `serving` is simply a stopped server.
fn spoken(call: &Call, signal: i32) -> bool {
    signal == libc::SIGSTOP && call.late && call.role == Role::Child && call.number == libc::SYS_write
}

fn death_sweep(title: &str, setup: Setup, at_a_time: usize, points: &[(Call, i32)]) {
    let describe = |(call, signal): &(Call, i32)| {
        format!("signal {signal} of {:?} at {} number {}", call.role, name(call.number), call.nth)
    };
    let lost = sweep(title, points, at_a_time, describe, |(call, signal)| die(setup, call, signal));
    assert!(lost.is_empty(), "{title}: {} not survived, the first: {}", lost.len(), lost[0]);
}

/// Runs all points, some in parallel. Prints the figures, and returns the points that were not survived.
fn sweep<T: Copy + Send + Sync>(
    title: &str,
    points: &[T],
    at_a_time: usize,
    describe: impl Fn(&T) -> String + Sync,
    run: impl Fn(T) -> Result<Survival, String> + Sync,
) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let (survived, missed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let lost = Mutex::new(Vec::new());
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // A fault that depends on timing may not be injected at the first try.
                    let mut result = run(*point);
                    for _ in 0..2 {
                        if result == Ok(Survival::Missed) {
                            result = run(*point);
                        }
                    }
                    match result {
                        Ok(Survival::Survived) => drop(survived.fetch_add(1, Ordering::Relaxed)),
                        Ok(Survival::Missed) => drop(missed.fetch_add(1, Ordering::Relaxed)),
                        Err(why) => {
                            let line = format!("{}: {why}", describe(point));
                            println!("  not survived: {line}");
                            lost.lock().unwrap().push(line);
                        }
                    }
                }
            });
        }
    });
    let lost = lost.into_inner().unwrap();
    let (survived, missed) = (survived.into_inner(), missed.into_inner());
    let injected = survived + lost.len();
    println!(
        "{title}: {injected} faults injected, {survived} survived ({missed} calls did not occur) in {:?}",
        began.elapsed()
    );
    lost
}

fn all_errors(calls: &[Call]) -> Vec<(Call, i32)> {
    let points = calls.iter().filter(|call| call.role != Role::Forked || is_step(call));
    points.flat_map(|call| errnos(call).iter().map(|errno| (*call, *errno))).collect()
}

fn fault_sweep(title: &str, setup: Setup, clean: &Level, points: &[(Call, i32)]) {
    let describe = |(call, errno): &(Call, i32)| {
        let errno = std::io::Error::from_raw_os_error(*errno);
        format!("{:?} {} number {}: {errno}", call.role, name(call.number), call.nth)
    };
    let lost = sweep(title, points, AT_ONCE, describe, |(call, errno)| fail(setup, clean, call, errno));
    assert!(lost.is_empty(), "{title}: {} not survived, the first: {}", lost.len(), lost[0]);
}

/// A stopped process is waited for until its deadline. Many run in parallel, because they only wait.
const STOPPED: Setup = Setup { fork: false, transport: "pipes", ready_timeout: "5000" };

fn all_deaths(signal: i32) -> Vec<(Call, i32)> {
    let calls = deaths(&record(CLONE).calls).into_iter().filter(|call| !spoken(call, signal));
    calls.map(|call| (call, signal)).collect()
}

/// Skips the calls of the new program before it takes the handover, which are the same in every setup.
fn of_the_handover(calls: Vec<Call>) -> Vec<Call> {
    let took = |call: &Call| call.role == Role::Child && call.number == libc::SYS_recvmsg;
    let from = calls.iter().position(took).unwrap_or(calls.len());
    let here = |(at, call): (usize, Call)| (call.role != Role::Child || at >= from).then_some(call);
    calls.into_iter().enumerate().filter_map(here).collect()
}

#[test]
fn every_killing_is_survived() {
    death_sweep("killed", CLONE, AT_ONCE, &all_deaths(libc::SIGKILL));
}

/// A signal that ends the child before its execve must not affect the parent, although the child still shares its
/// memory and might run its handlers.
#[test]
fn a_stop_signal_to_the_child_alone_stops_nothing_else() {
    let calls = deaths(&record(CLONE).calls).into_iter().filter(|call| call.role == Role::Forked);
    let points: Vec<_> = calls.map(|call| (call, libc::SIGTERM)).collect();
    death_sweep("stop signal to the child", CLONE, AT_ONCE, &points);
}

/// Like a child whose program is on a dead file system. With vfork(2) the parent would wait for it.
#[test]
fn a_child_that_is_stopped_before_its_execve_costs_its_deadline() {
    let first = record(STOPPED).calls.into_iter().find(|call| call.role == Role::Forked);
    assert_eq!(die(STOPPED, first.unwrap(), libc::SIGSTOP), Ok(Survival::Survived));
}

/// Kills at one in `step` calls.
fn killings_with_fork_and_with_a_socket(step: usize) {
    for (title, setup) in [("killed, fork", FORK), ("killed, socket", SOCKET)] {
        let calls = deaths(&of_the_handover(record(setup).calls));
        let points: Vec<_> = calls.into_iter().step_by(step).map(|call| (call, libc::SIGKILL)).collect();
        death_sweep(title, setup, AT_ONCE, &points);
    }
}

#[test]
fn a_sample_of_killings_is_survived_with_fork_and_with_a_socket() {
    killings_with_fork_and_with_a_socket(3);
}

#[test]
#[ignore = "takes a minute: cargo test --test it faults:: -- --ignored --nocapture"]
fn every_killing_is_survived_with_fork_and_with_a_socket() {
    killings_with_fork_and_with_a_socket(1);
}

#[test]
fn a_sample_of_all_stops_is_survived() {
    let all = all_deaths(libc::SIGSTOP).into_iter().enumerate();
    let sample: Vec<_> = all.filter(|(at, (call, _))| at % 8 == 0 || call.late).map(|(_, point)| point).collect();
    death_sweep("stopped, sample", STOPPED, 12, &sample);
}

#[test]
#[ignore = "takes a minute: cargo test --test it faults:: -- --ignored --nocapture"]
fn every_stop_is_survived() {
    death_sweep("stopped", STOPPED, 12, &all_deaths(libc::SIGSTOP));
    let stopped = Setup { ready_timeout: STOPPED.ready_timeout, ..SOCKET };
    let calls = deaths(&of_the_handover(record(SOCKET).calls)).into_iter().map(|call| (call, libc::SIGSTOP));
    let points: Vec<_> = calls.filter(|(call, signal)| !spoken(call, *signal)).collect();
    death_sweep("stopped, socket", stopped, 12, &points);
}

#[test]
fn every_fault_is_survived() {
    let clean = record(CLONE);
    fault_sweep("all faults, clone", CLONE, &clean.new, &all_errors(&clean.calls));
}

#[test]
fn every_fault_is_survived_with_fork() {
    let clean = record(FORK);
    fault_sweep("all faults, fork", FORK, &clean.new, &all_errors(&of_the_handover(clean.calls)));
}

#[test]
fn every_fault_is_survived_with_a_socket() {
    let clean = record(SOCKET);
    fault_sweep("all faults, socket", SOCKET, &clean.new, &all_errors(&of_the_handover(clean.calls)));
}
