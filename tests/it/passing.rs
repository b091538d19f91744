//! Everything that is handed over besides TCP and Unix listeners: to a child over pipes, to a child over a socket, and
//! to a process that takes over.
//!
//! The server is this test program itself: it runs the test `server` when its environment says so.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
use crate::seccomp::table::{allow_list, When};
use crate::support::*;
use ecdysis::{Ecdysis, Event, Key, Readable, Starting, Transport, UnixSeqpacketConn};
use rustix::process::{getrlimit, setrlimit, Resource, Signal};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

// ---- the server -------------------------------------------------------------------------------------------------

/// Not a test: the server that the tests below start.
#[test]
fn server() {
    let Some(scenario) = env::var_os("SCENARIO") else { return };
    let served = match scenario.to_str() {
        Some("kinds") => serve_kinds(),
        Some("many") => serve_many(),
        Some("loop") => serve_by_hand(),
        Some("plain") => serve_plainly(),
        #[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
        Some("filtered") => serve_filtered(),
        other => panic!("what is {other:?}?"),
    };
    if let Err(e) = served {
        say(format!("failed: {e:?}"));
        process::exit(1);
    }
    process::exit(0);
}

fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn dir() -> PathBuf {
    env::var_os("DIR").unwrap().into()
}

fn builder() -> ecdysis::Builder {
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM);
    builder.probation(Duration::from_millis(50)).ready_timeout(DEADLINE);
    builder.on_event(|event| match event {
        Event::Committed(new) => {
            say(format!("committed pid={} gen={} ms={:.3}", new.pid, new.generation, new.commit.as_secs_f64() * 1e3));
        }
        Event::Upgraded(new) => say(format!("upgrade ok pid={} gen={}", new.pid, new.generation)),
        Event::UpgradeFailed { error, .. } => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            say(format!("upgrade failed: {error}{cause}"));
        }
        _ => {}
    });
    if env::var_os("TRUST").is_some_and(|whom| whom == "nobody") {
        builder.trust_peers(|_| false);
    }
    if env::var_os("CARRIER").is_some_and(|carrier| carrier == "socket") {
        builder.transport(Transport::Socket);
    }
    builder
}

fn finish(starting: Starting) -> Result<()> {
    let (generation, shutdown) = (starting.generation(), starting.shutdown());
    let server = starting.ready()?;
    say(format!("serving gen={generation} pid={}", process::id()));
    let exit = server.run()?;
    shutdown.drain(DEADLINE);
    say(format!("ended gen={generation} {exit}"));
    Ok(())
}

