//! The fault sweep and the death sweep of a takeover. From the connection on, every system call of either process fails
//! once with each error that it can return, and at every call that process is killed or stopped. Each point is a
//! separate run under load. Afterward a process serves, nothing is left behind, and the next takeover succeeds.
//!
//! strace injects the faults. `cargo test --test it takeover_faults::` runs a sample of the points, and `cargo test
//! --test it takeover_faults:: -- --ignored --nocapture` runs all.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crate::support::*;
use rustix::process::Signal;

/// The process that the fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Old,
    New,
}

/// The `nth` call of that name since the tracer was attached.
#[derive(Clone, Debug)]
struct Call {
    role: Role,
    name: String,
    nth: usize,
    /// The line that strace has printed for it.
    text: String,
    /// The old process has already sent everything, or the new one has already sent `ready`.
    late: bool,
}

#[derive(Clone)]
struct Point {
    call: Call,
    /// In strace's form, `error=EMFILE` or `signal=STOP`; or `KILL`.
    fault: String,
}

/// strace delays the call for this many microseconds. During that time, and while no request is being served, the test
/// kills the process.
const HELD: &str = "delay_enter=60000000";

impl Point {
    fn kills(&self) -> bool {
        self.fault == "KILL"
    }

    /// Whether the call is delayed now: strace has printed only the start of its line.
    fn is_held(&self, trace: &Path) -> bool {
        let trace = fs::read_to_string(trace).unwrap_or_default();
        let start = format!("{}(", self.call.name);
        let nth = trace.lines().filter(|line| line.starts_with(&start)).count();
        nth == self.call.nth
            && !trace.ends_with('\n')
            && trace.lines().last().is_some_and(|line| line.starts_with(&start))
    }
}

impl std::fmt::Debug for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Call { role, name, nth, text, .. } = &self.call;
        let text: String = text.chars().take(100).collect();
        write!(f, "{} in the {role:?} process at {name} number {nth} ({text})", self.fault)
    }
}

/// Returns the errors that a call can really return.
fn errors(call: &Call) -> &'static [&'static str] {
    // An eventfd's count does not overflow here, and writes to stderr are the program's own.
    if call.text.contains(r#""\1\0\0\0\0\0\0\0""#) || call.text.starts_with("write(2,") {
        return &[];
    }
    match call.name.as_str() {
        "accept4" => &["EMFILE", "ENFILE", "ENOMEM", "ECONNABORTED", "EINTR"],
        "clone3" => &["EAGAIN", "ENOMEM"],
        "connect" => &["ECONNREFUSED", "ENOENT", "EAGAIN", "EACCES", "ENOMEM"],
        "eventfd2" | "socket" => &["EMFILE", "ENFILE", "ENOMEM"],
        "fchmod" | "unlink" | "rename" => &["EACCES", "EROFS", "EIO", "ENOSPC"],
        "fcntl" if call.text.contains("DUPFD") => &["EMFILE", "EPERM"],
        "fcntl" if call.text.contains("F_GETFD") => &[],
        "fcntl" => &["EPERM"],
        "fstat" => &["ENOMEM", "EIO"],
        "getsockname" => &["ENOBUFS"],
        "getsockopt" => &["ENOMEM", "ENOPROTOOPT", "EPERM"],
        "mmap" => &["ENOMEM"],
        "openat" => &["EMFILE", "ENFILE", "EACCES", "ENOSPC"],
        "poll" | "ppoll" => &["EINTR", "ENOMEM"],
        // A Unix socket never returns EIO, and returns EPIPE only if the other end is closed.
        "read" => &["EINTR"],
        "recvfrom" | "recvmsg" => &["EINTR", "ENOMEM", "ECONNRESET"],
        "rt_sigaction" | "rt_sigprocmask" => &["EPERM"],
        "sendmsg" => &["EINTR", "EAGAIN", "EPIPE", "ENOBUFS", "ENOMEM", "ETOOMANYREFS"],
        "sendto" => &["EINTR", "EPIPE", "ENOBUFS", "ECONNRESET"],
        "write" if call.text.contains(r#""ready\n""#) || call.text.contains(r#""commit\n""#) => &["EINTR"],
        "write" => &["EINTR", "ENOSPC"],
        _ => &[],
    }
}

/// Two listeners. A process that bound them again would find one of the addresses taken.
struct Setting {
    dir: TempDir,
    ready_timeout: &'static str,
    probation: &'static str,
}

impl Setting {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn addr(&self) -> String {
        format!("unix:{}", self.path("sock").display())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(example("whoami"));
        self.arguments(&mut command);
        command
    }

    fn arguments(&self, command: &mut Command) {
        command.args(["--listen", "127.0.0.1:0", "--listen", &self.addr(), "--drain", "60"]);
        command.args(["--probation", self.probation]);
        command.arg("--take-over").arg(self.path("takeover")).arg("--takeover-socket").arg(self.path("takeover"));
        command.arg("--pid-file").arg(self.path("pid")).args(["--ready-timeout", self.ready_timeout]);
    }

    fn strace(&self, output: &Path, inject: Option<&Point>) -> Command {
        let mut command = Command::new("strace");
        command.arg("-o").arg(output);
        if let Some(point @ Point { call, fault }) = inject {
            let fault = if point.kills() { HELD } else { fault };
            command.args(["-e", &format!("inject={}:{fault}:when={}", call.name, call.nth)]);
        }
        command
    }

    /// Starts a new process that is traced from its first call.
    fn new_traced(&self, output: &Path, inject: Option<&Point>) -> Server {
        let mut command = self.strace(output, inject);
        command.arg(example("whoami"));
        self.arguments(&mut command);
        Server::start(command)
    }

    /// Starts a tracer of the old process's main thread, and waits until it is attached.
    fn old_traced(&self, old: &Server, output: &Path, inject: Option<&Point>) -> Server {
        let mut command = self.strace(output, inject);
        command.args(["-p", &old.pid().to_string()]);
        let mut tracer = Server::start(command);
        tracer.wait("attached");
        tracer
    }
}

/// Returns the calls in strace's output from the one that contains `first` to the one that contains `last`.
fn calls(role: Role, output: &Path, first: &str, late: &str, last: &str) -> Vec<Call> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut calls = Vec::new();
    let (mut begun, mut is_late) = (false, false);
    for line in fs::read_to_string(output).unwrap().lines() {
        let Some((name, _)) = line.split_once('(') else { continue };
        let nth = counts.entry(name.to_owned()).or_default();
        *nth += 1;
        begun |= line.contains(first);
        // Which thread waits for which depends on timing.
        if begun && name != "futex" {
            calls.push(Call { role, name: name.to_owned(), nth: *nth, text: line.to_owned(), late: is_late });
        }
        is_late |= begun && line.contains(late);
        if line.contains(last) {
            return calls;
        }
    }
    panic!("{role:?}: no {last:?} in {}", fs::read_to_string(output).unwrap());
}

