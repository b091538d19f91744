//! The test bed: real servers as child processes, waits with a deadline, load, /proc.
//!
//! Everything here is used by several tests. A failing test leaves no process behind: see `guard`.
#![allow(dead_code, unused_imports)] // No test program uses all of it.

pub mod guard;
mod load;
mod log;
mod proc;
#[path = "../../examples/demo/request.rs"]
pub mod request;
mod server;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{pidfd_open, Pid, PidfdFlags, Signal};
pub use tempfile::TempDir;

pub use guard::send_signal;
pub use load::Load;
pub use log::Log;
pub use proc::{
    accept_loops_wait, children, fd_flags, fds, gone, has_capability, kinds, state, status_field, threads,
    try_status_field,
};
pub use request::field as try_field;
pub use server::Server;

/// The longest wait in a test, long enough for a busy machine. A test that waits this long has failed.
/// ECDYSIS_TEST_DEADLINE, in seconds, sets another value at build time: tests/mutants a shorter one, because most of
/// its waits are in vain, and tests/platforms/aarch64 a longer one, because it emulates each instruction.
pub const DEADLINE: Duration = Duration::from_secs(match option_env!("ECDYSIS_TEST_DEADLINE") {
    Some(seconds) => match u64::from_str_radix(seconds, 10) {
        Ok(seconds) => seconds,
        Err(_) => panic!("ECDYSIS_TEST_DEADLINE is not a number of seconds"),
    },
    None => 120,
});

/// An address that no other test uses, with port 0. When its server has ended, a connection to it is refused; on
/// 127.0.0.1 another test's server could already have the port.
pub fn own_address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = process::id().to_be_bytes();
    format!("127.{high}.{low}.{}:0", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Some tests open their directory to another user, and TMPDIR may be private (pam_tmpdir).
pub fn tempdir() -> TempDir {
    let named = std::env::temp_dir();
    let is_public = named.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|dir| dir.mode() & 0o1 != 0));
    tempfile::tempdir_in(if is_public { &named } else { Path::new("/tmp") }).unwrap()
}

/// For tests that become another user or mount a file system.
pub fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("not run: needs root");
    }
    is_root
}

pub fn can_unshare(flags: &[&str]) -> bool {
    let probe = Command::new("unshare").args(flags).arg("true").stderr(Stdio::null()).status();
    let can = probe.is_ok_and(|status| status.success());
    if !can {
        eprintln!("not run: this machine does not allow unshare {flags:?}");
    }
    can
}

/// Returns the path of an example. `cargo test` builds it, but `cargo test --test NAME` does not, so this checks that
/// it is not older than its sources.
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

/// Writes an executable shell script.
pub fn script(path: impl AsRef<Path>, text: &str) {
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Returns the quoted path of the server that most tests use, for a script.
pub fn whoami_in_shell() -> String {
    format!("'{}'", example("whoami").display())
}

/// Copies an example in another process. If this process had the copy open for writing, a child that another thread
/// forks at that moment would have it open too, and the copy could not be executed until that child calls execve
/// (ETXTBSY).
pub fn install(name: &str, to: impl AsRef<Path>) {
    // Another user may have to execute it, whatever the umask.
    assert!(Command::new("install")
        .args(["-m", "755"])
        .arg(example(name))
        .arg(to.as_ref())
        .status()
        .unwrap()
        .success());
}

/// Returns a command that runs one test of this test program, as a server that is not a separate program.
pub fn this_program(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).stdout(Stdio::null());
    command
}

/// For a test that changes its process: runs the test again in a separate process, and returns true there.
#[must_use]
pub fn is_alone(test: &str) -> bool {
    const ALONE: &str = "ECDYSIS_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = guard::mark(&mut this_program(test), 0).env(ALONE, "").stdout(Stdio::piped()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

/// Calls `wait` in a thread that signals interrupt again and again until `wait` returns. Installs a handler, so only a
/// test that [`is_alone`] may use this.
pub fn interrupted<T: Send>(wait: impl FnOnce() -> T + Send) -> T {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: the handler does nothing, so it may run at any time.
    unsafe { libc::signal(libc::SIGUSR1, nothing as extern "C" fn(i32) as libc::sighandler_t) };
    let (tell, told) = std::sync::mpsc::channel();
    let begin = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            // SAFETY: no conditions.
            tell.send(unsafe { libc::pthread_self() } as usize).unwrap(); // with musl it is a pointer
            wait()
        });
        let id = told.recv_timeout(DEADLINE).unwrap();
        while !waiting.is_finished() && begin.elapsed() < DEADLINE {
            // SAFETY: the thread is joined later, so its id is valid.
            unsafe { libc::pthread_kill(id as libc::pthread_t, libc::SIGUSR1) };
            thread::park_timeout(Duration::from_millis(5));
        }
        assert!(waiting.is_finished(), "it still waits after {DEADLINE:?}");
        waiting.join().unwrap()
    })
}

/// The link to a process that takes over, where the test is the old process.
pub struct ChildLink(BufReader<UnixStream>);

impl ChildLink {
    /// Hands over nothing to the process that connects, and waits until it serves.
    pub fn accept(takeover: &UnixListener) -> Self {
        readable(takeover, "a process that takes over");
        let mut link = ChildLink(BufReader::new(takeover.accept().unwrap().0));
        link.0.get_ref().set_read_timeout(Some(DEADLINE)).unwrap();
        link.expect("takeover 1");
        link.send("ecdysis 1\ngeneration 1\nend\n");
        link.expect("ready\n");
        link.send("commit\n");
        link.expect("serving\n");
        link
    }

