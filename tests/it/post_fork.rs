//! Traps inside a process: the child's actions before its execve, effects of a handover on the program's own processes
//! and environment, a default SIGPIPE, an observer that panics.
//!
//! The server is this test program itself: it runs the test `server` when its environment says so.

use std::alloc::{GlobalAlloc, Layout, System};
use std::env;
use std::fs;
use std::hint::black_box;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::*;
use ecdysis::{Ecdysis, Error, Event, Shutdown, Spawn};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit, Signal};

/// Ends a process that uses the allocator between fork and execve. Its locks, and with `CLONE_VM` its memory, are
/// shared with the server's other threads. Reading std's environment or formatting a string there would use it.
struct Watched;

/// The server's PID, or 0 in the tests themselves.
static SERVER: AtomicI32 = AtomicI32::new(0);

impl Watched {
    fn watch() {
        let server = SERVER.load(Ordering::Relaxed);
        // SAFETY: only system calls. Their only memory arguments are static strings.
        unsafe {
            if server != 0 && libc::getpid() != server {
                let words = b"the allocator was used between fork and execve\n";
                libc::write(2, words.as_ptr().cast(), words.len());
                libc::_exit(99);
            }
        }
    }
}

// SAFETY: this delegates to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::watch();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::watch();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// ---- the server -------------------------------------------------------------------------------------------------

/// Not a test: the server that the tests below start.
#[test]
fn server() {
    let Some(switches) = env::var_os("SWITCHES") else { return };
    if let Err(e) = serve(switches.to_str().unwrap()) {
        say(format!("failed: {e:?}"));
        process::exit(1);
    }
    process::exit(0);
}

fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn there(name: &str) -> bool {
    Path::new(&env::var_os("DIR").unwrap()).join(name).exists()
}

fn serve(switches: &str) -> Result<(), Box<dyn std::error::Error>> {
    let is = |name: &str| switches.split(' ').any(|switch| switch == name);
    if is("sigpipe") {
        // SAFETY: no handler is installed.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    if is("reap") {
        thread::spawn(|| loop {
            // SAFETY: a valid disposition. Programs that start processes and never wait for them do this.
            unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
            thread::yield_now();
        });
    }
    SERVER.store(process::id() as i32, Ordering::Relaxed);
    if is("start") && env::var_os("ECDYSIS_HANDOVER").is_none() {
        start_a_process("before the start");
    }
    let environment: Vec<_> = env::vars_os().collect();

    let mut pages = if is("pages") { Pages::touched() } else { Pages(&mut []) };
    let pages = std::sync::Mutex::new(move || pages.touch());
    let (start, panic, panic_at_end) = (is("start"), is("panic"), is("panic-at-end"));
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM);
    builder.probation(Duration::from_millis(20)).on_event(move |event| {
        match event {
            Event::Spawned { .. } if start => start_a_process("during an upgrade"),
            Event::Spawned { .. } => say(format!("faults {}", (pages.lock().unwrap())())),
            Event::Committed(new) => say(format!("committed gen={}", new.generation)),
            Event::Upgraded(new) => say(format!("upgrade ok pid={} gen={}", new.pid, new.generation)),
            Event::UpgradeFailed { error, .. } => say(format!("upgrade failed: {error}")),
            _ => {}
        }
        assert!(!(panic || panic_at_end && matches!(event, Event::Ended(_))), "as asked");
    });
    if is("missing") {
        builder.exec("/no/such/program");
    }
    if is("fork") {
        builder.spawn(Spawn::Fork);
    }
    let starting = builder.start()?;
    let generation = starting.generation();
    if start {
        start_a_process("before the claims");
    }
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    say(format!("listening {} gen={generation}", listener.local_addr()?));
    if generation > 1 {
        if there("exit") {
            process::exit(3);
        }
        eventually("it may continue", || !there("wait"));
    }
    let server = starting.ready()?;
    let shutdown = server.shutdown();
    answer(listener, &shutdown, generation);
    say(format!("serving gen={generation} pid={}", process::id()));
    if is("few") {
        log::set_logger(&Log).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..limit })?;
        say("few descriptors".into());
        eventually("there are more", || there("more"));
        setrlimit(Resource::Nofile, limit)?;
    }
    if is("exclusive") {
        if let Err(e @ Error::ParentLives { .. }) = server.wait_for_parent(Duration::from_millis(50)) {
            say(format!("waits: {e}"));
        }
        server.wait_for_parent(DEADLINE)?;
        say(format!("alone gen={generation}"));
    }
    let guard = shutdown.guard();
    let exit = server.run()?;
    if environment != env::vars_os().collect::<Vec<_>>() {
        say("the environment is another".into());
    }
    assert!(shutdown.is_over());
    eventually("it may end", || !there("hold"));
    drop(guard);
    let left = shutdown.drain(DEADLINE);
    say(format!("ended gen={generation} left={left} {exit}"));
    Ok(())
}

struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        say(format!("log: {}", record.args()));
    }

    fn flush(&self) {}
}

