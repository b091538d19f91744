//! A small threaded server, upgraded by this library (`way=auto`, `way=fork`) or by hand (`way=bare-fork`,
//! `way=bare-vfork`, `way=bare-vm`): one binary, so that size and start are the same for all.

use std::ffi::CString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ecdysis::{Ecdysis, Event, Spawn, Transport};
use ecdysis_bench::rate::{count, report_rate, ACCEPTED};
use ecdysis_bench::sys::{self, Heap, Way};
use ecdysis_bench::{answer, hear, say, say_serving, say_upgraded, Args};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    sys::mark("main");
    let args = Args::get();
    match args.text("way") {
        Some("bare-fork") => Ok(bare(&args, Way::Fork)?),
        Some("bare-vfork") => Ok(bare(&args, Way::Vfork)?),
        Some("bare-vm") => Ok(bare(&args, Way::Vm)?),
        Some("block") => Ok(count_blocking(&args)?),
        Some("count") => count_incoming(&args),
        Some("keep-block") => Ok(keep_blocking()?),
        Some("keep") => keep_incoming(),
        Some("fork") => ours(&args, Spawn::Fork),
        _ => ours(&args, Spawn::Auto),
    }
}

/// When the child was allowed to serve.
static COMMITTED: AtomicU64 = AtomicU64::new(0);

fn ours(args: &Args, spawn: Spawn) -> Result<(), Box<dyn std::error::Error>> {
    let mut builder = Ecdysis::builder();
    builder.spawn(spawn).probation(Duration::ZERO);
    if args.by_signal() {
        builder.upgrade_on_signal(libc::SIGHUP).on_event(|event| {
            if let Event::Committed(_) = event {
                COMMITTED.store(sys::now(), Ordering::Relaxed);
            }
        });
    }
    if args.text("notify").is_some() {
        // Under `hold`, which ends the server with this signal.
        builder.systemd_notify(true).stop_on_signal(libc::SIGTERM);
    }
    if args.text("transport") == Some("socket") {
        builder.transport(Transport::Socket);
    }
    if let Some(path) = args.text("takeover") {
        builder.takeover_on_socket(path).take_over(path);
    }
    let starting = builder.start()?;
    let listeners = args.addresses().map(|a| starting.listen_tcp(a)).collect::<Result<Vec<_>, _>>()?;
    if starting.is_child() && args.text("heap").is_some() {
        // Measures the effect of several upgrades on a parent with one heap. This generation never serves.
        let _ = starting.refuse("as told");
        return Ok(());
    }
    let shutdown = starting.shutdown();
    let listeners = &*listeners.leak();
    let server = starting.ready()?;
    sys::mark("ready");
    say_serving();
    for _ in 0..args.number("threads", 1) {
        let shutdown = shutdown.clone();
        thread::spawn(move || shutdown.incoming(&listeners[0]).flatten().for_each(answer));
    }
    if args.text("heap").is_some() {
        return measure_stall(args, &server);
    }
    if args.by_signal() {
        let since = sys::now();
        server.run()?;
        say_upgraded(since, COMMITTED.load(Ordering::Relaxed));
    } else if hear() == "upgrade" {
        sys::mark("begin");
        let since = sys::now();
        let upgraded = server.upgrade()?;
        sys::mark("end");
        // Without an observer, whose thread would have to wake up and would be measured too.
        say_upgraded(since, since + upgraded.commit.as_nanos() as u64);
    } else {
        server.stop();
    }
    shutdown.drain(Duration::from_secs(5));
    Ok(())
}

/// The handover without a library: fork, execve, and one byte in a pipe that means ready.
fn bare(args: &Args, way: Way) -> io::Result<()> {
    const VARIABLE: &str = "BARE";
    if args.by_signal() {
        sys::block_hangup();
    }
    let inherited = std::env::var(VARIABLE).ok();
    let mut status = None;
    let listeners: Vec<TcpListener> = match &inherited {
        Some(fds) => {
            let mut fds = fds.split(',').filter_map(|fd| fd.parse().ok());
            status = fds.next().map(sys::adopt::<std::fs::File>);
            fds.map(sys::adopt).collect()
        }
        None => args.addresses().map(TcpListener::bind).collect::<io::Result<_>>()?,
    };
    let listeners = &*listeners.leak();
    if let Some(mut status) = status {
        status.write_all(b"r")?;
    }
    sys::mark("ready");
    say_serving();
    for _ in 0..args.number("threads", 1) {
        thread::spawn(move || listeners[0].incoming().flatten().for_each(answer));
    }
    if args.by_signal() {
        sys::wait_hangup();
    } else if hear() != "upgrade" {
        return Ok(());
    }

    sys::mark("begin");
    let since = sys::now();
    let (from_child, to_parent) = sys::pipe()?;
    let fds = [to_parent.as_raw_fd()].into_iter().chain(listeners.iter().map(AsRawFd::as_raw_fd)).collect::<Vec<_>>();
    let list = fds.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let argv = std::env::args_os().map(|a| CString::new(a.into_vec())).collect::<Result<Vec<_>, _>>()?;
    let envp = std::env::vars_os()
        .filter(|(name, _)| name != VARIABLE)
        .map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='))
        .chain([format!("{VARIABLE}={list}").into_bytes()])
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
    sys::bare_spawn(way, argv[0].clone(), &argv, &envp, fds)?;
    drop::<OwnedFd>(to_parent);
    let mut byte = [0];
    std::fs::File::from(from_child).read_exact(&mut byte)?;
    let committed = sys::now();
    sys::mark("end");
    say_upgraded(since, committed);
    // As with the library, the old process no longer accepts after the commit.
    Ok(())
}

