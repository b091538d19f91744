//! What every integration test uses: real servers as child processes, waits with a deadline, load, /proc.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{kill_process, kill_process_group, pidfd_open, Pid, PidfdFlags, Signal};
pub use tempfile::TempDir;

/// No wait in a test is longer. A test that gets here has failed.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub fn tempdir() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// An example, which cargo has built beside this test. `cargo test` builds it, but `cargo test --test NAME` does not, and
/// would go on testing an old one.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    let Ok(built) = fs::metadata(&path).and_then(|example| example.modified()) else {
        panic!("{} is missing: cargo build --examples", path.display());
    };
    // PROGRAM: SOURCE SOURCE ...
    let sources = fs::read_to_string(path.with_extension("d")).unwrap_or_default();
    for source in sources.split_whitespace().skip(1) {
        let changed = fs::metadata(source).and_then(|source| source.modified());
        assert!(changed.map_or(true, |at| at <= built), "{source} is newer than {name}: cargo build --examples");
    }
    path
}

/// Copies an example by another process: a file that this one has open for writing is open in whatever another thread
/// forks just then, and cannot be executed until that has executed itself (ETXTBSY).
pub fn install(name: &str, to: impl AsRef<Path>) {
    assert!(Command::new("cp").arg(example(name)).arg(to.as_ref()).status().unwrap().success());
}

/// Some faults cannot be had otherwise.
pub fn has_strace() -> bool {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let has = works.is_ok_and(|status| status.success());
    if !has {
        eprintln!("not run: needs a strace that may trace");
    }
    has
}

/// A server and all its later generations, which write to one stderr and are in one process group. All are killed when
/// this is dropped.
pub struct Server {
    child: Child,
    group: Pid,
    said: Arc<Said>,
    /// How many lines have been looked at.
    seen: usize,
}

#[derive(Default)]
struct Said {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Said {
    /// A failed test has poisoned it, and still wants to print what was said.
    fn lock(&self) -> MutexGuard<'_, (Vec<String>, bool)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        lines: MutexGuard<'a, (Vec<String>, bool)>,
        time: Duration,
    ) -> MutexGuard<'a, (Vec<String>, bool)> {
        self.more.wait_timeout(lines, time).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Server {
    /// Starts `whoami` and waits until it serves.
    pub fn whoami<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(example("whoami"));
        command.args(args);
        Self::serving(command)
    }

    /// Starts any server that says `serving`, and waits for that.
    pub fn serving(command: Command) -> Self {
        let mut server = Self::start(command);
        let serving = server.wait_at(0, "serving ");
        // What was said before can still be waited for.
        server.seen = 0;
        assert!(serving.contains("gen="), "{serving}");
        server
    }

    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).process_group(0).spawn().unwrap();
        let said = Arc::new(Said::default());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn({
            let said = said.clone();
            move || {
                for line in stderr.split(b'\n').map_while(Result::ok) {
                    said.lock().0.push(String::from_utf8_lossy(&line).into_owned());
                    said.more.notify_all();
                }
                said.lock().1 = true;
                said.more.notify_all();
            }
        });
        let group = Pid::from_child(&child);
        Self { child, group, said, seen: 0 }
    }

    /// The PID of the first generation.
    pub fn first_pid(&self) -> u32 {
        self.child.id()
    }

    /// The PID of the generation that said `serving` last.
    pub fn pid(&self) -> u32 {
        let lines = self.said.lock();
        let serving = lines.0.iter().rev().find(|line| line.starts_with("serving "));
        serving.map_or(self.child.id(), |line| field(line, "pid"))
    }

    /// The next line that contains `needle`, after the last one waited for.
    pub fn wait(&mut self, needle: &str) -> String {
        self.wait_at(self.seen, needle)
    }

    /// A line that contains `needle`, said at any time.
    pub fn wait_any(&mut self, needle: &str) -> String {
        let seen = self.seen;
        let line = self.wait_at(0, needle);
        self.seen = seen;
        line
    }

    fn wait_at(&mut self, from: usize, needle: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        let mut lines = self.said.lock();
        loop {
            if let Some(at) = lines.0[from..].iter().position(|line| line.contains(needle)) {
                self.seen = from + at + 1;
                return lines.0[from + at].clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !lines.1, "no line with {needle:?} in:\n{}", lines.0[from..].join("\n"));
            lines = self.said.wait(lines, left);
        }
    }

    /// Everything said so far.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().0.clone()
    }

    /// The address of the first listener that was announced, or of the one on this host part.
    pub fn addr(&self) -> String {
        let lines = self.said.lock();
        let line = lines.0.iter().find_map(|line| line.strip_prefix("listening ")).expect("a listener");
        line.split(' ').next().unwrap().to_owned()
    }

    /// Every announced listener of the first generation, in order.
    pub fn addrs(&self) -> Vec<String> {
        let lines = self.said.lock();
        let listening = lines.0.iter().filter_map(|line| line.strip_prefix("listening "));
        listening
            .filter(|line| line.contains("gen=1 "))
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    }

    pub fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    /// SIGHUP to the serving generation; waits for the verdict, which must be good. Returns the line.
    pub fn upgrade(&mut self) -> String {
        self.signal(Signal::HUP);
        let line = self.wait("upgrade ");
        assert!(line.starts_with("upgrade ok"), "{line}");
        line
    }

    /// SIGHUP; waits for the verdict, which must be bad. Returns the line.
    pub fn fail_to_upgrade(&mut self) -> String {
        self.signal(Signal::HUP);
        let line = self.wait("upgrade ");
        assert!(line.starts_with("upgrade failed"), "{line}");
        line
    }

    /// Waits until the next generation has said that it serves, which it does in its own time.
    pub fn wait_serving(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        let upgrades = |lines: &[String]| lines.iter().filter(|line| line.starts_with("committed ")).count();
        let serving = |lines: &[String]| lines.iter().filter(|line| line.starts_with("serving ")).count();
        let mut lines = self.said.lock();
        while serving(&lines.0) <= upgrades(&lines.0) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the new one does not serve:\n{}", lines.0.join("\n"));
            lines = self.said.wait(lines, left);
        }
    }

    /// Every living process of every generation.
    pub fn processes(&self) -> Vec<u32> {
        let group = self.group.as_raw_nonzero().get().to_string();
        let of_group = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
            fields.next().is_some_and(|state| state != "Z") && fields.nth(1) == Some(&group)
        };
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(of_group).collect()
    }

    pub fn signal_first(&self, signal: Signal) {
        send_signal(self.first_pid(), signal);
    }

    /// The signal that ended the first generation, which must have ended.
    pub fn exit_signal(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        self.child.wait().unwrap().signal()
    }

    pub fn signal_all(&self, signal: Signal) {
        let _ = kill_process_group(self.group, signal);
    }

    /// Waits for the end of every generation: nobody has the other end of stderr open.
    pub fn wait_all_ended(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        let mut lines = self.said.lock();
        while !lines.1 {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "still running after:\n{}", lines.0.join("\n"));
            lines = self.said.wait(lines, left);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the server said:\n{}", self.said().join("\n"));
        }
    }
}