fn inode(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// One of everything.
fn serve_kinds() -> Result<()> {
    let takeover = dir().join("takeover");
    let starting = builder().take_over(&takeover).takeover_on_socket(&takeover).start()?;
    let generation = starting.generation();
    let tell = |what: String| say(format!("{what} gen={generation}"));
    let shutdown = starting.shutdown();

    let seqpacket = starting.listen_unix_seqpacket(dir().join("records"))?;
    thread::spawn({
        let shutdown = shutdown.clone();
        move || {
            for connection in shutdown.incoming(&seqpacket) {
                let (connection, mut record) = (connection.unwrap(), [0; 1000]);
                let length = connection.recv(&mut record).unwrap();
                let answer = [format!("gen={generation} ").as_bytes(), &record[..length]].concat();
                connection.send(&answer).unwrap();
            }
        }
    });
    let datagrams = starting.listen_unix_datagram(dir().join("datagrams"))?;
    thread::spawn({
        let shutdown = shutdown.clone();
        move || {
            let mut buffer = [0; 1000];
            while let Some(received) = shutdown.recv_from(&datagrams, &mut buffer) {
                let (length, from) = received.unwrap();
                let answer = [format!("gen={generation} ").as_bytes(), &buffer[..length]].concat();
                datagrams.send_to_addr(&answer, &from).unwrap();
            }
        }
    });

    // Two sockets on one address: the kernel spreads connections over them, so both must be handed over.
    let addr: SocketAddr = env::var("GROUP")?.parse()?;
    let group = [(); 2].map(|()| {
        let listener = starting.build_listen_tcp(addr, |socket, addr| {
            socket.set_reuse_port(true)?;
            socket.bind(addr)?;
            socket.listen(100)?;
            Ok(socket.into())
        });
        inode(listener.unwrap())
    });
    tell(format!("group {} {}", group[0], group[1]));

    // A socket that the program has bound itself.
    let key = Key::tcp("127.0.0.1:0".parse()?);
    let adopted: TcpListener = match starting.claim(&key) {
        Some(fd) => fd.into(),
        None => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            starting.adopt(key, listener.try_clone()?)?;
            // Without this, an accept through the shutdown handle would block forever once accepting is over.
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            listener
        }
    };
    tell(format!("adopted {}", inode(&adopted)));

    // The number of times that the state was produced. It is current only if the callback runs at each upgrade.
    let before = starting.take_bytes("count")?.map(|bytes| String::from_utf8(bytes).unwrap());
    tell(format!("count {}", before.as_deref().unwrap_or("none")));
    let count = AtomicU64::new(before.map_or(0, |count| count.parse().unwrap()));
    starting.pass_bytes("count", move || {
        assert!(!dir().join("panic").exists(), "as asked");
        if dir().join("no-state").exists() {
            return Err("the database is locked");
        }
        Ok((count.fetch_add(1, Ordering::Relaxed) + 1).to_string().into_bytes())
    })?;
    let large = starting.take_bytes("large")?;
    tell(format!("large {}", large.map_or(0, |bytes| bytes.iter().map(|&byte| u64::from(byte)).sum())));
    starting.pass_bytes("large", || Ok::<_, io::Error>(vec![1; 10 << 20]))?;

    // A connection of the first generation, to which every generation writes.
    let mut stream = match starting.take_stream::<TcpStream>("upstream")? {
        Some(stream) => stream,
        None => TcpStream::connect(env::var("UPSTREAM")?)?,
    };
    starting.pass_stream("upstream", &stream)?;

    // Each generation asks its parent for its name, and answers its child.
    let (to_parent, to_child) = starting.unix_datagram_pair("chain");
    if let Some(parent) = to_parent {
        let mut answer = [0; 100];
        parent.set_read_timeout(Some(DEADLINE))?;
        parent.send(format!("child {generation}").as_bytes())?;
        let length = parent.recv(&mut answer)?;
        tell(format!("from the parent: {}", String::from_utf8_lossy(&answer[..length])));
    }
    let to_child = to_child?;
    thread::spawn(move || {
        let mut words = [0; 100];
        while let Ok(length) = to_child.recv(&mut words) {
            say(format!("from the child: {} gen={generation}", String::from_utf8_lossy(&words[..length])));
            let _ = to_child.send(format!("parent {generation}").as_bytes());
        }
    });

    if starting.is_child() && dir().join("refuse").exists() {
        return Err(starting.refuse("as asked").into());
    }
    stream.write_all(format!("generation {generation}\n").as_bytes())?;
    finish(starting)
}

fn raise_the_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// A server with a thousand listeners.
fn serve_many() -> Result<()> {
    raise_the_limit();
    let takeover = dir().join("takeover");
    let count: usize = env::var("COUNT")?.parse()?;
    let begun = Instant::now();
    let starting = builder().take_over(&takeover).takeover_on_socket(&takeover).start()?;
    let generation = starting.generation();
    let mut ports = Vec::new();
    let mut listeners = Vec::new();
    for _ in 0..count {
        let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
        ports.push(listener.local_addr()?.port().to_string());
        listeners.push(listener);
    }
    say(format!("claimed us={} gen={generation}", begun.elapsed().as_micros()));
    say(format!("ports {} gen={generation}", ports.join(",")));
    for listener in listeners {
        let shutdown = starting.shutdown();
        thread::Builder::new().stack_size(64 << 10).spawn(move || {
            for stream in shutdown.incoming(&listener) {
                let _ = stream.unwrap().write_all(format!("gen={generation}\n").as_bytes());
            }
        })?;
    }
    finish(starting)
}

