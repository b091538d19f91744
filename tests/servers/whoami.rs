//! The server of most tests: it answers with its generation.
//!
//!     cargo run --example whoami -- --listen 127.0.0.1:7000
//!     echo | nc 127.0.0.1 7000            # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711                      # whoami prints: committed …, upgrade ok …, ended gen=1 …
//!     echo | nc 127.0.0.1 7000            # gen=2 pid=4720
//!
//! SIGHUP upgrades, SIGTERM and SIGINT stop, SIGUSR2 stops partially. A connection to a socket can do the same:
//!
//!     whoami --listen ADDR...             ip:port, unix:PATH, unix:@name, udp:ip:port; each line (or datagram) gets one
//!                                         line back. systemd:NAME=ip:port is the socket that a
//!                                         unit passed by name and address, systemd:NAME all with that name
//!       --hold                            keep each connection, and answer its lines until it ends or the shutdown
//!       --keep-alive                      keep the connection of a client that sends `keep`, as servers should: the last
//!                                         answer says so, and an idle connection ends after a grace period
//!       --threads N                       accepting threads per listener (1)
//!       --drain SECONDS                   how long to wait for open connections at the end (60)
//!       --stop-drain SECONDS              the same at a stop, if it differs
//!       --takeover-socket P               hand over to a process that connects there: another whoami with --take-over P
//!       --transport pipes|socket          what carries the handover to a child (pipes)
//!       --upgrade-socket P  --stop-socket P  --partial-stop-socket P  --control-socket P  --pid-file P  --exec P
//!       --ready-timeout MS|max  --probation MS|max  --overlap allow|refuse|N  --fork
//!       --drop-early                      drop the handle before the drain
//!       --close N  --mlockall             do this first: close a standard stream, lock the memory
//!       --heap MB                         the first generation allocates this much
//!       --next FILE                       read at each upgrade: `exec=PATH`, or `NAME=VALUE` for the environment
//!       --verify FILE                     at each upgrade the new version is kept if the file contains `ok`, and rolled back
//!                                         otherwise; waits until the file exists
//!       --stop-delay MS
//!       --log                             print every line of the log, as `log LEVEL TEXT`
//!       --systemd                         notify the service manager, take its sockets (with feature systemd)
//!       --keep-passed                     a stop stores what is passed with the service manager
//!       --misbehave FILE                  how the next generation misbehaves, read when it starts; see `Misbehavior`
//!
//! Several generations share stderr, so each line is one write:
//!
//!     listening ADDR gen= pid=            per listener, with its actual port
//!     serving gen= pid=                   `ready` has returned, so the upgrade is committed
//!     committed pid= gen= ms= at=         from the parent, with CLOCK_MONOTONIC in ns
//!     upgrade ok pid= gen= ms=            the verdict, after the probation; ms is the time to the commit
//!     upgrade failed: WHY
//!     ended gen= pid= left= HOW           the last line; left is the number of connections that were cut

#[path = "../../examples/support/mod.rs"]
mod support;

