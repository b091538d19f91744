//! Listeners that change between two versions: removed, added, moved or exchanged.
//!
//! The server is this test program itself: it runs the test `server` when its environment says so. At its start, each
//! generation reads its addresses from the file `plan`.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{self, Command};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use ecdysis::{Accept, Ecdysis, Event, Shutdown};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

// ---- the server -------------------------------------------------------------------------------------------------

fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        // The observer reports that too.
        if self.enabled(record.metadata()) && !text.starts_with("upgrade failed") {
            say(format!("log {text}"));
        }
    }

    fn flush(&self) {}
}

/// Not a test: the server that the tests below start.
#[test]
fn server() {
    let Ok(dir) = env::var("LISTENERS_DIR") else { return };
    if serve(&dir).is_err() {
        process::exit(1);
    }
    process::exit(0);
}

fn serve(dir: &str) -> Result<()> {
    let _ = log::set_logger(&Logger);
    log::set_max_level(log::LevelFilter::Warn);
    let probation = env::var("PROBATION").map_or(Ok(300), |ms| ms.parse())?;
    let mut builder = Ecdysis::builder();
    if let Ok(app) = env::var("APP") {
        builder.application(app);
    }
    if let Ok(path) = env::var("TAKEOVER") {
        builder.take_over(&path).takeover_on_socket(&path);
    }
    let starting = builder
        .upgrade_on_signal(libc::SIGHUP)
        .stop_on_signal(libc::SIGTERM)
        .probation(Duration::from_millis(probation))
        .on_event(|event| match event {
            Event::Committed(new) => say(format!("committed gen={}", new.generation)),
            Event::Upgraded(new) => say(format!("upgrade ok pid={} gen={}", new.pid, new.generation)),
            Event::UpgradeFailed { error, .. } => say(format!("upgrade failed: {error}")),
            _ => {}
        })
        .start()
        .inspect_err(|e| say(format!("failed: {e}")))?;
    let generation = starting.generation();
    let mut exit = false;
    for line in fs::read_to_string(format!("{dir}/plan"))?.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["tcp", addr, ref options @ ..] => {
                let addr: SocketAddr = addr.parse()?;
                let named = options.iter().find_map(|option| option.strip_prefix("named="));
                let sockets = named.map_or((*starting).clone(), |name| starting.named(name));
                let listener = sockets.build_listen_tcp(addr, |socket, addr| {
                    socket.set_reuse_address(true)?;
                    socket.set_reuse_port(options.contains(&"shared"))?;
                    if addr.is_ipv6() {
                        socket.set_only_v6(options.contains(&"v6only"))?;
                    }
                    socket.bind(addr)?;
                    socket.listen(64)?;
                    Ok(socket.into())
                });
                // Print this first: once the parent knows, it ends this process.
                let listener = listener.inspect_err(|e| say(format!("failed: {e}")))?;
                say(format!("listening {} gen={generation} pid={}", listener.local_addr()?, process::id()));
                accept(starting.shutdown(), listener, generation);
            }
            ["unix", ref path @ ..] => {
                let path = std::path::Path::new(dir).join(path.join(" "));
                accept(starting.shutdown(), starting.listen_unix(path)?, generation)
            }
            ["udp", addr] => {
                let socket = starting.build_socket_udp(addr.parse()?, |socket, addr| {
                    socket.bind(addr)?;
                    Ok(socket.into())
                })?;
                say(format!("listening udp {} gen={generation}", socket.local_addr()?));
                receive(starting.shutdown(), socket, generation);
            }
            ["discard"] => starting.discard_inherited(),
            ["wait", file] => {
                say(format!("waiting gen={generation}"));
                eventually("it may continue", || fs::exists(format!("{dir}/{file}")).unwrap());
            }
            ["exit"] => exit = true,
            _ => panic!("what is {line:?}?"),
        }
    }
    if exit {
        return Err("as planned".into());
    }
    let server = starting.ready()?;
    say(format!("serving gen={generation} pid={}", process::id()));
    server.run()?;
    server.shutdown().drain(Duration::from_secs(30));
    say(format!("ended gen={generation}"));
    Ok(())
}