/// The value after `name=` in a line.
pub fn field<T: std::str::FromStr>(line: &str, name: &str) -> T {
    let word = line.split([' ', '\n']).find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no {name}= in {line:?}"))
}

pub fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).unwrap()
}

pub fn send_signal(to: u32, signal: Signal) {
    kill_process(pid(to), signal).unwrap();
}

pub fn timespec(time: Duration) -> Timespec {
    time.try_into().unwrap()
}

/// Waits for the end of a process that need not be our child.
pub fn wait_exit(process: u32) {
    let Ok(pidfd) = pidfd_open(pid(process), PidfdFlags::empty()) else { return };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timespec(DEADLINE))).unwrap();
    assert_eq!(ended, 1, "process {process} still lives");
}

/// Waits until `condition` holds, for what sends no event: /proc, a file that appears.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        thread::yield_now();
    }
}

/// A connection to `ip:port` or `unix:path`.
pub trait Conn: Read + Write + Send {
    fn close_write(&self) -> io::Result<()>;
}

impl Conn for TcpStream {
    fn close_write(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

impl Conn for UnixStream {
    fn close_write(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

pub fn connect(addr: &str) -> io::Result<Box<dyn Conn>> {
    if let Some(path) = addr.strip_prefix("unix:") {
        let stream = match path.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?
            }
            None => UnixStream::connect(path)?,
        };
        stream.set_read_timeout(Some(DEADLINE))?;
        return Ok(Box::new(stream));
    }
    let addr: SocketAddr = addr.parse().unwrap();
    let stream = TcpStream::connect_timeout(&addr, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(Box::new(stream))
}

/// One request: the whole answer.
pub fn ask(addr: &str) -> io::Result<String> {
    let mut stream = connect(addr)?;
    stream.write_all(b"who\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if !answer.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}

/// The generation that answers.
pub fn generation(addr: &str) -> u64 {
    field(&ask(addr).unwrap(), "gen")
}

/// Connects to a control socket, says `command` if it is not empty, and returns all that comes back.
pub fn control(path: &Path, command: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(command.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Requests without a break from some threads, until stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Counts>>,
}

/// What came of the requests.
#[derive(Debug, Default)]
pub struct Counts {
    pub requests: u64,
    /// By kind of error.
    pub failures: BTreeMap<String, u64>,
}

impl Counts {
    #[track_caller]
    pub fn assert_none_failed(&self) {
        assert!(self.requests > 0, "there was no load");
        assert!(self.failures.is_empty(), "{self:?}");
    }
}

impl Load {
    pub fn on(addr: &str, threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let run = |_| {
            let (addr, stop) = (addr.to_owned(), stop.clone());
            thread::spawn(move || {
                let mut counts = Counts::default();
                while !stop.load(Ordering::Relaxed) {
                    counts.requests += 1;
                    if let Err(e) = ask(&addr) {
                        *counts.failures.entry(format!("{:?} {e}", e.kind())).or_default() += 1;
                    }
                }
                counts
            })
        };
        let threads = (0..threads).map(run).collect();
        Self { stop, threads }
    }

    pub fn stop(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Counts::default();
        for thread in self.threads {
            let counts = thread.join().unwrap();
            sum.requests += counts.requests;
            for (kind, count) in counts.failures {
                *sum.failures.entry(kind).or_default() += count;
            }
        }
        sum
    }
}

/// The descriptors of a process, with what they are.
pub fn fds(process: u32) -> BTreeMap<i32, String> {
    let dir = format!("/proc/{process}/fd");
    let mut fds = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            fds.insert(entry.file_name().to_string_lossy().parse().unwrap(), target.to_string_lossy().into_owned());
        }
    }
    fds
}

/// The children of a process, with their state: 'Z' is a zombie.
pub fn children(process: u32) -> BTreeMap<u32, char> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| {
            let pid = pid.parse().ok()?;
            Some((pid, state(pid)?))
        }));
    }
    found
}

/// The threads of a process, with their state.
pub fn threads(process: u32) -> BTreeMap<u32, char> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    tasks
        .filter_map(|task| {
            let tid = task.file_name().to_string_lossy().parse().ok()?;
            Some((tid, state(tid)?))
        })
        .collect()
}

/// The state letter in /proc/PID/stat.
pub fn state(process: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A field of /proc/PID/status.
pub fn status_field(process: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}")).trim().to_owned()
}