/// Records the calls of both processes in a takeover without a fault.
fn record() -> Vec<Call> {
    let setting = Setting { dir: tempdir(), ready_timeout: "60000", probation: "30" };
    let mut old = Server::serving(setting.command());
    let (of_old, of_new) = (setting.path("old.trace"), setting.path("new.trace"));
    let tracer = setting.old_traced(&old, &of_old, None);
    let mut new = setting.new_traced(&of_new, None);
    new.wait("serving gen=2");
    old.wait("ended gen=1");
    tracer.wait_all_ended();
    let mut all = calls(Role::Old, &of_old, "accept4(", "fd 0 ", "\"verdict\\n\"");
    all.extend(calls(Role::New, &of_new, "AF_UNIX, SOCK_STREAM", "\"ready\\n\"", "\"serving gen="));
    all
}

/// Counts descriptors other than connections, while there is no request.
fn level(pid: u32) -> usize {
    fds(pid).len()
}

/// Runs one point. Returns an error if something did not hold, and otherwise whether the fault was injected, which may
/// depend on timing.
fn run(point: &Point) -> Result<bool, String> {
    let ready_timeout = if point.fault.contains("STOP") { "3000" } else { "60000" };
    // Long enough for a traced process to die, even on a busy machine.
    let probation = if point.call.role == Role::New && point.kills() && point.call.late { "15000" } else { "30" };
    let setting = Setting { dir: tempdir(), ready_timeout, probation };
    let result = std::panic::catch_unwind(|| attempt(point, &setting));
    if !matches!(result, Ok(Ok(_))) && strayed(point, &setting.path("trace")) {
        return Ok(false);
    }
    result.unwrap_or_else(|_| Err("see above".to_owned()))
}