fn accept<L>(shutdown: Shutdown, listener: L, generation: u64)
where
    L: Accept + Send + 'static,
    L::Stream: Read + Write + Send + 'static,
{
    thread::spawn(move || {
        for stream in shutdown.incoming(&listener).flatten() {
            let guard = shutdown.guard();
            thread::spawn(move || {
                let mut stream = BufReader::new(stream);
                let _ = stream.read_line(&mut String::new());
                let _ = stream.get_mut().write_all(format!("gen={generation}\n").as_bytes());
                drop(guard);
            });
        }
    });
}

fn receive(shutdown: Shutdown, socket: UdpSocket, generation: u64) {
    let guard = shutdown.guard();
    thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Some(Ok((_, from))) = shutdown.recv_from(&socket, &mut buffer) {
            let _ = socket.send_to(format!("gen={generation}").as_bytes(), from);
        }
        drop(guard);
    });
}

struct Planned {
    server: Server,
    dir: TempDir,
}

impl Planned {
    fn start(plan: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = tempdir();
        fs::write(dir.path().join("plan"), plan).unwrap();
        let mut command = this_program("listeners::server");
        command.env("LISTENERS_DIR", dir.path());
        prepare(&mut command);
        Self { server: Server::serving(command), dir }
    }

    fn plan(&self, plan: &str) {
        fs::write(self.dir.path().join("plan"), plan).unwrap();
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.dir.path().join(name).display())
    }
}

/// The outcomes of connections to an address: answered by a generation, refused, or anything else.
fn probe(addr: &str, counts: &mut HashMap<String, u32>) {
    let outcome = match TcpStream::connect(addr) {
        Err(e) => format!("{:?}", e.kind()),
        Ok(mut stream) => {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut answer = String::new();
            let asked = stream.write_all(b"who\n").and_then(|()| stream.read_to_string(&mut answer));
            asked.map_or_else(|e| format!("{:?}", e.kind()), |_| answer.trim().to_owned())
        }
    };
    *counts.entry(outcome).or_default() += 1;
}

// ---- dropped ----------------------------------------------------------------------------------------------------

#[test]
fn a_dropped_listener_is_served_until_the_verdict_and_then_closed() {
    let own = own_address();
    let planned = Planned::start(&format!("tcp {own}\ntcp {own} shared\n"), |_| {});
    let [kept, dropped] = &planned.server.addrs()[..] else { panic!("two listeners") };
    let (kept, dropped) = (kept.clone(), dropped.clone());
    planned.plan(&format!("tcp {own}\n"));
    let (begun, answered) = mpsc::channel();
    let probing = thread::spawn({
        let dropped = dropped.clone();
        move || {
            let (mut counts, begin) = (HashMap::new(), Instant::now());
            probe(&dropped, &mut counts);
            begun.send(()).unwrap();
            while !counts.contains_key("ConnectionRefused") && begin.elapsed() < DEADLINE {
                probe(&dropped, &mut counts);
            }
            counts
        }
    });
    let mut server = planned.server;
    answered.recv_timeout(DEADLINE).unwrap();
    server.upgrade();
    let counts = probing.join().unwrap();
    // A client that connects just as the socket is closed, after the queue was found empty, is reset. As at a stop, the
    // kernel offers no way to refuse it instead. This client connects all the time, so it may happen once.
    let expected = ["gen=1", "ConnectionRefused"];
    let others: u32 = counts.iter().filter(|(key, _)| !expected.contains(&key.as_str())).map(|(_, count)| count).sum();
    assert!(others <= 1, "{counts:?}");
    assert!(counts["gen=1"] > 0, "{counts:?}");
    assert_eq!(generation(&kept), 2);
    server.wait_any(&format!("log the inherited tcp {own} is unclaimed: this version asks for 1"));
    server.wait_any("ended gen=1");
}

