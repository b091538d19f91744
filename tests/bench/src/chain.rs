//! A server that is measured, with all its generations.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use ecdysis_bench::sys;

/// A deadline that no measurement comes near.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A server program and its arguments.
#[derive(Clone)]
pub struct Server {
    /// The program's path, absolute or relative to this program's directory.
    pub program: String,
    pub args: Vec<String>,
    /// The path of `hold`, if the server runs under it. Then `hold` keeps its PID and receives the signals.
    pub below: Option<PathBuf>,
}

impl Server {
    pub fn new(program: impl Into<String>, args: &[&str]) -> Self {
        Self { program: program.into(), args: args.iter().map(|&a| a.into()).collect(), below: None }
    }

    pub fn below(self, hold: &Path) -> Self {
        Self { below: Some(hold.into()), ..self.with("notify", 1) }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.args.push(format!("{name}={}", value.to_string()));
        self
    }

    pub fn by_signal(&self) -> bool {
        self.args.iter().any(|a| a == "trigger=signal")
    }

    pub fn path(&self) -> io::Result<PathBuf> {
        Ok(std::env::current_exe()?.with_file_name(&self.program))
    }

    pub fn command(&self) -> io::Result<Command> {
        let Some(hold) = &self.below else { return self.run_by(Command::new(self.path()?)) };
        let mut command = Command::new(hold);
        command.arg("--").arg(self.path()?).stderr(Stdio::null());
        self.run_by(command)
    }

    /// `command` is the server itself, or a tracer that starts it.
    pub fn run_by(&self, mut command: Command) -> io::Result<Command> {
        // `cargo run` sets this. The dynamic loader would then search several directories for each library, with 215
        // system calls before `main` instead of 60, in every generation.
        command.args(&self.args).env_remove("LD_LIBRARY_PATH");
        Ok(command)
    }
}

/// Returns a port that was free a moment ago.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A process that is controlled by lines on stdin. Dropping it ends it.
pub struct Driven {
    child: Child,
    /// Taken out of `child`, whose `wait` would close it, because later generations read it too.
    stdin: ChildStdin,
    stdout: OwnedFd,
    unread: Vec<u8>,
}

impl Driven {
    pub fn spawn(mut command: Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        Ok(Self { child, stdin, stdout: stdout.into(), unread: Vec::new() })
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn tell(&mut self, line: &str) -> io::Result<()> {
        self.stdin.write_all(format!("{line}\n").as_bytes())
    }

    /// Returns the next line, split into words.
    pub fn hear(&mut self) -> io::Result<Line> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(end) = self.unread.iter().position(|&b| b == b'\n') {
                let line = self.unread.drain(..=end).collect();
                return Ok(Line(String::from_utf8(line).unwrap_or_default()));
            }
            if !sys::readable(&self.stdout, deadline.saturating_duration_since(Instant::now())) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut buffer = [0; 4096];
            let n = File::from(self.stdout.try_clone()?).read(&mut buffer)?;
            if n == 0 {
                return Err(io::Error::other("the server has ended"));
            }
            self.unread.extend(&buffer[..n]);
        }
    }

    /// Waits until it has exited.
    pub fn finish(mut self) -> io::Result<()> {
        // It may already have ended.
        let _ = self.tell("end");
        if sys::reap(self.pid(), DEADLINE) {
            Ok(())
        } else {
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    pub fn expect(&mut self, word: &str) -> io::Result<Line> {
        let line = self.hear()?;
        if line.0.starts_with(word) {
            Ok(line)
        } else {
            Err(io::Error::other(format!("{word} expected: {}", line.0)))
        }
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of a server: `word name=number …`.
pub struct Line(pub String);

impl Line {
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> io::Result<T> {
        let value = self.0.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
        value.ok_or_else(|| io::Error::other(format!("no {name} in: {}", self.0)))
    }
}

/// A server that is upgraded repeatedly.
pub struct Chain {
    first: Driven,
    serving: i32,
    by_signal: bool,
    below_hold: bool,
    pub port: u16,
}

/// One upgrade, in nanoseconds of CLOCK_MONOTONIC.
pub struct Upgrade {
    /// When it was requested, as seen from outside.
    pub asked: u64,
    /// When the parent had committed it.
    pub committed: u64,
    /// How long the call took, as seen by the parent.
    pub call: u64,
    /// When the parent had ended.
    pub ended: u64,
}

impl Chain {
    pub fn start(server: &Server) -> io::Result<Self> {
        let port = free_port()?;
        let mut first = Driven::spawn(server.clone().with("port", port).command()?)?;
        let serving = first.expect("serving")?.number("pid")?;
        Ok(Self { first, serving, by_signal: server.by_signal(), below_hold: server.below.is_some(), port })
    }

    pub fn pid(&self) -> i32 {
        self.serving
    }

    /// The process that was started: the first generation, or `hold`.
    pub fn first_pid(&self) -> i32 {
        self.first.pid()
    }

    /// Makes one upgrade, and waits for the parent's end.
    pub fn upgrade(&mut self) -> io::Result<Upgrade> {
        let parent = self.serving;
        let asked = sys::now();
        if self.by_signal {
            sys::signal(if self.below_hold { self.first.pid() } else { parent }, libc::SIGHUP);
        } else {
            self.first.tell("upgrade")?;
        }
        let mut upgraded = None;
        let mut serving = None;
        while upgraded.is_none() || serving.is_none() {
            let line = self.first.hear()?;
            match line.0.split_whitespace().next() {
                Some("serving") => serving = Some(line.number("pid")?),
                Some("upgraded") => upgraded = Some((line.number("ns")?, line.number("at")?)),
                _ => return Err(io::Error::other(line.0)),
            }
        }
        let (Some((call, committed)), Some(serving)) = (upgraded, serving) else {
            return Err(io::ErrorKind::Other.into());
        };
        self.serving = serving;
        if parent == self.first.pid() {
            self.first.child.wait()?;
        } else if !sys::reap(parent, DEADLINE) {
            return Err(io::Error::other("the parent does not end"));
        }
        Ok(Upgrade { asked, committed, call, ended: sys::now() })
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        // Kill `hold` first, because it would restart a killed server.
        let (pid, signal) = match self.below_hold {
            true => (self.first.pid(), libc::SIGTERM),
            false => (self.serving, libc::SIGKILL),
        };
        sys::signal(pid, signal);
        sys::reap(pid, DEADLINE);
    }
}
