//! The life of the service: what each signal, end and deadline means.

mod messages;

use std::ffi::CString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::generations::{terminal_is_there, Generations};
use crate::message::{Above, Inbox, Refusals};
use crate::options::Options;
use crate::process::{self, Process, Reaped};
use crate::signals::{self, Signals};
use crate::start;
use crate::store::Store;
use crate::{say, CRASHED, KILLED};

/// How long a successor may take to report that it serves when its predecessor has died.
const ORPHANED: Duration = Duration::from_secs(10);
/// How long a generation may take to report that it serves again when the successor that it has just announced has died.
const TAKING_BACK: Duration = Duration::from_millis(500);
/// How long a restarted server may take to be ready.
const STARTING: Duration = Duration::from_secs(90);
/// How long a generation may take to end after SIGABRT.
const ABORTING: Duration = Duration::from_secs(5);
/// The time by which a script that starts the server has executed it.
const LOOKING: Duration = Duration::from_secs(1);
const CHECKING: Duration = Duration::from_secs(30);
/// The delay before the second restart in a row; each later one waits twice as long.
const DELAY: Duration = Duration::from_millis(100);

pub struct Service {
    options: Options,
    signals: Signals,
    inbox: Inbox,
    above: Above,
    refusals: Refusals,
    store: Store,
    environment: Vec<CString>,
    has_terminal: bool,
    generations: Generations,
    phase: Phase,
    /// Some generation has been ready, so the server works in principle, and a restart after a crash makes sense.
    was_ready: bool,
    upgrade: Upgrade,
    watchdog: Option<Duration>,
    watchdog_at: Option<Instant>,
    /// When to kill the serving generation, if it is not ready or has not ended by then.
    kill_at: Option<Instant>,
    /// When to check which program the server runs. That identifies the generations of a silent server.
    look_at: Option<Instant>,
    restarts: Vec<Instant>,
    /// How the last generation ended.
    status: Option<ExitStatus>,
    /// An exit code that takes precedence over the last generation's status.
    code: Option<u8>,
}

enum Phase {
    /// A generation serves, or starts.
    Running,
    /// No generation serves, because it crashed. The server is restarted at this time.
    Restarting(Instant),
    /// The serving generation has ended in the middle of an upgrade. Its successor, or the predecessor that takes the service
    /// back, must report by this time that it serves.
    Orphaned(Instant, Ended),
    /// All remaining processes are killed at `until`. `asked`: helpers were sent SIGTERM.
    Stopping { until: Instant, asked: bool },
}

/// How the service has ended, if there turns out to be no successor.
#[derive(Clone, Copy, PartialEq)]
enum Ended {
    Well,
    Crashed,
}

/// The upgrade that was requested.
#[derive(Default)]
struct Upgrade {
    check: Option<(Process, Instant)>,
    /// The signal was sent, and the generation has not reported yet that the upgrade begins.
    asked: bool,
    /// This server reports when an upgrade begins.
    is_told: bool,
}

impl Service {
    /// Starts the server.
    pub fn start(options: Options) -> io::Result<Self> {
        let mut store = Store::new(options.store);
        // Before anything here opens a descriptor.
        start::adopt_passed(&mut store);
        let ready_fd = options.notify_fd.map(start::adopt).transpose()?;
        let signals = Signals::take()?;
        let inbox = Inbox::new()?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let mut service = Self {
            environment: start::environment(&options, &inbox.address),
            above: Above::new(ready_fd),
            refusals: Refusals::default(),
            has_terminal: terminal_is_there(),
            generations: Generations::new(options.command[0].as_bytes()),
            phase: Phase::Running,
            was_ready: false,
            upgrade: Upgrade::default(),
            watchdog: None,
            watchdog_at: None,
            kill_at: None,
            look_at: None,
            restarts: Vec::new(),
            status: None,
            code: None,
            options,
            signals,
            inbox,
            store,
        };
        service.start_server()?;
        Ok(service)
    }

    fn start_server(&mut self) -> io::Result<()> {
        let passed = self.store.entries();
        let server = start::start(&self.options.command, &self.environment, passed, &self.signals)?;
        say(&format!("started pid={} descriptors={}", server.pid, passed.len()));
        self.generations.started(server);
        self.phase = Phase::Running;
        (self.upgrade, self.watchdog, self.watchdog_at) = (Upgrade::default(), self.options.watchdog, None);
        // At the first start there is no deadline, because the server may be one that never reports that it is ready.
        self.kill_at = self.was_ready.then(|| Instant::now() + STARTING);
        self.look_at = Some(Instant::now() + LOOKING);
        Ok(())
    }