use ecdysis::{Connection, Ecdysis, Event, Overlap, Shutdown, Spawn, Starting, Transport};
use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    support::help(include_str!("whoami.rs"));
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format!("whoami: {}", chain(&*error)));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<()> {
    let mut builder = Ecdysis::builder();
    let options = Options::parse(&mut builder)?;
    builder
        .upgrade_on_signal(libc::SIGHUP)
        .stop_on_signal(libc::SIGTERM)
        .stop_on_signal(libc::SIGINT)
        .partial_stop_on_signal(libc::SIGUSR2);
    let (reported, verdict) = mpsc::channel();
    builder.on_event(move |event| {
        report(event);
        if matches!(event, Event::Upgraded(_)) {
            let _ = reported.send(());
        }
    });

    let starting = builder.start()?;
    let (gen, pid) = (starting.generation(), process::id());
    if let Some(dir) = &options.chdir {
        std::env::set_current_dir(dir)?;
    }
    let misbehavior = Misbehavior::of(&starting, &options)?;
    let shutdown = starting.shutdown();

    for address in &options.listen {
        misbehavior.before_listen();
        for (listener, real) in Listener::all(&starting, address)? {
            say(format!("listening {real} gen={gen} pid={pid}"));
            for _ in 0..options.threads {
                let (listener, shutdown, kept) = (listener.try_clone()?, shutdown.clone(), options.kept);
                // These threads accept nothing before `ready`, although they already run.
                thread::spawn(move || listener.serve(&shutdown, kept, &format!("gen={gen} pid={pid}")));
            }
        }
    }
    let starting = misbehavior.before_ready(starting)?;
    drop_rights(options.drop_rights.as_deref() == Some("before-ready"))?;
    let ecdysis = starting.ready()?;
    drop_rights(options.drop_rights.as_deref() == Some("after-ready"))?;
    say(format!("serving gen={gen} pid={pid}"));
    misbehavior.after_ready(&ecdysis);
    if options.wait_for_parent && ecdysis.is_child() {
        let ecdysis = ecdysis.clone();
        thread::spawn(move || {
            if ecdysis.wait_for_parent(Duration::from_secs(60)).is_ok() {
                say(format!("parent ended gen={gen} pid={pid}"));
            }
        });
    }

    if misbehavior.get("no-run").is_some() {
        shutdown.wait();
        let left = shutdown.drain(options.drain);
        say(format!("ended gen={gen} pid={pid} left={left} without run"));
        return Ok(());
    }
    let exit = ecdysis.run()?;
    if matches!(exit.mode, ecdysis::ExitMode::Upgraded(_)) {
        // The library waits for the observer for a second, and the tests wait for its line, however busy the machine is.
        let _ = verdict.recv_timeout(Duration::from_secs(60));
    }
    if options.drop_early {
        drop(ecdysis);
        say(format!("dropped gen={gen} pid={pid}"));
    }
    let at_stop = options.stop_drain.filter(|_| !matches!(exit.mode, ecdysis::ExitMode::Upgraded(_)));
    let left = shutdown.drain(at_stop.unwrap_or(options.drain));
    say(format!("ended gen={gen} pid={pid} left={left} {} ({})", exit.mode, exit.reason));
    Ok(())
}

/// Drops privileges, like a service that root has started.
fn drop_rights(now: bool) -> io::Result<()> {
    const NOBODY: u32 = 65534;
    // SAFETY: plain numbers.
    if now && unsafe { libc::setgid(NOBODY) | libc::setuid(NOBODY) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes each line with one call, so that the lines of several generations never mix. A failure cannot be reported.
fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn chain(error: &dyn Error) -> String {
    let (mut all, mut next) = (error.to_string(), error.source());
    while let Some(error) = next {
        all += &format!(": {error}");
        next = error.source();
    }
    all
}

struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        say(format!("log {} {}", record.level().as_str().to_lowercase(), record.args()));
    }

    fn flush(&self) {}
}

fn report(event: &Event) {
    match event {
        Event::Committed(u) => {
            let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: writes one timespec. (rustix is not used here, because it reads the vDSO, which Valgrind hides.)
            unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
            let (at, ms) = (now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64, u.commit.as_secs_f64() * 1e3);
            say(format!("committed pid={} gen={} ms={ms:.3} at={at}", u.pid, u.generation));
        }
        Event::Upgraded(u) => {
            let ms = u.commit.as_secs_f64() * 1e3;
            say(format!("upgrade ok pid={} gen={} ms={ms:.3}", u.pid, u.generation));
        }
        Event::UpgradeFailed { error, .. } => say(format!("upgrade failed: {}", chain(error))),
        _ => {}
    }
}

// ---- options ----

struct Options {
    listen: Vec<String>,
    threads: usize,
    kept: Kept,
    chdir: Option<PathBuf>,
    drop_rights: Option<String>,
    wait_for_parent: bool,
    drop_early: bool,
    drain: Duration,
    stop_drain: Option<Duration>,
    misbehave: Option<PathBuf>,
}