/// If the new process does not have to wait for an answer, the count of its calls differs. Then the fault may hit after
/// the takeover, or after `serving`, when a stopped process is simply a stopped server.
fn strayed(point: &Point, trace: &Path) -> bool {
    let trace = fs::read_to_string(trace).unwrap_or_default();
    let at = |what: &str| trace.find(what).unwrap_or(usize::MAX);
    let struck = at("(INJECTED)");
    let stopped = at("--- SIGSTOP");
    let late = at("\"serving gen=") < struck && struck < usize::MAX;
    point.call.role == Role::New && (late || at("\"serving\\n\"") < stopped && stopped < usize::MAX)
}

/// Checks everything that must hold in any case.
fn attempt(point: &Point, setting: &Setting) -> Result<bool, String> {
    let stops = point.fault.contains("STOP");
    let mut old = Server::serving(setting.command());
    let addr = setting.addr();
    let old_pid = old.pid();
    for addr in old.addrs() {
        ask(&addr).map_err(|e| e.to_string())?;
    }
    // Each of the two accept loops creates its epoll when it first waits.
    eventually("the accept loops wait", || accept_loops_wait(old_pid, 2) && fds(old_pid).len() == level(old_pid));
    let before = level(old_pid);
    let load = Load::on(&addr, 1);

    let output = setting.path("trace");
    let killed_old = point.call.role == Role::Old && point.kills();
    let (mut new, mut tracer) = match point.call.role {
        Role::New => (setting.new_traced(&output, Some(point)), None),
        Role::Old => {
            let tracer = setting.old_traced(&old, &output, Some(point));
            (Server::start(setting.command()), Some(tracer))
        }
    };
    // Either the new process serves, or it ends, or it is stopped and the old one gives up on it.
    let serves = |server: &Server| server.said().iter().any(|line| line.starts_with("serving "));
    let ended = |server: &Server| server.processes().is_empty();
    let verdict = |server: &Server| server.said().iter().any(|line| line.starts_with("upgrade "));
    let stopped_old = point.call.role == Role::Old && stops;
    let mut quiet = None;
    if point.kills() {
        let over = || ended(&old) || ended(&new) || (!killed_old && serves(&new));
        eventually("the call", || point.is_held(&output) || over());
        // If the new process did not have to wait, the count of its calls may differ, and it may already serve.
        if !point.is_held(&output) || (!killed_old && serves(&new)) {
            return Ok(false);
        }
        // Or it is already ready, and the old process would end its short probation before it sees the death.
        let trace = fs::read_to_string(&output).unwrap();
        let (before, _) = trace.rsplit_once('\n').unwrap_or_default();
        if point.call.role == Role::New && !point.call.late && before.contains("\"ready\\n\"") {
            return Ok(false);
        }
        quiet = Some(load.quiet());
        let victim = if killed_old { Some(old_pid) } else { children(new.first_pid()).into_keys().next() };
        let victim = victim.ok_or("no process to kill")?;
        send_signal(victim, Signal::KILL);
        // strace holds the process until the delay is over, even if it is dead.
        tracer.as_ref().unwrap_or(&new).signal_all(Signal::KILL);
        eventually("it is dead", || gone(victim));
        if !killed_old || point.call.late {
            // A process still has the sockets, so no client is refused.
            quiet = None;
        }
    }
    eventually(&format!("{point:?} is over: {:?} {:?}", old.said(), new.said()), || {
        serves(&new) || ended(&new) || (stops && !stopped_old && verdict(&old))
    });
    if stopped_old {
        // The SIGSTOP may arrive late.
        let begun = Instant::now();
        let stopped = || fs::read_to_string(&output).unwrap().contains("--- stopped by SIGSTOP");
        while !stopped() && begun.elapsed().as_secs() < 2 {
            thread::yield_now();
        }
        // It must not arrive later, because nothing would continue the process then.
        tracer = None;
        eventually("the old process continues", || {
            old.signal_all(Signal::CONT);
            !matches!(state(old_pid), Some('T' | 't'))
        });
    }

    if stops && !stopped_old && old.said().iter().any(|line| line.starts_with("upgrade ok")) {
        // It has told the old process that it serves, and was stopped only then, or has not printed that yet.
        eventually("the new process serves", || {
            new.signal_all(Signal::CONT);
            serves(&new)
        });
    }
    // If the old process died before it handed anything over, its sockets died with it.
    drop(quiet);
    if serves(&new) {
        if !killed_old {
            eventually("the old process ends", || ended(&old));
        }
    } else if killed_old {
        return Err(format!("no process serves: {:?}", new.said()));
    } else {
        // It was turned away, and reports that when it continues.
        if stops && !stopped_old {
            new.signal_all(Signal::CONT);
        }
        eventually(&format!("the new process ends: {:?}", new.said()), || ended(&new));
        eventually("the old one serves", || ask(&addr).is_ok_and(|answer| field::<u32>(&answer, "pid") == old_pid));
    }
    let counts = load.stop();
    if !counts.failures.is_empty() {
        return Err(format!("of {} requests: {:?}", counts.requests, counts.failures));
    }

    let serving = if serves(&new) { &mut new } else { &mut old };
    let now = field::<u32>(&ask(&addr).map_err(|e| e.to_string())?, "pid");
    if fs::read_to_string(setting.path("pid")).unwrap_or_default().trim() != now.to_string() {
        return Err(format!("the PID file names {:?}, {now} serves", fs::read_to_string(setting.path("pid"))));
    }
    if now == old_pid {
        drop(tracer);
        eventually("no descriptor is left over", || level(old_pid) == before);
    }
    // The next takeover must succeed.
    let mut next = Server::start(setting.command());
    next.wait("serving ");
    serving.wait("upgrade ok");
    eventually("the last one is replaced", || ended(serving));
    let trace = fs::read_to_string(&output).unwrap();
    Ok(point.kills() || trace.contains("(INJECTED)") || trace.contains("--- SIGSTOP"))
}