fn answer(listener: TcpListener, shutdown: &Shutdown, generation: u64) {
    let shutdown = shutdown.clone();
    thread::spawn(move || {
        for stream in shutdown.incoming(&listener) {
            let mut stream = BufReader::new(stream.unwrap());
            let _ = stream.read_line(&mut String::new());
            let _ = stream.get_mut().write_all(format!("gen={generation} pid={}\n", process::id()).as_bytes());
        }
    });
}

// They are killed with the servers of the test.
#[allow(clippy::zombie_processes)]
fn start_a_process(when: &str) {
    let mut sleep = Command::new("sleep");
    let child = sleep.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    say(format!("started pid={} {when}", child.id()));
}

/// Memory in small pages, so that every copied page is counted.
struct Pages(&'static mut [u8]);

const PAGES: usize = 4096;
const PAGE: usize = 4096;

impl Pages {
    fn touched() -> Self {
        let (size, none) = (PAGES * PAGE, std::ptr::null_mut());
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, which is never freed.
        let mut pages = unsafe {
            let memory = libc::mmap(none, size, rights, kind, -1, 0);
            assert_ne!(memory, libc::MAP_FAILED);
            libc::madvise(memory, size, libc::MADV_NOHUGEPAGE);
            Self(std::slice::from_raw_parts_mut(memory.cast(), size))
        };
        pages.touch();
        pages
    }

    /// Writes to every page. Returns the number of page faults.
    fn touch(&mut self) -> i64 {
        let before = faults();
        self.0.iter_mut().step_by(PAGE).for_each(|byte| *black_box(byte) += 1);
        faults() - before
    }
}

fn faults() -> i64 {
    // SAFETY: plain numbers, all of which may be zero.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a local variable.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_minflt as i64
}

// ---- the tests --------------------------------------------------------------------------------------------------

struct Bed {
    dir: TempDir,
    server: Server,
}

impl Bed {
    fn new(switches: &str) -> Self {
        let dir = tempdir();
        let mut command = this_program("post_fork::server");
        command.env("SWITCHES", switches).env("DIR", dir.path());
        Self { server: Server::serving(command), dir }
    }

    fn set(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, "").unwrap();
        path
    }
}

#[test]
fn nothing_uses_the_allocator_between_fork_and_execve() {
    for switches in ["", "fork"] {
        let mut bed = Bed::new(switches);
        bed.server.upgrade();
        assert_eq!(generation(&bed.server.addr()), 2);
        // The same if it fails there.
        let mut bed = Bed::new(&format!("missing {switches}"));
        let line = bed.server.fail_to_upgrade();
        assert!(line.contains("execve: No such file"), "{line}");
    }
}

/// Other threads may read the environment at any time.
#[test]
fn the_environment_stays_as_it_is() {
    let mut bed = Bed::new("");
    for generation in [1, 2] {
        bed.server.upgrade();
        bed.server.wait(&format!("ended gen={generation} "));
        bed.server.wait_serving();
    }
    assert!(!bed.server.said().iter().any(|line| line.contains("environment")));
}

/// A fork copies the page tables while every thread is stalled, and later copies each page that is written to.
#[test]
#[cfg_attr(
    any(ecdysis_unix, not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))),
    ignore = "only the clone of Linux shares them, on these processors"
)]
fn a_spawn_leaves_the_pages_of_the_parent_alone() {
    let faults = |switches: &str| {
        let mut bed = Bed::new(switches);
        bed.server.upgrade();
        let line = bed.server.wait_any("faults ");
        line.strip_prefix("faults ").unwrap().parse::<usize>().unwrap()
    };
    assert!(faults("pages fork") >= PAGES, "this does not measure what it should");
    assert!(faults("pages") < PAGES / 10);
}

/// It must inherit neither listeners, which it would keep open, nor pipe ends, whose closing another process waits for.
#[test]
fn a_process_that_the_program_starts_gets_nothing_of_the_handover() {
    let mut bed = Bed::new("start");
    bed.server.upgrade();
    bed.server.wait_serving();
    let started = |when: &str| {
        let lines = bed.server.said();
        let of = lines.iter().filter(|line| line.starts_with("started ") && line.ends_with(when));
        of.map(|line| fds(field(line, "pid")).into_keys().collect()).collect::<Vec<Vec<i32>>>()
    };
    // The library does not close descriptors that the first generation was started with.
    let first = || started("before the start");
    // Just after its execve, a process has the libraries open that it loads.
    eventually("the descriptors of the library are closed", || {
        started("before the claims") == [&first()[0][..], &[0, 1, 2]] && started("during an upgrade") == first()
    });
}

#[test]
fn a_program_that_reaps_every_child_upgrades_and_fails_to() {
    let mut bed = Bed::new("reap");
    let exit = bed.set("exit");
    for _ in 0..3 {
        let line = bed.server.fail_to_upgrade();
        assert!(line.contains("ended before it was ready"), "{line}");
    }
    fs::remove_file(exit).unwrap();
    bed.server.upgrade();
}