impl Options {
    /// Options of the library go straight into its builder.
    fn parse(builder: &mut ecdysis::Builder) -> Result<Options> {
        use lexopt::prelude::*;
        let mut options = Options {
            listen: vec![],
            threads: 1,
            kept: Kept::No,
            chdir: None,
            drop_rights: None,
            wait_for_parent: false,
            drop_early: false,
            drain: Duration::from_secs(60),
            stop_drain: None,
            misbehave: None,
        };
        let mut args = lexopt::Parser::from_env();
        let ms = |value: std::ffi::OsString| match value.to_str() {
            Some("max") => Ok(Duration::MAX),
            _ => value.parse().map(Duration::from_millis),
        };
        while let Some(arg) = args.next()? {
            match arg {
                Long("listen") => options.listen.push(args.value()?.string()?),
                Long("threads") => options.threads = args.value()?.parse()?,
                Long("hold") => options.kept = Kept::Hold,
                Long("keep-alive") => options.kept = Kept::Alive,
                Long("chdir") => options.chdir = Some(args.value()?.into()),
                Long("drop-rights") => options.drop_rights = Some(args.value()?.string()?),
                Long("wait-for-parent") => options.wait_for_parent = true,
                Long("stop-drain") => {
                    options.stop_drain = Some(args.value()?.parse_with(|s| s.parse().map(Duration::from_secs_f64))?)
                }
                Long("drain") => {
                    options.drain = args.value()?.parse_with(|s| s.parse().map(Duration::from_secs_f64))?
                }
                #[cfg(feature = "systemd")]
                Long("systemd") => drop(builder.systemd_notify(true).systemd_sockets(true)),
                #[cfg(feature = "systemd")]
                Long("keep-passed") => drop(builder.systemd_keep_passed(true)),
                Long("misbehave") => options.misbehave = Some(args.value()?.into()),
                Long("upgrade-socket") => drop(builder.upgrade_on_socket(args.value()?)),
                Long("stop-socket") => drop(builder.stop_on_socket(args.value()?)),
                Long("partial-stop-socket") => drop(builder.partial_stop_on_socket(args.value()?)),
                Long("control-socket") => drop(builder.control_on_socket(args.value()?)),
                Long("takeover-socket") => drop(builder.takeover_on_socket(args.value()?)),
                Long("take-over") => drop(builder.take_over(args.value()?)),
                Long("transport") => drop(builder.transport(match args.value()?.string()?.as_str() {
                    "pipes" => Transport::Pipes,
                    "socket" => Transport::Socket,
                    other => return Err(format!("--transport: what is {other}?").into()),
                })),
                Long("pid-file") => drop(builder.pid_file(args.value()?)),
                Long("exec") => drop(builder.exec(args.value()?)),
                Long("next") => {
                    let file = PathBuf::from(args.value()?);
                    builder.before_upgrade(move |next| {
                        for (name, value) in std::fs::read_to_string(&file)?.lines().filter_map(|l| l.split_once('=')) {
                            let _ = if name == "exec" { next.exec(value) } else { next.env(name, value) };
                        }
                        Ok(())
                    });
                }
                Long("verify") => {
                    let file = PathBuf::from(args.value()?);
                    builder.verify(move |_| loop {
                        match std::fs::read_to_string(&file) {
                            Ok(text) if text.trim() == "ok" => return Ok(()),
                            Ok(text) if !text.is_empty() => return Err(text.trim().into()),
                            // The file does not exist, or is being written.
                            _ => thread::sleep(Duration::from_millis(5)),
                        }
                    });
                }
                Long("stop-delay") => drop(builder.stop_delay(ms(args.value()?)?)),
                Long("log") => {
                    log::set_logger(&Log).map_err(|e| e.to_string())?;
                    log::set_max_level(log::LevelFilter::Trace);
                }
                Long("ready-timeout") => drop(builder.ready_timeout(ms(args.value()?)?)),
                Long("probation") => drop(builder.probation(ms(args.value()?)?)),
                Long("drop-early") => options.drop_early = true,
                Long("fork") => drop(builder.spawn(Spawn::Fork)),
                // SAFETY: one of the first three descriptors, which nothing here owns.
                Long("close") => drop(unsafe { libc::close(args.value()?.parse::<u8>()?.min(2).into()) }),
                Long("heap") => {
                    let megabytes: usize = args.value()?.parse()?;
                    if std::env::var_os("ECDYSIS_HANDOVER").is_none() {
                        std::mem::forget(Vec::<u8>::with_capacity(megabytes << 20));
                    }
                }
                // SAFETY: plain numbers.
                Long("mlockall") => drop(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) }),
                Long("overlap") => drop(builder.overlap(match args.value()?.string()?.as_str() {
                    "allow" => Overlap::Allow,
                    "refuse" => Overlap::Refuse,
                    most => Overlap::AtMost(most.parse()?),
                })),
                other => return Err(other.unexpected().into()),
            }
        }
        if options.listen.is_empty() {
            return Err("nothing to do: give --listen ADDR at least once".into());
        }
        Ok(options)
    }
}