/// A program with its own loop, which never calls `run`.
fn serve_by_hand() -> Result<()> {
    let takeover = dir().join("takeover");
    let starting = builder().take_over(&takeover).start()?;
    let (generation, socket) = (starting.generation(), starting.listen_takeover(&takeover)?);
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    say(format!("listening {} gen={generation}", listener.local_addr()?));
    let server = starting.ready()?;
    say(format!("serving gen={generation} pid={}", process::id()));
    answer_lines(listener, &server.shutdown(), generation);
    while server.shutdown().readable(&socket, None)? == Readable::Ready {
        match server.hand_over(&socket) {
            Ok(Some(new)) => say(format!("handed over to gen={}", new.generation)),
            Ok(None) => say("no request".to_owned()),
            Err(e) => say(format!("not handed over: {e}")),
        }
    }
    say(format!("ended gen={generation}"));
    Ok(())
}

/// A server whose takeover socket is polled by `run`.
fn serve_plainly() -> Result<()> {
    let takeover = dir().join("takeover");
    let starting = builder().take_over(&takeover).takeover_on_socket(&takeover).start()?;
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    say(format!("listening {} gen={}", listener.local_addr()?, starting.generation()));
    answer_lines(listener, &starting.shutdown(), starting.generation());
    finish(starting)
}

fn answer_lines(listener: TcpListener, shutdown: &ecdysis::Shutdown, generation: u64) {
    let shutdown = shutdown.clone();
    thread::spawn(move || {
        for stream in shutdown.incoming(&listener) {
            let mut stream = BufReader::new(stream.unwrap());
            let _ = stream.read_line(&mut String::new());
            let _ = stream.get_mut().write_all(format!("gen={generation} pid={}\n", process::id()).as_bytes());
        }
    });
}

/// A server under a profile that contains these columns of the guide's table.
#[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
fn serve_filtered() -> Result<()> {
    let takeover = dir().join("takeover");
    let mut builder = builder();
    builder.take_over(&takeover).takeover_on_socket(&takeover).pid_file(dir().join("pid"));
    let allow = |columns: &[When]| {
        let filters = allow_list(&[&[When::Serving, When::Program], columns].concat());
        filters.iter().try_for_each(|filter| seccompiler::apply_filter_all_threads(filter))
    };
    let role = env::var("ROLE")?;
    match role.as_str() {
        "takes over" => allow(&[When::TakesOver])?,
        "both" => allow(&[When::HandsOver, When::TakesOver])?,
        _ => {}
    }
    let starting = builder.start()?;
    let state = starting.take_bytes("state")?.unwrap_or_default();
    starting.pass_bytes("state", move || io::Result::Ok([&state[..], b"x"].concat()))?;
    let _unix = starting.listen_unix(dir().join("unix"))?;
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    say(format!("listening {} gen={}", listener.local_addr()?, starting.generation()));
    answer_lines(listener, &starting.shutdown(), starting.generation());
    if role == "hands over" {
        allow(&[When::HandsOver])?;
    }
    finish(starting)
}

// ---- the tests --------------------------------------------------------------------------------------------------

fn command(scenario: &str, dir: &Path) -> Command {
    let mut command = this_program("passing::server");
    command.env("SCENARIO", scenario).env("DIR", dir);
    command
}

/// Starts the next generation in one of the three ways. Returns another server only for a takeover.
fn next(carrier: &str, server: &mut Server, command: Command) -> Option<Server> {
    if carrier == "takeover" {
        return Some(Server::start(command));
    }
    server.signal(Signal::HUP);
    None
}

fn in_every_way(test: impl Fn(&str)) {
    for carrier in ["pipes", "socket", "takeover"] {
        eprintln!("carrier: {carrier}");
        test(carrier);
    }
}

