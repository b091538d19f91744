//! A real server to be mistreated, and a load on it that remembers every failure.
#![allow(dead_code)] // Each test binary uses its part.

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use support::example;

/// Longer than anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Looks again every few milliseconds until it holds: for what the kernel shows but sends no event for.
pub fn eventually(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) -> Result<(), String> {
    let until = Instant::now() + deadline;
    while !holds() {
        if Instant::now() > until {
            return Err(format!("not within {deadline:?}: {what}"));
        }
        thread::park_timeout(Duration::from_millis(2));
    }
    Ok(())
}

/// What all generations wrote to stderr.
#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn read(self, from: impl Read) {
        for line in BufReader::new(from).lines() {
            let Ok(line) = line else { break };
            self.0 .0.lock().unwrap().lines.push(line);
            self.0 .1.notify_all();
        }
        self.0 .0.lock().unwrap().ended = true;
        self.0 .1.notify_all();
    }

    pub fn len(&self) -> usize {
        self.0 .0.lock().unwrap().lines.len()
    }

    pub fn since(&self, at: usize) -> Vec<String> {
        self.0 .0.lock().unwrap().lines[at..].to_vec()
    }

    /// The first line from number `at` on for which `wanted` holds. An error if there is none in time, or the last
    /// writer has gone.
    pub fn wait(&self, at: usize, wanted: impl Fn(&str) -> bool, time: Duration) -> Result<String, String> {
        let (lock, condvar) = &*self.0;
        let until = Instant::now() + time;
        let mut log = lock.lock().unwrap();
        loop {
            if let Some(line) = log.lines[at..].iter().find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || log.ended {
                return Err(format!("no such line within {time:?}, only {:#?}", &log.lines[at..]));
            }
            log = condvar.wait_timeout(log, left).unwrap().0;
        }
    }
}

/// `pid=4711` in a line.
pub fn field<T: std::str::FromStr>(line: &str, name: &str) -> Option<T> {
    line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// A whoami, and every generation that comes of it. Dropping it ends them all.
pub struct Server {
    pub pid: i32,
    pub log: Log,
    pub addrs: Vec<Addr>,
    pub dir: tempfile::TempDir,
    reader: Option<JoinHandle<()>>,
    _child: Child,
}

#[derive(Clone, Debug)]
pub enum Addr {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Server {
    /// Starts whoami with these arguments, `DIR` in them being a new directory. Returns when it serves.
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(&example("whoami"), args, |_| {})
    }

    pub fn start_with(program: &Path, args: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_str().unwrap();
        let mut command = Command::new(program);
        command.args(args.iter().map(|arg| arg.replace("DIR", here)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut command);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let log = Log::default();
        let stderr = child.stderr.take().unwrap();
        let reader = thread::spawn({
            let log = log.clone();
            move || log.read(stderr)
        });
        let pid = child.id() as i32;
        let mut server = Self { pid, log, addrs: Vec::new(), dir, reader: Some(reader), _child: child };
        server.log.wait(0, |line| line.starts_with("serving gen=1 "), PATIENCE).unwrap();
        for line in server.log.since(0) {
            let Some(addr) = line.strip_prefix("listening ").and_then(|rest| rest.split(' ').next()) else { continue };
            match addr.strip_prefix("unix:") {
                Some(path) => server.addrs.push(Addr::Unix(path.into())),
                None => server.addrs.extend(addr.parse().map(Addr::Tcp).ok()),
            }
        }
        server
    }

    /// Sends SIGHUP to `pid` and waits for the verdict.
    pub fn upgrade(&self, pid: i32) -> Result<String, String> {
        let at = self.log.len();
        kill(pid, libc::SIGHUP);
        self.verdict(at, PATIENCE)
    }

    /// The new process's PID, or what whoami said instead.
    pub fn verdict(&self, at: usize, time: Duration) -> Result<String, String> {
        let line = self.log.wait(at, |line| line.starts_with("upgrade "), time)?;
        Ok(line)
    }

    /// Who answers now: generation and PID.
    pub fn whoami(&self) -> Result<(u64, i32), String> {
        let answer = request(&self.addrs[0]).map_err(|e| e.to_string())?;
        Ok((field(&answer, "gen").ok_or("no gen")?, field(&answer, "pid").ok_or("no pid")?))
    }

    /// Every process that has said its PID.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = self.log.since(0).iter().filter_map(|line| field(line, "pid")).collect();
        pids.push(self.pid);
        pids.sort_unstable();
        pids.dedup();
        pids
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for pid in self.pids() {
            // Only what is still this server: the number may be another's by now.
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(self.dir.path().to_str().unwrap()) {
                kill(pid, libc::SIGKILL);
            }
        }
        // SAFETY: plain numbers; ours to reap, unless a tracer did.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) };
        if let Some(reader) = self.reader.take() {
            // Ends when the last process that holds stderr has ended.
            let _ = eventually("end of stderr", Duration::from_secs(5), || reader.is_finished());
        }
    }
}

pub fn kill(pid: i32, signal: i32) -> bool {
    // SAFETY: plain numbers.
    unsafe { libc::kill(pid, signal) == 0 }
}

/// Reaps a child of ours if it has ended; true if there is no such process any more.
pub fn gone(pid: i32) -> bool {
    // SAFETY: plain numbers; a PID that is no child of ours gives ECHILD.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // An orphan that nobody reaps has ended, too.
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")),
        Err(_) => true,
    }
}

/// Descriptor numbers and what they lead to, with the numbers that change from run to run left out.
pub fn fds(pid: i32) -> BTreeMap<u32, String> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return BTreeMap::new() };
    dir.flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let to = fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
            let to = if to.starts_with("anon_inode") { &to } else { to.split(":[").next()? };
            Some((number, to.to_owned()))
        })
        .collect()
}

pub fn status_field(pid: i32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with(':'))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

pub fn threads(pid: i32) -> u64 {
    status_field(pid, "Threads").unwrap_or(0)
}

/// The children of a process, zombies too.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// One connection, one line, one answer.
pub fn request(addr: &Addr) -> io::Result<String> {
    let time = Some(PATIENCE);
    match addr {
        Addr::Tcp(addr) => {
            let stream = TcpStream::connect(addr)?;
            stream.set_read_timeout(time)?;
            talk(stream)
        }
        Addr::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(time)?;
            talk(stream)
        }
    }
}

fn talk(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(b"who\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("end after {answer:?}"))),
    }
}

/// Clients that ask all the time, a new connection per request.
pub struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<String>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// One client an address; `pause` is between two requests of one client.
    pub fn start(addrs: &[Addr], pause: Duration) -> Self {
        let mut load =
            Self { stop: Arc::default(), requests: Arc::default(), failures: Arc::default(), clients: Vec::new() };
        for addr in addrs {
            let addr = addr.clone();
            let (stop, requests, failures) = (load.stop.clone(), load.requests.clone(), load.failures.clone());
            load.clients.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    match request(&addr) {
                        Ok(_) => drop(requests.fetch_add(1, Ordering::Relaxed)),
                        Err(e) => failures.lock().unwrap().push(format!("{addr:?} after {:?}: {e}", asked.elapsed())),
                    }
                    thread::park_timeout(pause);
                }
            }));
        }
        load
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// How many requests succeeded, and what each other one met.
    pub fn stop(mut self) -> (usize, Vec<String>) {
        self.end();
        (self.requests(), std::mem::take(&mut *self.failures.lock().unwrap()))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.thread().unpark();
            let _ = client.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}