/// std ignores SIGPIPE, but a program may restore the default. Then a write to a dead parent must not end the process.
#[test]
fn with_a_default_sigpipe_the_child_outlives_its_parent() {
    let mut bed = Bed::new("sigpipe");
    let (addr, parent) = (bed.server.addr(), bed.server.first_pid());
    let wait = bed.set("wait");
    bed.server.signal(Signal::HUP);
    bed.server.wait_any(&format!("listening {addr} gen=2"));
    send_signal(parent, Signal::KILL);
    wait_exit(parent);
    fs::remove_file(wait).unwrap();
    bed.server.wait("serving gen=2 ");
    assert_eq!(generation(&addr), 2);
    bed.server.upgrade();
    assert_eq!(generation(&addr), 3);
}

#[test]
fn the_wait_for_the_parent_has_a_deadline() {
    let mut bed = Bed::new("exclusive");
    let hold = bed.set("hold");
    bed.server.upgrade();
    // The child may have reported this before the verdict of the upgrade.
    bed.server.wait_any("waits: ");
    assert!(!bed.server.said().iter().any(|line| line.starts_with("ended gen=1 ")));
    fs::remove_file(hold).unwrap();
    bed.server.wait("alone gen=2");
}

/// The loop retries every 50 ms. A log line for each try would fill a disk.
#[test]
fn a_lack_of_descriptors_is_logged_once() {
    let mut bed = Bed::new("few");
    let (addr, pid) = (bed.server.addr(), bed.server.first_pid());
    bed.server.wait("few descriptors");
    let mut stream = connect(&addr).unwrap();
    bed.server.wait("log: out of descriptors or memory; retrying accept");
    // Counts how often a thread has gone to sleep: the accept loop every 50 ms, and one that checks for a file every
    // ms.
    let sleeps = || {
        let count = |tid: u32| status_field(tid, "voluntary_ctxt_switches").parse::<u64>().unwrap();
        threads(pid).into_keys().map(count).sum::<u64>()
    };
    let before = sleeps();
    eventually("it has tried several times", || sleeps() >= before + 500);
    bed.set("more");
    stream.write_all(b"who\n").unwrap();
    assert!(stream.read_to_string(&mut String::new()).unwrap() > 0);
    let logged = bed.server.said().iter().filter(|line| line.starts_with("log: ")).count();
    assert_eq!(logged, 1);
}

#[test]
fn an_observer_that_panics_changes_nothing() {
    for switches in ["panic-at-end", "panic"] {
        let mut bed = Bed::new(switches);
        let addr = bed.server.addr();
        let load = Load::on(&addr, 1);
        let exit = bed.set("exit");
        bed.server.fail_to_upgrade();
        fs::remove_file(exit).unwrap();
        bed.server.upgrade();
        bed.server.wait("ended gen=1 left=0 upgraded to ");
        load.stop().assert_none_failed();
        assert_eq!(generation(&addr), 2);
        bed.server.wait_serving();
        bed.server.signal(Signal::TERM);
        bed.server.wait("ended gen=2 left=0 stopped by SIGTERM");
        bed.server.wait_all_ended();
    }
}

/// Otherwise the queued connections would be reset.
#[test]
fn a_drain_waits_for_a_loop_that_has_not_begun() {
    if !is_alone("post_fork::a_drain_waits_for_a_loop_that_has_not_begun") {
        return;
    }
    let starting = Ecdysis::builder().start().unwrap();
    let listener = starting.listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let server = starting.ready().unwrap();
    let shutdown = server.shutdown();
    let mut incoming = shutdown.incoming(&listener);
    let never_used = shutdown.incoming(&listener);
    let _queued = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    server.stop();
    assert_eq!(shutdown.drain(Duration::ZERO), 2);
    drop(never_used);
    assert_eq!(shutdown.drain(Duration::ZERO), 1);
    assert!(incoming.next().unwrap().is_ok());
    assert!(incoming.next().is_none());
    assert_eq!(shutdown.drain(Duration::ZERO), 0);
}

#[test]
fn a_second_stop_signal_ends_the_drain_of_a_program_that_chose_so() {
    if !is_alone("post_fork::a_second_stop_signal_ends_the_drain_of_a_program_that_chose_so") {
        return;
    }
    let long = Duration::from_secs(30);
    let raise = |signal| rustix::process::kill_process(rustix::process::getpid(), signal).unwrap();
    for chosen in [true, false] {
        let mut builder = Ecdysis::builder();
        builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM).stop_on_signal(libc::SIGINT);
        let server = builder.second_stop_ends_drain(chosen).start().unwrap().ready().unwrap();
        let shutdown = server.shutdown();
        let connection = shutdown.guard();
        raise(Signal::TERM);
        server.run().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let drain = std::thread::spawn({
            let shutdown = shutdown.clone();
            move || tell.send(shutdown.drain(long * 2)).unwrap()
        });
        // This signal requests something else, and changes nothing.
        raise(Signal::HUP);
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        raise(Signal::INT);
        if !chosen {
            assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
            drop(connection);
        }
        assert_eq!(told.recv_timeout(long), Ok(chosen.into()));
        drain.join().unwrap();
    }
}