#[test]
fn everything_goes_over() {
    in_every_way(|carrier| {
        let dir = tempdir();
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        // An address that only this test uses, so the port can be chosen.
        let [.., high, low] = process::id().to_be_bytes();
        let way = carrier.len();
        let group = format!("127.{}.{}.{}:7001", 60 + way, high, low.max(1));
        let command = || {
            let mut command = command("kinds", dir.path());
            command.env("UPSTREAM", upstream.local_addr().unwrap().to_string()).env("GROUP", &group);
            command.env("CARRIER", carrier);
            command
        };
        let mut servers = vec![Server::serving(command())];
        readable(&upstream, "the server connects");
        let (stream, _) = upstream.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut stream = BufReader::new(stream);
        let mut heard = || {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        assert_eq!(heard(), "generation 1");
        let group = told(&servers[0], "group ", " gen=1");
        let adopted = told(&servers[0], "adopted ", " gen=1");
        assert_eq!(told(&servers[0], "count ", " gen=1"), "none");

        let record = |words: &[u8]| {
            let connection = UnixSeqpacketConn::connect(dir.path().join("records")).unwrap();
            connection.send(words).unwrap();
            readable(&connection, "an answer");
            let mut answer = [0; 1000];
            let length = connection.recv(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..length]).into_owned()
        };
        let here = UnixDatagram::bind(dir.path().join("here")).unwrap();
        here.set_read_timeout(Some(DEADLINE)).unwrap();
        let datagram = |words: &[u8]| {
            here.send_to(words, dir.path().join("datagrams")).unwrap();
            let mut answer = [0; 1000];
            let length = here.recv(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..length]).into_owned()
        };
        assert_eq!(record(b"a record"), "gen=1 a record");
        assert_eq!(datagram(b"a datagram"), "gen=1 a datagram");

        // If the state cannot be produced, no child is started, and the old generation keeps serving.
        for (fault, reason) in [("no-state", "the database is locked"), ("panic", "the callback panicked")] {
            fs::write(dir.path().join(fault), "").unwrap();
            let refused = next(carrier, &mut servers[0], command());
            let expected = "cannot produce state \"count\" for the next generation: ";
            servers[0].wait(&format!("upgrade failed: {expected}{reason}"));
            if let Some(mut refused) = refused {
                refused.wait(r#"answer: "failed: cannot produce state"#);
            }
            fs::remove_file(dir.path().join(fault)).unwrap();
        }
        assert_eq!(record(b"x"), "gen=1 x");

        // The new generation fails after it has taken everything. The next one gets everything again.
        fs::write(dir.path().join("refuse"), "").unwrap();
        let _refused = next(carrier, &mut servers[0], command());
        let line = servers[0].wait("upgrade failed: ");
        assert!(line.ends_with("refused: as asked"), "{line}");
        // It had taken its end of the pair, and had received an answer.
        told(&servers[0], "from the child: child 2", " gen=1");
        fs::remove_file(dir.path().join("refuse")).unwrap();
        assert_eq!(datagram(b"x"), "gen=1 x");

        for generation in 2..=4 {
            let last = servers.len() - 1;
            let started = next(carrier, &mut servers[last], command());
            servers.extend(started);
            let last = servers.len() - 1;
            let new = &mut servers[last];
            for line in [
                format!("group {group} gen={generation}"),
                format!("adopted {adopted} gen={generation}"),
                format!("count {generation} gen={generation}"),
                format!("large {} gen={generation}", 10 << 20),
                format!("from the parent: parent {} gen={generation}", generation - 1),
            ] {
                eventually(&line, || new.said().contains(&line));
            }
            new.wait(&format!("serving gen={generation}"));
            assert_eq!(heard(), format!("generation {generation}"));
            let answer = format!("gen={generation} x");
            assert_eq!((record(b"x"), datagram(b"x")), (answer.clone(), answer));
        }
    });
}