// ---- serving ----

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    Udp(UdpSocket),
}

impl Listener {
    /// Returns the listener, or all sockets that a unit of the service manager passed by a name.
    fn all(starting: &Starting, address: &str) -> Result<Vec<(Listener, String)>> {
        #[cfg(feature = "systemd")]
        if let Some(unit) = address.strip_prefix("systemd:") {
            let Some((name, address)) = unit.split_once('=') else {
                let group = starting.systemd_group(unit)?.into_iter();
                // The unit chooses not only the addresses but also the kinds.
                return group.map(|(key, fd)| Listener::of_kind(&key.to_string(), fd)).collect();
            };
            let listener = Listener::Tcp(starting.systemd_listen_tcp(name, address.parse()?)?);
            return Ok(vec![(listener, address.into())]);
        }
        Ok(vec![Listener::new(starting, address)?])
    }

    #[cfg(feature = "systemd")]
    fn of_kind(key: &str, fd: std::os::fd::OwnedFd) -> Result<(Listener, String)> {
        match key.split_once(' ') {
            Some(("tcp", address)) => Ok((Listener::Tcp(fd.into()), address.into())),
            Some(("unix", path)) => Ok((Listener::Unix(fd.into()), format!("unix:{path}"))),
            Some(("udp", address)) => Ok((Listener::Udp(fd.into()), format!("udp:{address}"))),
            _ => Err(format!("cannot serve {key}").into()),
        }
    }

    /// Returns the listener, and its address in the form of `--listen` with the actual port.
    fn new(starting: &Starting, address: &str) -> Result<(Listener, String)> {
        if let Some(path) = address.strip_prefix("unix:") {
            Ok((Listener::Unix(starting.listen_unix(path)?), address.into()))
        } else if let Some(address) = address.strip_prefix("udp:") {
            let bind = |socket: ecdysis::Socket, address| socket.bind(address).map(|()| socket.into());
            let socket = starting.build_socket_udp(address.parse()?, bind)?;
            let real = socket.local_addr()?;
            Ok((Listener::Udp(socket), format!("udp:{real}")))
        } else {
            let listener = starting.listen_tcp(address.parse::<SocketAddr>()?)?;
            let real = listener.local_addr()?;
            Ok((Listener::Tcp(listener), real.to_string()))
        }
    }

    fn try_clone(&self) -> io::Result<Listener> {
        Ok(match self {
            Listener::Tcp(l) => Listener::Tcp(l.try_clone()?),
            Listener::Unix(l) => Listener::Unix(l.try_clone()?),
            Listener::Udp(s) => Listener::Udp(s.try_clone()?),
        })
    }