/// A client that connects during the probation does not have to wait for the end of the probation.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "listeners are named by their inodes")]
fn a_dropped_listener_answers_during_the_probation() {
    let mut planned = Planned::start("tcp 127.0.0.1:0\nunix a.sock\nudp 127.0.0.1:0\n", |command| {
        command.env("PROBATION", "3600000");
    });
    let tcp = planned.server.addr();
    let udp = planned.server.wait_any("listening udp ");
    let udp = udp.split(' ').nth(2).unwrap();
    planned.plan("tcp 127.0.0.1:0\n");
    planned.server.signal(rustix::process::Signal::HUP);
    planned.server.wait("serving gen=2");
    assert_eq!(generation(&tcp), 2);
    assert_eq!(generation(&planned.unix("a.sock")), 1);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.send_to(b"who", udp).unwrap();
    let mut answer = [0; 10];
    let length = client.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"gen=1");
}

#[test]
fn the_file_of_a_dropped_listener_is_removed() {
    let mut planned = Planned::start("unix a.sock\nunix b.sock\n", |_| {});
    planned.plan("unix b.sock\n");
    planned.server.upgrade();
    planned.server.wait_any("ended gen=1");
    assert!(!planned.dir.path().join("a.sock").exists());
    assert_eq!(generation(&planned.unix("b.sock")), 2);
    planned.server.wait_any("a.sock is unclaimed: the old version serves it until it ends");
}

/// A failed upgrade changes nothing for a listener that the failed version did not ask for.
#[test]
fn a_version_that_drops_a_listener_and_fails_changes_nothing() {
    let mut planned = Planned::start("tcp 127.0.0.1:0\nunix a.sock\n", |_| {});
    planned.plan("tcp 127.0.0.1:0\nexit\n");
    planned.server.fail_to_upgrade();
    assert_eq!(generation(&planned.unix("a.sock")), 1);
    planned.plan("tcp 127.0.0.1:0\nunix a.sock\n");
    planned.server.upgrade();
    assert_eq!(generation(&planned.unix("a.sock")), 2);
}