/// Returns the longest stall of a thread that works in memory: during an upgrade, and during the same time without one.
fn measure_stall(args: &Args, server: &Ecdysis) -> Result<(), Box<dyn std::error::Error>> {
    static LONGEST: AtomicU64 = AtomicU64::new(0);
    static LAST: AtomicU64 = AtomicU64::new(0);
    let mut heap = Heap::new(args.number("heap", 0) << 20)?;
    thread::spawn(move || {
        let (mut last, mut page) = (sys::now(), 0_usize);
        loop {
            heap.touch(page);
            page = page.wrapping_add(7919);
            let now = sys::now();
            LONGEST.fetch_max(now - last, Ordering::Relaxed);
            LAST.store(now, Ordering::Relaxed);
            last = now;
        }
    });
    say("touched");
    // The thread may be stalled at this moment.
    let longest = || {
        let still = sys::now().saturating_sub(LAST.load(Ordering::Relaxed));
        LONGEST.swap(0, Ordering::Relaxed).max(still)
    };
    while hear() == "upgrade" {
        longest();
        let since = sys::now();
        let refused = server.upgrade();
        let took = sys::now() - since;
        let stall = longest();
        if !matches!(refused, Err(ecdysis::Error::Refused { .. })) {
            return Err(format!("{refused:?}").into());
        }
        // The longest stall of the same time without an upgrade.
        thread::sleep(Duration::from_nanos(took));
        let quiet = longest();
        say(&format!("stall ns={stall} quiet={quiet} took={took}"));
    }
    std::process::exit(0)
}

/// Accepts, closes and counts connections, through `Shutdown::incoming`.
fn count_incoming(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let starting = Ecdysis::builder().start()?;
    let listener = &*Box::leak(Box::new(starting.listen_tcp(([127, 0, 0, 1], 0).into())?));
    for _ in 0..args.number("threads", 1) {
        let shutdown = starting.shutdown();
        thread::spawn(move || shutdown.incoming(listener).flatten().for_each(count));
    }
    let _server = starting.ready()?;
    Ok(report_rate(listener)?)
}

/// The same with a plain blocking accept.
fn count_blocking(args: &Args) -> io::Result<()> {
    let listener = &*Box::leak(Box::new(TcpListener::bind(("127.0.0.1", 0))?));
    for _ in 0..args.number("threads", 1) {
        thread::spawn(move || listener.incoming().flatten().for_each(count));
    }
    report_rate(listener)
}

/// Answers lines on persistent connections, with one thread each, and counts the answers. Uses this library's wait
/// between two requests.
fn keep_incoming() -> Result<(), Box<dyn std::error::Error>> {
    let starting = Ecdysis::builder().start()?;
    let listener = &*Box::leak(Box::new(starting.listen_tcp(([127, 0, 0, 1], 0).into())?));
    let shutdown = starting.shutdown();
    thread::spawn(move || {
        for stream in shutdown.incoming(listener).flatten() {
            let (shutdown, guard) = (shutdown.clone(), shutdown.guard());
            thread::spawn(move || {
                let mut requests = BufReader::new(stream);
                let (idle, grace) = (Duration::from_secs(60), Duration::from_millis(500));
                while shutdown.next_request(&mut requests, idle, grace).is_ok_and(|more| more) && served(&mut requests)
                {
                }
                drop(guard);
            });
        }
    });
    let _server = starting.ready()?;
    Ok(report_rate(listener)?)
}

/// The same with a plain blocking read.
fn keep_blocking() -> io::Result<()> {
    let listener = &*Box::leak(Box::new(TcpListener::bind(("127.0.0.1", 0))?));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut requests = BufReader::new(stream);
                while served(&mut requests) {}
            });
        }
    });
    report_rate(listener)
}

/// Reads and answers one request. Returns whether there was one.
fn served(requests: &mut BufReader<TcpStream>) -> bool {
    let mut line = String::new();
    let served =
        matches!(requests.read_line(&mut line), Ok(n) if n > 0) && requests.get_mut().write_all(b"served\n").is_ok();
    ACCEPTED.fetch_add(u64::from(served), Ordering::Relaxed);
    served
}