    fn serve(&self, shutdown: &Shutdown, kept: Kept, answer: &str) {
        match self {
            Listener::Tcp(l) => each(shutdown.incoming(l), shutdown, kept, answer),
            Listener::Unix(l) => each(shutdown.incoming(l), shutdown, kept, answer),
            Listener::Udp(socket) => {
                let _guard = shutdown.guard(); // so that the drain waits for the last answer
                let mut datagram = [0; 65536];
                while let Some(received) = shutdown.recv_from(socket, &mut datagram) {
                    let Ok((length, peer)) = received else {
                        continue;
                    };
                    let _ = socket.send_to(&[answer.as_bytes(), b" ", &datagram[..length]].concat(), peer);
                }
            }
        }
    }
}

/// The connections that are kept after an answer.
#[derive(Clone, Copy, PartialEq)]
enum Kept {
    No,
    Hold,
    Alive,
}

trait Stream: Read + Write + AsFd + Connection + Send + 'static {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

/// Starts a thread per connection, with a guard in each, so that the drain waits for it.
fn each<S: Stream>(streams: impl Iterator<Item = io::Result<S>>, shutdown: &Shutdown, kept: Kept, answer: &str) {
    for stream in streams.flatten() {
        let (guard, shutdown, answer) = (shutdown.guard(), shutdown.clone(), format!("{answer}\n"));
        thread::spawn(move || {
            let _ = match kept {
                Kept::Alive => kept_alive(stream, &shutdown, &answer),
                _ => connection(stream, &shutdown, kept == Kept::Hold, &answer),
            };
            drop(guard);
        });
    }
}

fn kept_alive(stream: impl Stream, shutdown: &Shutdown, answer: &str) -> io::Result<()> {
    const IDLE: Duration = Duration::from_secs(600);
    const GRACE: Duration = Duration::from_secs(2);
    let mut stream = BufReader::new(stream);
    while shutdown.next_request(&mut stream, IDLE, GRACE)? {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let last = line != "keep\n" || shutdown.is_over();
        let word = if last && line == "keep\n" { " last" } else { "" };
        stream.get_mut().write_all(format!("{}{word}\n", answer.trim_end()).as_bytes())?;
        if last {
            break;
        }
    }
    Ok(())
}

fn connection(stream: impl Stream, shutdown: &Shutdown, hold: bool, answer: &str) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        // An idle connection of `--hold` ends at the shutdown. Any other waits for its line without a limit.
        if hold && stream.buffer().is_empty() && shutdown.readable(stream.get_ref(), None)? != ecdysis::Readable::Ready
        {
            return Ok(());
        }
        let more = stream.read_until(b'\n', &mut Vec::new())? > 0;
        if more {
            stream.get_mut().write_all(answer.as_bytes())?;
        }
        if !more || !hold {
            return Ok(());
        }
    }
}

// ---- misbehaving on purpose ----

/// How this generation misbehaves. The file contains these words, one or more per line. The first generation never
/// reads it.
///
///     slow-listen           waits 300 ms before each listener
///     sleep=MS              waits before ready; the words below take effect after it
///     exit=CODE signal=N panic hang stop-self refuse=REASON (to the end of the line)
///     close-status          closes its pipes and keeps running (it executes `sleep`, and the pipes are close-on-exec)
///     no-run                never calls `run`
///     helper                starts a process that holds copies of its pipes until the test ends it
///     garbage               writes garbage to the status pipe, then waits
///     die-after-ready=MS    kills itself with SIGKILL this long after ready
///     stop-after-ready=MS   stops the service this long after ready
///     freeze-after-ready=MS stops itself with SIGSTOP this long after ready, as if it hung
#[derive(Default)]
struct Misbehavior(Vec<(String, String)>);