/// Returns the text after `start` in the line that ends with `among`, whenever it was printed.
fn told(server: &Server, start: &str, among: &str) -> String {
    let mut found = None;
    eventually(&format!("{start}…{among}"), || {
        let strip = |line: &String| Some(line.strip_prefix(start)?.strip_suffix(among)?.to_owned());
        found = server.said().iter().find_map(strip);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_thousand_listeners_in_one_handover() {
    const COUNT: usize = 1000;
    raise_the_limit();
    in_every_way(|carrier| {
        let dir = tempdir();
        let command = || {
            let mut command = command("many", dir.path());
            command.env("COUNT", COUNT.to_string()).env("CARRIER", carrier);
            command
        };
        let mut servers = vec![Server::serving(command())];
        let ports = told(&servers[0], "ports ", " gen=1");
        let started = next(carrier, &mut servers[0], command());
        let line = servers[0].wait("committed ");
        servers[0].wait("upgrade ok");
        servers.extend(started);
        let last = servers.len() - 1;
        let new = &mut servers[last];
        eprintln!("{COUNT} listeners by {carrier}: {} ms to the commit", field::<f64>(&line, "ms"));
        eprintln!("start and {COUNT} claims: {} us", told(new, "claimed us=", " gen=2"));
        assert_eq!(told(new, "ports ", " gen=2"), ports, "in the same order");
        for port in ports.split(',') {
            let mut answer = String::new();
            connect(&format!("127.0.0.1:{port}")).unwrap().read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "gen=2\n", "port {port}");
        }
    });
}

#[test]
fn a_program_with_its_own_loop_hands_over() {
    let dir = tempdir();
    let mut first = Server::serving(command("loop", dir.path()));
    let addr = first.addr();
    let load = Load::on(&addr, 2);
    // One peer sends nothing, and one fails.
    let mut stream = unix(&dir.path().join("takeover")).unwrap();
    stream.write_all(b"hello?\n").unwrap();
    first.wait("no request");
    let mut stream = unix(&dir.path().join("takeover")).unwrap();
    stream.write_all(b"takeover 1\n").unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    drop(stream);
    first.wait("not handed over: child ");
    let second = Server::serving(command("loop", dir.path()));
    first.wait("handed over to gen=2");
    first.wait("ended gen=1");
    load.stop().assert_none_failed();
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), second.pid());
}

/// The program's own rule applies on both sides, whatever the user is.
#[test]
fn a_rule_of_the_program_decides_who_may_take_over() {
    for scenario in ["plain", "loop"] {
        let start = |dir: &TempDir, trust: &str| {
            let mut command = command(scenario, dir.path());
            command.env("TRUST", trust);
            Server::start(command)
        };
        for (old, new, expected) in [
            ("nobody", "the same user", "NotHandedOver"),
            ("the same user", "nobody", "Untrusted"),
            ("the same user", "the same user", "serving gen=2"),
        ] {
            let dir = tempdir();
            let mut server = start(&dir, old);
            server.wait("serving gen=1");
            let line = start(&dir, new).wait(expected);
            assert!(expected != "NotHandedOver" || line.contains("denied"), "{line}");
        }
    }
}

/// A takeover needs neither fork nor execve. Two columns of the guide's table list the calls that it needs.
#[test]
#[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
fn under_a_filter_that_forbids_new_processes() {
    let filtered = |dir: &TempDir, role: &str| {
        let mut command = command("filtered", dir.path());
        command.env("ROLE", role);
        Server::serving(command)
    };
    let dir = tempdir();
    let mut server = filtered(&dir, "both");
    let addr = server.addr();
    let load = Load::on(&addr, 2);
    for generation in 2..=11 {
        let next = filtered(&dir, "both");
        assert_eq!(field::<u64>(&server.wait("upgrade ok"), "gen"), generation);
        server.wait("ended ");
        server = next;
    }
    load.stop().assert_none_failed();
    // The filter is in effect: it ends the process when it tries to start a child.
    server.signal(Signal::HUP);
    server.wait_all_ended();
    assert_eq!(server.exit_signal(), Some(libc::SIGSYS));

    // Each process needs only its own column, also if the handover fails. The second of these hangs after its `ready`.
    let dir = tempdir();
    let mut old = filtered(&dir, "hands over");
    for word in ["garbage\n", "ready\n"] {
        let mut stream = unix(&dir.path().join("takeover")).unwrap();
        stream.write_all(b"takeover 1\n").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        stream.write_all(word.as_bytes()).unwrap();
        old.wait("upgrade failed");
    }
    let new = filtered(&dir, "takes over");
    old.wait("ended ");
    assert_eq!(field::<u32>(&ask(&old.addr()).unwrap(), "pid"), new.pid());
}