#[test]
fn a_version_that_asks_for_no_listener_is_refused_unless_it_says_that_this_is_meant() {
    let own = own_address();
    let mut planned = Planned::start(&format!("tcp {own}\n"), |_| {});
    let addr = planned.server.addr();
    planned.plan("");
    let failed = planned.server.fail_to_upgrade();
    assert!(failed.contains(&format!("none of the listeners of the old one: tcp {own}")), "{failed}");
    assert_eq!(generation(&addr), 1);
    planned.plan("unix other.sock\n");
    planned.server.fail_to_upgrade();
    planned.plan("discard\n");
    planned.server.upgrade();
    wait_exit(planned.server.first_pid());
    assert_eq!(TcpStream::connect(&addr).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

// ---- added ------------------------------------------------------------------------------------------------------

/// From listen(2) on, the kernel completes handshakes, and spreads them over all listening SO_REUSEPORT sockets.
#[test]
fn a_new_listener_listens_from_the_commit_on() {
    let mut planned = Planned::start("tcp 127.0.0.1:0 shared\n", |_| {});
    let addr = planned.server.addr();
    let one = format!("tcp {addr} shared\n");
    planned.plan(&format!("tcp 127.0.0.1:0 shared\n{one}{one}{one}unix new.sock\nwait go\nexit\n"));
    planned.server.signal(rustix::process::Signal::HUP);
    planned.server.wait("waiting gen=2");
    for _ in 0..50 {
        assert_eq!(generation(&addr), 1);
    }
    let refused = UnixStream::connect(planned.dir.path().join("new.sock")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    fs::write(planned.dir.path().join("go"), "").unwrap();
    planned.server.wait("upgrade failed");
    planned.plan(&format!("tcp 127.0.0.1:0 shared\n{one}unix new.sock\n"));
    planned.server.upgrade();
    for _ in 0..20 {
        assert_eq!(generation(&addr), 2);
    }
    assert_eq!(generation(&planned.unix("new.sock")), 2);
}

/// An address in use is reported before `ready`.
#[test]
fn an_address_that_is_taken_is_an_early_error() {
    let mut planned = Planned::start("tcp 127.0.0.1:0\n", |_| {});
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    planned.plan(&format!("tcp 127.0.0.1:0\ntcp {}\n", taken.local_addr().unwrap()));
    planned.server.fail_to_upgrade();
    planned.server.wait_any(&format!("failed: cannot open socket tcp {}", taken.local_addr().unwrap()));
}

/// The situation of a program that is started through a wrapper or by hand.
#[test]
fn an_address_that_a_service_manager_holds_names_that() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let plan = format!("tcp {}\n", taken.local_addr().unwrap());
    let failed = |pid: Option<&str>| {
        let dir = tempdir();
        fs::write(dir.path().join("plan"), &plan).unwrap();
        let mut command = this_program("listeners::server");
        command.env("LISTENERS_DIR", dir.path()).env("LISTEN_FDS", "1").env_remove("LISTEN_PID");
        pid.map(|pid| command.env("LISTEN_PID", pid));
        Server::start(command).wait("failed: ")
    };
    assert!(failed(None).contains("systemfd --no-pid"));
    assert!(failed(Some("1")).contains("to process 1, and this is "));
}

/// The kernel's "address in use" does not name the other socket.
#[test]
fn an_address_that_overlaps_an_inherited_one_names_it() {
    let mut planned = Planned::start("tcp 0.0.0.0:0\ntcp 127.0.0.1:0\n", |_| {});
    let overlapping = planned.server.addr().replace("0.0.0.0", "127.0.0.1");
    planned.plan(&format!("tcp 127.0.0.1:0\ntcp {overlapping}\n"));
    planned.server.fail_to_upgrade();
    planned.server.wait_any("it belongs to the inherited tcp 0.0.0.0:0, which is unclaimed");
}

// ---- moved ------------------------------------------------------------------------------------------------------

#[test]
fn a_unix_socket_whose_file_was_removed_is_reachable_again() {
    let mut planned = Planned::start("unix a.sock\nunix b.sock\n", |_| {});
    fs::remove_file(planned.dir.path().join("a.sock")).unwrap();
    planned.server.upgrade();
    assert_eq!(generation(&planned.unix("a.sock")), 2);
    planned.server.wait_any("no longer leads to the inherited socket: opened a new one");
    planned.server.wait_any("ended gen=1");
    assert_eq!(generation(&planned.unix("a.sock")), 2, "the old version leaves the new file alone");
    planned.server.upgrade();
    assert_eq!(generation(&planned.unix("a.sock")), 3);
}

#[test]
fn a_unix_socket_behind_a_link_that_was_moved_is_reachable_there() {
    let dir = tempdir();
    for release in ["r1", "r2"] {
        fs::create_dir(dir.path().join(release)).unwrap();
    }
    let (current, next) = (dir.path().join("current"), dir.path().join("next"));
    symlink("r1", &current).unwrap();
    let link = current.join("a.sock").display().to_string();
    // `join` keeps an absolute path as it is.
    let mut planned = Planned::start(&format!("unix {link}\n"), |_| {});
    assert_eq!(generation(&format!("unix:{link}")), 1);
    symlink("r2", &next).unwrap();
    fs::rename(&next, &current).unwrap();
    planned.server.upgrade();
    assert_eq!(generation(&format!("unix:{link}")), 2);
}

/// If another process has taken the path, the inherited socket is kept, and the log says why clients cannot reach it.
#[test]
fn a_unix_socket_whose_path_is_taken_is_kept() {
    let mut planned = Planned::start("unix a.sock\n", |_| {});
    let path = planned.dir.path().join("a.sock");
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    planned.server.upgrade();
    planned.server.wait_any("no longer leads to the inherited socket, and a new one cannot be opened: ");
    planned.server.upgrade();
}

// ---- exchanged --------------------------------------------------------------------------------------------------

#[test]
fn listeners_with_names_are_not_exchanged() {
    let mut planned = Planned::start("tcp 127.0.0.1:0 named=public\ntcp 127.0.0.1:0 named=admin\n", |_| {});
    let [public, admin] = &planned.server.addrs()[..] else { panic!("two listeners") };
    let at = |generation: u64, addr: &str| format!("listening {addr} gen={generation} ");
    let (public, admin) = (public.clone(), admin.clone());
    planned.plan("tcp 127.0.0.1:0 named=admin\ntcp 127.0.0.1:0 named=public\n");
    planned.server.upgrade();
    let said = planned.server.said();
    let position = |line: &str| said.iter().position(|said| said.starts_with(line)).unwrap();
    assert!(position(&at(2, &admin)) < position(&at(2, &public)));
    // Names may be removed and added.
    planned.plan("tcp 127.0.0.1:0 named=public\ntcp 127.0.0.1:0\n");
    planned.server.upgrade();
    let said = planned.server.said();
    let position = |line: &str| said.iter().position(|said| said.starts_with(line)).unwrap();
    assert!(position(&at(3, &public)) < position(&at(3, &admin)));
    // But a named listener never gets a socket with another name.
    planned.plan("tcp 127.0.0.1:0 named=public\ntcp 127.0.0.1:0 named=other\n");
    planned.server.upgrade();
    planned.plan("tcp 127.0.0.1:0 named=another\ntcp 127.0.0.1:0 named=other\n");
    planned.server.upgrade();
    planned.server.wait_any("the inherited tcp 127.0.0.1:0 named \"public\" is unclaimed");
}

#[test]
fn more_sockets_with_one_key_are_logged() {
    let mut planned = Planned::start("tcp 127.0.0.1:0\n", |_| {});
    planned.plan("tcp 127.0.0.1:0\ntcp 127.0.0.1:0\n");
    planned.server.upgrade();
    planned.server.wait_any("tcp 127.0.0.1:0: 2 sockets with this key, but the old version has 1");
}

// ---- taken over -------------------------------------------------------------------------------------------------

#[test]
fn an_application_hands_over_to_no_other() {
    let mut planned = Planned::start("tcp 127.0.0.1:0\n", |_| {});
    let path = planned.dir.path().join("takeover");
    let takeover = |app: Option<&str>| {
        let mut command = this_program("listeners::server");
        command.env("LISTENERS_DIR", planned.dir.path()).env("TAKEOVER", &path);
        app.map(|app| command.env("APP", app));
        command
    };
    let mut shop = Server::serving(takeover(Some("shop")));
    let addr = shop.addr();
    let mut blog = Server::start(takeover(Some("blog")));
    blog.wait("application \"shop\", not \"blog\"");
    shop.wait("log refused to hand over to application \"blog\"");
    assert_eq!(generation(&addr), 1);
    // An application without a name is not checked.
    let _unnamed = Server::serving(takeover(None));
    shop.wait("upgrade ok");
    assert_eq!(generation(&addr), 2);
    planned.server.upgrade();
}

/// In another container the path may not exist, although clients in the old container reach the socket by it.
#[test]
fn a_takeover_from_another_mount_namespace_keeps_the_sockets() {
    if !is_root() || !can_unshare(&["--mount"]) {
        return;
    }
    let dir = tempdir();
    fs::create_dir(dir.path().join("socks")).unwrap();
    fs::write(dir.path().join("plan"), "unix socks/a.sock\n").unwrap();
    let prepare = |command: &mut Command| {
        command.env("LISTENERS_DIR", dir.path()).env("TAKEOVER", dir.path().join("takeover"));
    };
    let mut command = this_program("listeners::server");
    prepare(&mut command);
    let mut old = Server::serving(command);
    let addr = format!("unix:{}", dir.path().join("socks/a.sock").display());
    assert_eq!(generation(&addr), 1);
    let inner = this_program("listeners::server");
    let mut command = Command::new("unshare");
    let hide = format!("mount -t tmpfs none '{}' && exec \"$0\" \"$@\"", dir.path().join("socks").display());
    command.args(["--mount", "--propagation", "private", "sh", "-c", &hide]).arg(inner.get_program());
    command.args(inner.get_args());
    prepare(&mut command);
    let _new = Server::serving(command);
    old.wait("ended gen=1");
    assert_eq!(generation(&addr), 2);
}