fn sweep(title: &str, points: &[Point], at_a_time: usize) {
    if points.is_empty() {
        return;
    }
    let (next, survived, missed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let begun = Instant::now();
    let lost = std::sync::Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // A fault that depends on timing may not be injected at the first try.
                    let mut result = run(point);
                    for _ in 0..2 {
                        if result == Ok(false) {
                            result = run(point);
                        }
                    }
                    match result {
                        Ok(true) => drop(survived.fetch_add(1, Ordering::Relaxed)),
                        Ok(false) => drop(missed.fetch_add(1, Ordering::Relaxed)),
                        Err(why) => lost.lock().unwrap().push(format!("{point:?}: {why}")),
                    }
                }
            });
        }
    });
    let (survived, missed, lost) = (survived.into_inner(), missed.into_inner(), lost.into_inner().unwrap());
    let injected = survived + lost.len();
    println!(
        "{title}: {injected} faults injected, {survived} survived ({missed} calls did not occur) in {:?}",
        begun.elapsed()
    );
    assert!(missed <= points.len() / 10, "{title}: too many calls did not occur");
    assert!(lost.is_empty(), "{title}: not survived:\n{}", lost.join("\n"));
}

fn faults(calls: &[Call]) -> Vec<Point> {
    let point = |call: &Call, error: &str| Point { call: call.clone(), fault: format!("error={error}") };
    calls.iter().flat_map(|call| errors(call).iter().map(|error| point(call, error))).collect()
}

/// The new process is stopped only before it has sent `serving`. After that it would simply be a stopped server.
fn deaths(calls: &[Call]) -> Vec<Point> {
    let kills = calls.iter().map(|call| Point { call: call.clone(), fault: "KILL".into() });
    // strace sends the signal after the call.
    let said = |call: &Call| call.role == Role::New && call.text.contains(r#""serving\n""#);
    let serving = calls.iter().position(said).unwrap_or(calls.len());
    // Before its request it is not part of a takeover.
    let asked = calls.iter().position(|call| call.text.contains("takeover 1") && call.role == Role::New).unwrap_or(0);
    let can_stop = |(at, call): &(usize, &Call)| match call.role {
        Role::New => (asked..serving).contains(at),
        Role::Old => true,
    };
    let stopped = calls.iter().enumerate().filter(can_stop);
    let stops = stopped.map(|(_, call)| Point { call: call.clone(), fault: "signal=STOP".into() });
    kills.chain(stops).collect()
}

#[test]
fn a_sample_of_faults_and_deaths_is_survived() {
    if !has_strace() {
        return;
    }
    let calls = record();
    let sampled: Vec<_> = faults(&calls).into_iter().step_by(7).collect();
    sweep("faults, every seventh", &sampled, 6);
    let sampled: Vec<_> = deaths(&calls).into_iter().step_by(9).collect();
    sweep("deaths, every ninth", &sampled, 6);
}

#[test]
#[ignore = "takes minutes"]
fn every_fault_is_survived() {
    if has_strace() {
        sweep("faults", &faults(&record()), 6);
    }
}

#[test]
#[ignore = "takes minutes"]
fn every_death_is_survived() {
    if has_strace() {
        sweep("deaths", &deaths(&record()), 6);
    }
}