    /// Runs until the service is over. Returns the exit code.
    pub fn run(mut self) -> io::Result<u8> {
        loop {
            self.wait()?;
            self.read_messages();
            while let Some(signal) = self.signals.next() {
                self.on_signal(signal);
            }
            if let Some(code) = self.reap() {
                say(&format!("over code={code}"));
                return Ok(code);
            }
            self.on_time();
        }
    }

    /// Waits until something happens.
    fn wait(&mut self) -> io::Result<()> {
        let phase = match self.phase {
            Phase::Running => None,
            Phase::Restarting(at) | Phase::Orphaned(at, _) | Phase::Stopping { until: at, .. } => Some(at),
        };
        let check = self.upgrade.check.as_ref().map(|(_, until)| *until);
        let all = [phase, check, self.look_at, self.watchdog_at, self.kill_at, self.refusals.due()];
        let timeout = all.into_iter().flatten().min().map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());

        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.inbox, PollFlags::IN)];
        // The end of a child raises SIGCHLD. If a generation is the child of another process, only its pidfd shows its end.
        let end = self.generations.main().and_then(Process::pidfd);
        fds.extend(end.map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN)));
        let first_stored = fds.len();
        fds.extend(self.store.polled().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let hung: Vec<bool> = fds[first_stored..].iter().map(|fd| !fd.revents().is_empty()).collect();
        self.store.remove_hung(hung);
        if !self.generations.ready {
            self.generations.look();
        }
        self.look_at = self.look_at.filter(|at| *at > Instant::now());
        Ok(())
    }

    // ---- signals -----------------------------------------------------------------------------------------------------

    fn on_signal(&mut self, signal: i32) {
        let is_stop = matches!(signal, libc::SIGTERM | libc::SIGINT);
        match signal {
            libc::SIGCHLD => {}
            // Ctrl-Z and `fg` in a terminal suspend and continue the whole job.
            libc::SIGTSTP => {
                self.generations.send_to_all(libc::SIGSTOP);
                signals::send(std::process::id() as i32, libc::SIGSTOP);
            }
            libc::SIGCONT => self.generations.send_to_all(libc::SIGCONT),
            // The terminal was closed: a stop, not an upgrade.
            libc::SIGHUP if self.has_terminal && !terminal_is_there() => {
                if self.signals.hangup_counts {
                    self.on_signal(libc::SIGTERM);
                }
            }
            _ if is_stop => {
                if !matches!(self.phase, Phase::Stopping { .. }) {
                    self.stop(&format!("signal {signal}"));
                }
                self.forward(signal, true);
            }
            _ if signal == self.options.upgrade_signal => self.on_upgrade_signal(),
            _ => self.forward(signal, false),
        }
    }

    fn forward(&mut self, signal: i32, to_all: bool) {
        let pids = self.generations.send(signal, to_all);
        say(&format!("sent signal={signal} to={pids:?}"));
    }

    fn on_upgrade_signal(&mut self) {
        if !matches!(self.phase, Phase::Running) {
            return say("no upgrade: no generation serves, or it stops");
        }
        let Some(check) = &self.options.check else { return self.send_upgrade() };
        if self.upgrade.check.is_some() {
            return; // The running check leads to one upgrade, which is enough.
        }
        match start::start(check, &start::inherited(), &[], &self.signals) {
            Ok(process) => self.upgrade.check = Some((process, Instant::now() + CHECKING)),
            Err(e) => say(&format!("no upgrade: cannot start the check: {e}")),
        }
    }

    fn send_upgrade(&mut self) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        self.upgrade.asked = true;
        self.forward(self.options.upgrade_signal, false);
    }

    // ---- ends --------------------------------------------------------------------------------------------------------

    /// Reaps every process that has ended. Returns the exit code when the service is over.
    fn reap(&mut self) -> Option<u8> {
        let mut children = true;
        loop {
            match process::reap() {
                Reaped::Child(pid, status) => self.on_end(pid, Some(status)),
                Reaped::None => break,
                Reaped::NoChildren => {
                    children = false;
                    break;
                }
            }
        }
        if let Some(main) = self.generations.main().filter(|main| main.has_ended_elsewhere()) {
            self.on_end(main.pid, None);
        }
        let Phase::Stopping { asked, .. } = &mut self.phase else { return None };
        if !children && self.generations.main().is_none() {
            return Some(self.code.unwrap_or_else(|| self.status.map_or(0, code)));
        }
        // Helpers are ended after the last generation, because they may work for one that drains.
        if !*asked && !self.generations.any_lives() {
            *asked = true;
            self.generations.send_to_all(libc::SIGTERM);
        }
        None
    }

    /// Handles the end of a process. `status` is `None` if it is unknown.
    fn on_end(&mut self, pid: i32, status: Option<ExitStatus>) {
        if self.upgrade.check.take_if(|(check, _)| check.pid == pid).is_some() {
            return match status {
                Some(status) if status.success() => self.send_upgrade(),
                _ => say(&format!("no upgrade: the check failed: {}", shown(status))),
            };
        }
        // A message that the process sent before its end may announce the next generation.
        self.read_messages();
        let Some(ended) = self.generations.ended(pid) else { return };
        say(&format!("ended pid={} {}", ended.pid, shown(status)));
        self.status = status.or(self.status);
        (self.watchdog_at, self.kill_at) = (None, None);
        let mut successors = self.generations.successors();
        if !self.generations.ready {
            if let Some(next) = successors.pop() {
                return self.replace_main(Process::of(next.pid));
            }
        }
        if let Phase::Running = self.phase {
            let by_us =
                status.and_then(|status| status.signal()).is_some_and(|signal| self.generations.received(signal));
            let how = if by_us || status.is_some_and(|s| s.success()) { Ended::Well } else { Ended::Crashed };
            match successors.is_empty() {
                true if self.generations.can_take_back() => {
                    self.phase = Phase::Orphaned(Instant::now() + TAKING_BACK, how);
                }
                true => self.on_service_ended(how),
                false => self.phase = Phase::Orphaned(Instant::now() + ORPHANED, how),
            }
        }
    }

    /// Restarts the server or stops, when no generation serves and no successor is left.
    fn on_service_ended(&mut self, how: Ended) {
        if how == Ended::Well || !self.was_ready {
            return self.stop("the server has ended");
        }
        let (most, within) = self.options.restarts;
        let now = Instant::now();
        self.restarts.retain(|restart| now.duration_since(*restart) <= within);
        let recent = self.restarts.len();
        if recent >= most {
            self.code = Some(CRASHED);
            return self.stop("the server crashes too often");
        }
        let delay = if recent == 0 { Duration::ZERO } else { DELAY * (1 << (recent - 1).min(6)) };
        say(&format!("crashed; restart {} of {most} within {within:?} follows in {delay:?}", recent + 1));
        self.restarts.push(now + delay);
        self.phase = Phase::Restarting(now + delay);
    }

    fn stop(&mut self, why: &str) {
        say(&format!("stopping: {why}"));
        self.phase = Phase::Stopping { until: Instant::now() + self.options.stop_timeout, asked: false };
        self.watchdog_at = None;
        // If these copies stayed open, clients would still connect and wait in a queue that no process serves.
        self.store.clear();
        if let Some((check, _)) = &self.upgrade.check {
            check.signal(libc::SIGKILL);
        }
    }

    // ---- deadlines ---------------------------------------------------------------------------------------------------

    fn on_time(&mut self) {
        let now = Instant::now();
        self.refusals.log_suppressed(now);
        let main = self.generations.main();
        if self.kill_at.take_if(|at| *at <= now).is_some() {
            say("killing the generation: it was not ready, or has not ended, in time");
            main.into_iter().for_each(|main| main.signal(libc::SIGKILL));
        } else if self.watchdog_at.take_if(|at| *at <= now).is_some() {
            say("watchdog timeout: aborting the generation");
            for signal in [libc::SIGABRT, libc::SIGCONT] {
                main.into_iter().for_each(|main| main.signal(signal));
            }
            self.kill_at = Some(now + ABORTING);
        }
        if let Some((check, _)) = self.upgrade.check.as_ref().filter(|(_, until)| *until <= now) {
            check.signal(libc::SIGKILL);
        }
        match self.phase {
            Phase::Restarting(at) if at <= now => {
                if let Err(e) = self.start_server() {
                    say(&format!("cannot start the server: {e}"));
                    self.on_service_ended(Ended::Crashed);
                }
            }
            Phase::Orphaned(until, how) => {
                let successors = self.generations.successors();
                if until <= now && !successors.is_empty() {
                    say("killing the successor: it did not report in time that it serves");
                    successors.iter().for_each(|successor| signals::send(successor.pid, libc::SIGKILL));
                }
                if until <= now || successors.is_empty() && !self.generations.can_take_back() {
                    self.on_service_ended(how);
                }
            }
            Phase::Stopping { until, .. } if until <= now => {
                say("killing all remaining processes: the stop has taken too long");
                self.code = self.code.or(Some(KILLED));
                self.generations.send_to_all(libc::SIGKILL);
                // A process that was started in the meantime is killed in the next round.
                self.phase = Phase::Stopping { until: now + DELAY, asked: true };
            }
            _ => {}
        }
    }
}

/// Returns the exit code for this status, as a shell would.
fn code(status: ExitStatus) -> u8 {
    status.code().map_or_else(|| 128 + status.signal().unwrap_or(0) as u8, |code| code as u8)
}

fn shown(status: Option<ExitStatus>) -> String {
    status.map_or("status=unknown".into(), |status| format!("status={:?}", status.to_string()))
}
