//! A server and all its later generations, as child processes.

use std::ffi::OsStr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::process::{kill_process_group, waitpgid, Pid, Signal, WaitOptions};

use super::{ask, example, field, guard, proc, send_signal, try_eventually, try_field, Log, TempDir};

/// A server and its later generations. They share stderr and a process group. Dropping this kills all of them.
pub struct Server {
    child: Child,
    group: Pid,
    pub log: Log,
    /// The number of lines that `wait` has already read.
    seen: usize,
    part: usize,
    dir: TempDir,
}

impl Server {
    /// Starts `whoami` and waits until it serves. `DIR` in an argument stands for the server's own new directory.
    pub fn whoami<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        Self::whoami_with(args, |_| {})
    }

    /// The same, with a function that changes the command.
    pub fn whoami_with<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = super::tempdir();
        let mut command = Command::new(example("whoami"));
        command.stdout(Stdio::null());
        for arg in args {
            match arg.as_ref().to_str() {
                Some(text) => command.arg(text.replace("DIR", dir.path().to_str().unwrap())),
                None => command.arg(arg),
            };
        }
        prepare(&mut command);
        Self::start_in(command, dir).serves()
    }

    /// Starts any server that prints `serving`, and waits for that line.
    pub fn serving(command: Command) -> Self {
        Self::start(command).serves()
    }

    fn serves(mut self) -> Self {
        let serving = self.wait("serving gen=");
        // Earlier lines can still be waited for.
        self.seen = 0;
        assert!(serving.contains("gen="), "{serving}");
        self
    }

    pub fn start(command: Command) -> Self {
        Self::start_in(command, super::tempdir())
    }

    /// Starts a command for which this directory was made.
    pub fn start_in(mut command: Command, dir: TempDir) -> Self {
        static PARTS: AtomicUsize = AtomicUsize::new(1);
        let part = PARTS.fetch_add(1, Ordering::Relaxed);
        guard::mark(&mut command, part).stdin(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let log = Log::of(child.stderr.take().unwrap());
        let group = Pid::from_child(&child);
        Self { child, group, log, seen: 0, part, dir }
    }

    /// Returns the directory for which `DIR` stands.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the PID of the first generation.
    pub fn first_pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the PID of the serving generation, which the verdict of the last upgrade names. That line may come
    /// before or after the new generation prints `serving`.
    pub fn pid(&self) -> u32 {
        let serves = |line: &String| match line.strip_prefix("serving ") {
            Some(rest) => try_field(rest, "pid"),
            None => line.strip_prefix("upgrade ok ").map(|rest| field(rest, "pid")),
        };
        self.said().iter().rev().find_map(serves).unwrap_or(self.child.id())
    }

    /// Waits for the next line that contains `needle`, after the last one that was waited for.
    #[track_caller]
    pub fn wait(&mut self, needle: &str) -> String {
        let (at, line) = self.wait_at(self.seen, needle);
        self.seen = at + 1;
        line
    }

    /// Waits for a line that contains `needle`, past or future.
    #[track_caller]
    pub fn wait_any(&self, needle: &str) -> String {
        self.wait_at(0, needle).1
    }

    #[track_caller]
    fn wait_at(&self, from: usize, needle: &str) -> (usize, String) {
        self.log.wait(from, |line| line.contains(needle)).unwrap_or_else(|e| panic!("{needle:?}: {e}"))
    }

    /// Returns all lines so far.
    pub fn said(&self) -> Vec<String> {
        self.log.since(0)
    }

    /// Returns the address of the first listener that was announced.
    pub fn addr(&self) -> String {
        self.said().iter().find_map(|line| listening(line)).expect("a listener").to_owned()
    }

    /// Returns every announced listener of the first generation, in order.
    pub fn addrs(&self) -> Vec<String> {
        let lines = self.said();
        lines.iter().filter(|line| line.contains("gen=1 ")).filter_map(|line| listening(line)).map(Into::into).collect()
    }

    /// Returns the addresses of those that accept connections.
    pub fn stream_addrs(&self) -> Vec<String> {
        self.addrs().into_iter().filter(|addr| !addr.starts_with("udp:")).collect()
    }

    pub fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    /// Sends SIGHUP to the serving generation, and waits for the verdict, which must be good. Returns the line.
    #[track_caller]
    pub fn upgrade(&mut self) -> String {
        self.signal(Signal::HUP);
        let line = self.wait("upgrade ");
        assert!(line.starts_with("upgrade ok"), "{line}");
        line
    }

    /// Sends SIGHUP, and waits for the verdict, which must be bad. Returns the line.
    #[track_caller]
    pub fn fail_to_upgrade(&mut self) -> String {
        self.signal(Signal::HUP);
        let line = self.wait("upgrade ");
        assert!(line.starts_with("upgrade failed"), "{line}");
        line
    }

    /// Sends SIGHUP to this generation, and returns the verdict without panicking.
    pub fn try_upgrade(&self, pid: u32) -> Result<String, String> {
        let from = self.log.len();
        send_signal(pid, Signal::HUP);
        self.verdict(from)
    }

    /// Waits for the first verdict from line `from` on.
    pub fn verdict(&self, from: usize) -> Result<String, String> {
        Ok(self.log.wait(from, |line| line.starts_with("upgrade "))?.1)
    }

    /// Returns the process that answers now.
    pub fn answers(&self) -> Result<u32, String> {
        let answer = ask(&self.addr()).map_err(|e| e.to_string())?;
        try_field(&answer, "pid").ok_or(answer)
    }

    /// Waits until the next generation has reported that it serves, which may be after the verdict.
    #[track_caller]
    pub fn wait_serving(&self) {
        let count = |lines: &[String], start| lines.iter().filter(|line| line.starts_with(start)).count();
        let serves = |lines: &[String]| count(lines, "serving ") > count(lines, "committed ");
        self.log.wait_all(serves).unwrap_or_else(|e| panic!("the new one does not serve: {e}"));
    }

    /// Returns every living process of every generation.
    pub fn processes(&self) -> Vec<u32> {
        let group = self.group.as_raw_nonzero().get();
        let of_group = |pid: &u32| proc::stat(*pid).is_some_and(|(state, of)| of == group && state != 'Z');
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(of_group).collect()
    }

    pub fn signal_first(&self, signal: Signal) {
        send_signal(self.first_pid(), signal);
    }

    /// Returns the signal that ended the first generation, which must have ended.
    pub fn exit_signal(&mut self) -> Option<i32> {
        super::wait(&mut self.child).signal()
    }

    /// Returns the exit code of the first process, which must have ended.
    pub fn exit_code(&mut self) -> Option<i32> {
        super::wait(&mut self.child).code()
    }

    pub fn signal_all(&self, signal: Signal) {
        let _ = kill_process_group(self.group, signal);
    }

    /// Waits for the end of every generation: no process has the other end of stderr open.
    #[track_caller]
    pub fn wait_all_ended(&self) {
        self.log.wait_end().unwrap_or_else(|e| panic!("still running: {e}"));
    }
}

fn listening(line: &str) -> Option<&str> {
    line.strip_prefix("listening ")?.split(" gen=").next()
}

impl Drop for Server {
    fn drop(&mut self) {
        guard::end_part(self.part, self.group);
        // Later generations have become children of this process. A tracer may have reaped the first one.
        let ended = try_eventually("the first process ends", || !matches!(self.child.try_wait(), Ok(None)));
        ended.unwrap_or_else(guard::fail);
        while let Ok(Some(_)) = waitpgid(self.group, WaitOptions::NOHANG) {}
        if thread::panicking() {
            eprintln!("the server said:\n{}", self.said().join("\n"));
        }
    }
}