impl Misbehavior {
    fn of(starting: &Starting, options: &Options) -> Result<Misbehavior> {
        let (true, Some(file)) = (starting.is_child(), &options.misbehave) else {
            return Ok(Self::default());
        };
        let text = match std::fs::read_to_string(file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let mut words = vec![];
        for line in text.lines() {
            let line_words = if line.starts_with("refuse=") { vec![line] } else { line.split_whitespace().collect() };
            for word in line_words {
                let (name, value) = word.split_once('=').unwrap_or((word, ""));
                words.push((name.to_string(), value.to_string()));
            }
        }
        Ok(Misbehavior(words))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    fn before_listen(&self) {
        if self.get("slow-listen").is_some() {
            thread::sleep(Duration::from_millis(300));
        }
    }

    fn before_ready(&self, starting: Starting) -> Result<Starting> {
        if let Some(ms) = self.get("sleep") {
            thread::sleep(Duration::from_millis(ms.parse()?));
        }
        for (name, value) in &self.0 {
            match name.as_str() {
                "helper" => helper(),
                "slow-listen" | "sleep" | "no-run" | "die-after-ready" | "stop-after-ready" | "freeze-after-ready" => {}
                "memory" => std::mem::forget(vec![1_u8; value.parse::<usize>()? << 20]),
                "exit" => process::exit(value.parse()?),
                "signal" => kill_self(value.parse()?)?,
                "stop-self" => kill_self(libc::SIGSTOP)?,
                "panic" => panic!("as --misbehave asked"),
                "hang" => hang(),
                "refuse" => return Err(starting.refuse(value).into()),
                "close-status" => {
                    use std::os::unix::process::CommandExt;
                    return Err(process::Command::new("sleep").arg("3600").exec().into());
                }
                "garbage" => {
                    write_to_own_pipes(b"\x00\xffgarbage garbage garbage\n\n\n")?;
                    hang();
                }
                _ => return Err(format!("--misbehave: what is {name}?").into()),
            }
        }
        Ok(starting)
    }

    fn after_ready(&self, ecdysis: &Ecdysis) {
        for (name, value) in &self.0 {
            let after = Duration::from_millis(value.parse().unwrap_or(0));
            let ecdysis = ecdysis.clone();
            match name.as_str() {
                "die-after-ready" => thread::spawn(move || {
                    thread::sleep(after);
                    kill_self(libc::SIGKILL)
                }),
                "freeze-after-ready" => thread::spawn(move || {
                    thread::sleep(after);
                    kill_self(libc::SIGSTOP)
                }),
                "stop-after-ready" => thread::spawn(move || {
                    thread::sleep(after);
                    ecdysis.stop();
                    Ok(())
                }),
                _ => continue,
            };
        }
    }
}

/// A forked process that does not call execve keeps every descriptor, including those with close-on-exec.
fn helper() {
    // SAFETY: the child calls nothing but sleep and _exit (fork(2)).
    unsafe {
        if libc::fork() == 0 {
            libc::sleep(3600);
            libc::_exit(0);
        }
    }
}

fn hang() {
    loop {
        thread::park();
    }
}

fn kill_self(signal: i32) -> Result<()> {
    let signal = rustix::process::Signal::from_named_raw(signal).ok_or("no such signal")?;
    rustix::process::kill_process(rustix::process::getpid(), signal)?;
    if signal != rustix::process::Signal::STOP {
        // At the first SIGSEGV or SIGBUS, std's handler only removes itself.
        rustix::process::kill_process(rustix::process::getpid(), signal)?;
    }
    Ok(())
}

/// The status pipe belongs to the library, so search for it: every pipe above stderr that is open for writing.
fn write_to_own_pipes(bytes: &[u8]) -> Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let number: i32 = path.file_name().and_then(|n| n.to_str()).ok_or("not a number")?.parse()?;
        let is_pipe = std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:"));
        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
        let flags = flags.lines().find_map(|l| l.strip_prefix("flags:")).unwrap_or("0").trim();
        let writable = i32::from_str_radix(flags, 8)? & libc::O_ACCMODE == libc::O_WRONLY;
        if number > 2 && is_pipe && writable {
            std::fs::OpenOptions::new().write(true).open(path)?.write_all(bytes)?;
        }
    }
    Ok(())
}