    pub fn send(&mut self, lines: &str) {
        self.0.get_mut().write_all(lines.as_bytes()).unwrap();
    }

    /// Reads a line, which must begin like this.
    #[track_caller]
    pub fn expect(&mut self, beginning: &str) {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert!(line.starts_with(beginning), "{beginning:?}, not {line:?}");
    }
}

/// Some faults can only be injected by strace.
pub fn has_strace() -> bool {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let has = works.is_ok_and(|status| status.success());
    if !has {
        eprintln!("not run: needs a strace that may trace");
    }
    has
}

/// Returns the value after `name=` in a line.
#[track_caller]
pub fn field<T: std::str::FromStr>(line: &str, name: &str) -> T {
    try_field(line, name).unwrap_or_else(|| panic!("no {name}= in {line:?}"))
}

pub fn timespec(time: Duration) -> Timespec {
    time.try_into().unwrap()
}

/// Waits for the end of a process, which may or may not be a child.
#[track_caller]
pub fn wait_exit(process: u32) {
    let Ok(pidfd) = pidfd_open(Pid::from_raw(process as i32).unwrap(), PidfdFlags::empty()) else { return };
    readable(pidfd, &format!("the end of process {process}"));
}

/// Waits until a descriptor is readable: a listener has a connection, a pipe has data, the process of a pidfd has ended.
#[track_caller]
pub fn readable(fd: impl AsFd, what: &str) {
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timespec(DEADLINE))).unwrap();
    assert_eq!(ready, 1, "not within {DEADLINE:?}: {what}");
}

/// Waits for the end of a child. If it does not end in time, kills it and panics.
#[track_caller]
pub fn wait(child: &mut Child) -> ExitStatus {
    let ended = try_eventually(&format!("process {} ends", child.id()), || child.try_wait().unwrap().is_some());
    if let Err(e) = ended {
        let _ = child.kill();
        panic!("{e}");
    }
    child.wait().unwrap()
}

/// Like [`Command::output`], with a deadline. A process that outlives the command does not hold this up, as it would
/// with pipes.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let [stdout, stderr] = files.each_ref().map(|file| file.try_clone().unwrap());
    let command = guard::mark(command, 0).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let status = wait(&mut command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")));
    let [stdout, stderr] = files.map(|mut file| {
        let mut all = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut all).unwrap();
        all
    });
    Output { status, stdout, stderr }
}

/// Stops a process of this test program, and waits until each of its threads has stopped.
#[track_caller]
pub fn freeze(process: u32) {
    send_signal(process, Signal::STOP);
    frozen(process);
}

/// Waits until a process is stopped. Before that, it may still act.
#[track_caller]
pub fn frozen(process: u32) {
    eventually("every thread is stopped", || {
        state(process) == Some('T') && threads(process).values().all(|state| *state == 'T')
    });
}

/// Waits until `condition` holds. For conditions without an event, such as a state in /proc or a new file.
#[track_caller]
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    try_eventually(what, condition).unwrap_or_else(|e| panic!("{e}"));
}

pub fn try_eventually(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        if Instant::now() > deadline {
            return Err(format!("not within {DEADLINE:?}: {what}"));
        }
        thread::park_timeout(Duration::from_millis(1));
    }
    Ok(())
}

/// Sets a flag when dropped, so that the clients of a test that fails end too.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connection to `ip:port` or `unix:path`.
pub trait Conn: Read + Write + Send {}
impl<S: Read + Write + Send> Conn for S {}

pub fn connect(addr: &str) -> io::Result<Box<dyn Conn>> {
    if let Some(path) = addr.strip_prefix("unix:") {
        let stream = match path.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?
            }
            None => unix(path.as_ref())?,
        };
        stream.set_read_timeout(Some(DEADLINE))?;
        return Ok(Box::new(stream));
    }
    let addr: SocketAddr = addr.parse().unwrap();
    let stream = TcpStream::connect_timeout(&addr, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(Box::new(stream))
}

/// Connects to a Unix socket. A read has a deadline, as with all connections of the test bed.
pub fn unix(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// Sends one request, and returns the whole answer.
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

/// Forbids the server, and all generations after it, to write to files.
pub fn limit_files(server: &Server) {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `none` is read, nothing is written.
    let result = unsafe { libc::prlimit(server.pid() as i32, libc::RLIMIT_FSIZE, &none, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Returns the generation that answers.
pub fn generation(addr: &str) -> u64 {
    field(&ask(addr).unwrap(), "gen")
}

/// Connects to a control socket, sends `command` if it is not empty, and returns the whole answer.
pub fn control(path: &Path, command: &str) -> io::Result<String> {
    let mut stream = unix(path)?;
    stream.write_all(command.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A steady load leaves the queue empty only for a moment. A loop that waited for longer would accept until the drain, which
/// must be long, is over, and cut what it accepted last.
pub fn stops_soon_under_load(mut server: Server) {
    let load = Load::paced(&vec![server.addr(); 4], Duration::from_millis(10));
    eventually("there is load", || load.answered() > 20);
    let stop = Instant::now();
    server.signal(Signal::TERM);
    let ended = server.wait("ended gen=1");
    assert!(ended.contains("left=0"), "{ended}");
    assert!(stop.elapsed() < Duration::from_secs(20), "{:?}", stop.elapsed());
}
