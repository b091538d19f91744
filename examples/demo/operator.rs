//! Starts, upgrades and ends the server, as a person would with a shell and `kill -HUP`. Every wait has a deadline.

use crate::load::now;
use crate::request::{field, Use};
use crate::{Options, Transport};
use ecdysis::Ecdysis;
use rustix::process::{kill_process, kill_process_group, set_child_subreaper, wait, Pid, Signal, WaitOptions};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub enum Problem {
    Interrupted,
    /// A description for people.
    Server(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Problem::Interrupted => f.write_str("interrupted"),
            Problem::Server(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Problem {}

impl From<String> for Problem {
    fn from(text: String) -> Problem {
        Problem::Server(text)
    }
}

/// One upgrade: when the signal was sent, and when the upgrade was committed or failed, in ns of CLOCK_MONOTONIC.
pub struct Upgrade {
    pub signal: u64,
    pub end: u64,
    pub error: Option<String>,
}

/// The times that a generation of the server has reported, in ns of CLOCK_MONOTONIC.
pub struct Life {
    pub generation: u64,
    /// When its program started.
    pub began: u64,
    /// When it was ready.
    pub ready: u64,
    /// When its drain ended.
    pub ended: Option<u64>,
}

impl Upgrade {
    pub fn ms(&self) -> f64 {
        self.end.saturating_sub(self.signal) as f64 / 1e6
    }
}

enum Event {
    /// A line from any generation of the server.
    Line(String),
    /// All generations have closed their stderr, so no process of the server is left.
    Ended,
    Interrupted,
}

pub struct Operator {
    /// Where the server listens.
    pub address: String,
    /// The generation that serves.
    pub generation: u64,
    /// The PID of that generation.
    pid: Pid,
    /// The process group of all generations, named after the first, so that one signal can end all of them.
    group: Pid,
    /// The server ends when this is closed, so it ends even if the demo is killed.
    stdin: Option<ChildStdin>,
    events: Receiver<Event>,
    ended: bool,
    timeout: Duration,
    probation: Duration,
    /// The generation and PID that served before a commit whose verdict is still pending.
    before: Option<(u64, Pid)>,
    pub upgrades: Vec<Upgrade>,
    pub lives: Vec<Life>,
}

impl Operator {
    pub fn start(options: &Options) -> Result<Operator, Box<dyn std::error::Error>> {
        let (sender, events) = channel();
        on_interrupt(sender.clone())?;
        // When a generation's parent ends, the demo becomes its parent and can reap it.
        set_child_subreaper(Some(rustix::process::getpid()))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--serve", "--listen", &options.listen])
            .args(["--every", &options.every.as_millis().to_string()])
            .args(["--timeout", &options.timeout.as_millis().to_string()])
            .args(options.tokio.then_some("--tokio"))
            .args(match options.connections {
                Use::Once => None,
                Use::KeepAlive => Some("--keep-alive"),
                Use::Http => Some("--http"),
            })
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().map_err(|e| format!("cannot start the server: {e}"))?;
        let stderr = child.stderr.take().expect("stderr is piped");
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = sender.send(Event::Line(line));
            }
            let _ = sender.send(Event::Ended);
        });
        let pid = Pid::from_child(&child);
        let mut operator = Operator {
            address: String::new(),
            generation: 1,
            pid,
            group: pid,
            stdin: child.stdin.take(),
            events,
            ended: false,
            timeout: options.timeout,
            probation: options.probation(),
            before: None,
            upgrades: vec![],
            lives: vec![],
        };
        let deadline = Instant::now() + options.timeout;
        let line = operator.wait(deadline, |line| line.starts_with("listening ").then(|| line.to_string()));
        let line = line.map_err(|e| e.to_string())?.ok_or("the server did not start in time")?;
        operator.address = line.split(' ').nth(1).ok_or("no address")?.to_string();
        if !options.json {
            let kind = match (options.connections, options.transport) {
                (Use::KeepAlive, _) => "each on a persistent connection",
                (Use::Http, _) => "each with HTTP/1.1 on a persistent connection",
                (Use::Once, Transport::Tcp) => "a new TCP connection per request",
                (Use::Once, Transport::Unix) => "a new connection per request",
                (Use::Once, Transport::Udp) => "a numbered datagram per request",
            };
            println!("{} clients send requests to {}, {kind}", options.clients, operator.address);
        }
        Ok(operator)
    }

    /// Handles lines of the server until `pick` accepts one. Returns `None` at the deadline.
    fn wait<T>(&mut self, deadline: Instant, mut pick: impl FnMut(&str) -> Option<T>) -> Result<Option<T>, Problem> {
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Line(line)) => {
                    self.note(&line);
                    if let Some(picked) = pick(&line) {
                        return Ok(Some(picked));
                    }
                }
                Ok(Event::Interrupted) => return Err(Problem::Interrupted),
                Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => {
                    self.ended = true;
                    return Err("no process of the server is left".to_string().into());
                }
                Err(RecvTimeoutError::Timeout) => return Ok(None),
            }
        }
    }

    fn note(&mut self, line: &str) {
        if line.starts_with("committed ") {
            self.before = Some((self.generation, self.pid));
            self.generation = field(line, "gen").unwrap_or(self.generation);
            self.pid = field(line, "pid").and_then(Pid::from_raw).unwrap_or(self.pid);
        } else if line.starts_with("upgrade ok ") {
            self.before = None;
        } else if let Some(error) = line.strip_prefix("upgrade failed: ") {
            // After a commit this means that the new process has died and the old one serves again.
            if let (Some(before), Some(last)) = (self.before.take(), self.upgrades.last_mut()) {
                (self.generation, self.pid) = before;
                last.error = Some(error.to_string());
            }
        } else if line.starts_with("listening ") {
            let number = |name| field(line, name);
            let life = || {
                Some(Life { generation: number("gen")?, began: number("began")?, ready: number("ready")?, ended: None })
            };
            self.lives.extend(life());
        } else if line.starts_with("ended ") {
            let generation = field(line, "gen");
            if let Some(life) = self.lives.iter_mut().rfind(|life| Some(life.generation) == generation) {
                life.ended = field(line, "at");
            }
        } else {
            eprintln!("server: {line}");
        }
    }

    /// Handles lines of the server until the given time, and calls `tick` regularly.
    pub fn watch(&mut self, until: Instant, mut tick: impl FnMut()) -> Result<(), Problem> {
        // At least once, because an upgrade may take longer than the time until the next one.
        tick();
        while Instant::now() < until {
            let next = until.min(Instant::now() + Duration::from_millis(100));
            self.wait(next, |_| None::<()>)?;
            tick();
        }
        Ok(())
    }

    /// Makes one upgrade, from the signal to the commit or the failure.
    pub fn upgrade(&mut self) -> Result<&Upgrade, Problem> {
        // Reap generations that have ended. There are no other children.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let (pid, signal) = (self.pid, now());
        kill_process(pid, Signal::HUP).map_err(|e| format!("cannot signal the server, pid {pid:?}: {e}"))?;
        // The server itself gives up after the timeout and says why. If it is silent for another second, it hangs.
        let patience = self.timeout + Duration::from_secs(1);
        let outcome = self.wait(Instant::now() + patience, |line| {
            if line.starts_with("committed ") {
                Some(Upgrade { signal, end: field(line, "at").unwrap_or_else(now), error: None })
            } else {
                let error = line.strip_prefix("upgrade failed: ")?.to_string();
                Some(Upgrade { signal, end: now(), error: Some(error) })
            }
        })?;
        let hangs =
            || format!("the server, pid {}, hangs: no answer within {patience:?} of SIGHUP", pid.as_raw_nonzero());
        self.upgrades.push(outcome.ok_or_else(hangs)?);
        Ok(&self.upgrades[self.upgrades.len() - 1])
    }

    /// Waits for the end of the probation, if one is running.
    pub fn verdict(&mut self) -> Result<(), Problem> {
        let patience = self.probation + self.timeout;
        let deadline = Instant::now() + patience;
        while self.before.is_some() {
            let line = self.wait(deadline, |line| line.starts_with("upgrade ").then_some(()))?;
            line.ok_or_else(|| format!("no verdict on a committed upgrade within {patience:?}"))?;
        }
        Ok(())
    }

    /// Stops the server. All generations must end in time.
    pub fn end(&mut self) -> Result<(), Problem> {
        if self.ended {
            return Ok(());
        }
        kill_process(self.pid, Signal::TERM).map_err(|e| format!("cannot stop the server: {e}"))?;
        // The server drains for at most the timeout.
        let patience = self.timeout + Duration::from_secs(1);
        match self.wait(Instant::now() + patience, |_| None::<()>) {
            Err(Problem::Server(_)) if self.ended => Ok(()),
            Err(problem) => Err(problem),
            Ok(_) => {
                Err(format!("a process of the server was still alive {patience:?} after SIGTERM; killed it").into())
            }
        }
    }
}

impl Drop for Operator {
    /// Ensures that no process of the server outlives the demo.
    fn drop(&mut self) {
        self.stdin = None;
        let _ = kill_process_group(self.group, Signal::KILL);
        while let Ok(Some(_)) = wait(WaitOptions::empty()) {}
    }
}

/// Turns Ctrl-C and SIGTERM into events, with the library in a program that is not a server.
fn on_interrupt(sender: Sender<Event>) -> Result<(), ecdysis::Error> {
    let starting = Ecdysis::builder().stop_on_signal(libc::SIGINT).stop_on_signal(libc::SIGTERM).start()?;
    let ecdysis = starting.ready()?;
    thread::spawn(move || {
        let _ = ecdysis.run();
        let _ = sender.send(Event::Interrupted);
    });
    Ok(())
}
