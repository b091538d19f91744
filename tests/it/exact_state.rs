//! State and connections that are handed over at the commit: over pipes, over a socket and in a takeover.
//!
//! The server is this test program itself: it runs the test `server` when its environment says so. It numbers the lines
//! that it receives across all generations, and keeps its connections across an upgrade.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{self, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::support::*;
use ecdysis::{Ecdysis, Event, Key, Readable, Shutdown, Sockets, Transport};
use rustix::process::Signal;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The number of descriptors beside the connections: more than fit into one message.
const BATCH: usize = 300;

// ---- the server -------------------------------------------------------------------------------------------------

/// Not a test: the server that the tests below start.
#[test]
fn server() {
    let Ok(dir) = env::var("EXACT_DIR") else { return };
    if let Err(e) = serve(&dir) {
        say(format!("failed: {e}"));
        process::exit(1);
    }
    process::exit(0);
}

fn say(line: String) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[derive(Default)]
struct State {
    lines: u64,
    connections: BTreeMap<String, TcpStream>,
}

fn serve(dir: &str) -> Result<()> {
    let exists = |name: &str| fs::exists(format!("{dir}/{name}")).unwrap();
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM).probation(Duration::from_millis(50));
    builder.on_event(|event| match event {
        Event::Upgraded(new) => say(format!("upgrade ok pid={} gen={}", new.pid, new.generation)),
        Event::UpgradeFailed { error, .. } => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            say(format!("upgrade failed: {error}{cause}"));
        }
        _ => {}
    });
    match env::var("CARRIER").as_deref() {
        Ok("socket") => builder.transport(Transport::Socket),
        Ok("takeover") => builder.take_over(format!("{dir}/takeover")).takeover_on_socket(format!("{dir}/takeover")),
        _ => &mut builder,
    };
    let starting = builder.start()?;
    let generation = starting.generation();
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    say(format!("listening {} gen={generation} pid={}", listener.local_addr()?, process::id()));
    let state = Arc::new(Mutex::new(State::default()));
    let eventfd = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    starting.pass_fd("early", eventfd())?;
    starting.pass_bytes_at_commit("lines", {
        let (sockets, state, dir) = ((*starting).clone(), state.clone(), dir.to_owned());
        move || {
            if fs::exists(format!("{dir}/hang")).unwrap() {
                // Longer than the library waits for a callback.
                thread::sleep(DEADLINE);
            }
            if fs::exists(format!("{dir}/fail")).unwrap() {
                return Err("as planned");
            }
            // Every line that was read has been answered, because both happen under this lock.
            let state = state.lock().unwrap();
            for (name, stream) in &state.connections {
                sockets.pass_stream(name, stream).unwrap();
            }
            for at in 0..BATCH {
                sockets.pass_fd(format!("fd-{at}"), fs::File::open("/dev/null").unwrap()).unwrap();
            }
            // It shares its inode with the early one.
            sockets.pass_fd("late", eventfd()).unwrap();
            Ok(state.lines.to_string().into_bytes())
        }
    })?;
    if exists("wait") {
        say(format!("waiting gen={generation}"));
        eventually("it may continue", || exists("go"));
    }
    assert_eq!(starting.take_bytes("lines")?, None, "not before the commit");
    let shutdown = starting.shutdown();
    let server = starting.ready()?;
    match server.take_bytes("lines") {
        Ok(bytes) => {
            let fds = server.inherited().iter().filter(|key| key.to_string().starts_with("fd ")).count();
            let streams: Vec<Key> =
                server.inherited().into_iter().filter(|key| key.to_string().starts_with("stream ")).collect();
            say(format!("got gen={generation} state={} fds={fds} streams={}", bytes.is_some(), streams.len()));
            state.lock().unwrap().lines = bytes.map_or(Ok(0), |bytes| String::from_utf8_lossy(&bytes).parse())?;
            for key in streams {
                let name = key.name().to_str().unwrap().to_owned();
                let stream = server.take_stream::<TcpStream>(&name)?.unwrap();
                keep(name, stream, generation, &shutdown, &server, &state);
            }
        }
        Err(e) => say(format!("incomplete gen={generation}: {e}")),
    }
    say(format!("serving gen={generation} pid={}", process::id()));
    thread::spawn({
        let (shutdown, server, state) = (shutdown.clone(), server.clone(), state.clone());
        move || {
            for stream in shutdown.incoming(&listener).flatten() {
                let name = format!("{generation}-{}", stream.peer_addr().unwrap());
                keep(name, stream, generation, &shutdown, &server, &state);
            }
        }
    });
    server.run()?;
    shutdown.drain(Duration::from_secs(30));
    say(format!("ended gen={generation}"));
    Ok(())
}

/// Serves a connection until its end, or until this generation is over.
fn keep(
    name: String,
    stream: TcpStream,
    generation: u64,
    shutdown: &Shutdown,
    sockets: &Sockets,
    state: &Arc<Mutex<State>>,
) {
    state.lock().unwrap().connections.insert(name.clone(), stream.try_clone().unwrap());
    let (shutdown, sockets, state) = (shutdown.clone(), sockets.clone(), state.clone());
    thread::spawn(move || {
        let mut lines = BufReader::new(stream);
        loop {
            match shutdown.readable(lines.get_ref(), None) {
                Ok(Readable::Ready) => {}
                _ => return,
            }
            let mut state = state.lock().unwrap();
            // During the pause and after an upgrade, the connection belongs to the child.
            if shutdown.is_paused() || shutdown.is_over() {
                drop(state);
                if shutdown.wait_accepting() {
                    continue;
                }
                return;
            }
            if !matches!(lines.read_line(&mut String::new()), Ok(1..)) {
                state.connections.remove(&name);
                sockets.retire(&Key::stream(&name));
                return;
            }
            state.lines += 1;
            let answer = format!("gen={generation} n={}\n", state.lines);
            let _ = lines.get_mut().write_all(answer.as_bytes());
        }
    });
}

// ---- the tests --------------------------------------------------------------------------------------------------

struct Exact {
    server: Server,
    dir: TempDir,
    carrier: String,
}

impl Exact {
    fn command(dir: &TempDir, carrier: &str) -> Command {
        let mut command = this_program("exact_state::server");
        command.env("EXACT_DIR", dir.path()).env("CARRIER", carrier);
        command
    }

    fn start(carrier: &str) -> Self {
        let dir = tempdir();
        Self { server: Server::serving(Self::command(&dir, carrier)), dir, carrier: carrier.to_owned() }
    }

    fn touch(&self, name: &str) {
        fs::write(self.dir.path().join(name), "").unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }
}

/// A client with a persistent connection.
struct Client(BufReader<TcpStream>);

impl Client {
    fn new(addr: &str) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// Returns the generation and the number in the answer.
    fn ask(&mut self) -> (u64, u64) {
        self.0.get_mut().write_all(b"line\n").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        (field(&answer, "gen"), field(answer.trim(), "n"))
    }
}

fn passes_everything(carrier: &str) {
    let mut exact = Exact::start(carrier);
    let addr = exact.server.addr();
    let mut early = Client::new(&addr);
    assert_eq!(early.ask(), (1, 1));
    // Start the next version. State that was produced at its start is outdated when it becomes ready.
    exact.touch("wait");
    let mut second = None;
    if exact.carrier == "takeover" {
        let mut server = Server::start(Exact::command(&exact.dir, carrier));
        server.wait("waiting gen=2");
        second = Some(server);
    } else {
        exact.server.signal(Signal::HUP);
        exact.server.wait("waiting gen=2");
    }
    let mut late = Client::new(&addr);
    assert_eq!((late.ask(), early.ask()), ((1, 2), (1, 3)));
    exact.touch("go");
    exact.server.wait("upgrade ok");
    let new = second.as_ref().unwrap_or(&exact.server);
    new.wait_any(&format!("got gen=2 state=true fds={} streams=2", BATCH + 1));
    assert_eq!((late.ask(), early.ask()), ((2, 4), (2, 5)));
    assert_eq!(Client::new(&addr).ask(), (2, 6));
}

#[test]
fn what_is_passed_at_the_commit_is_exact_over_pipes() {
    passes_everything("pipes");
}

#[test]
fn what_is_passed_at_the_commit_is_exact_over_a_socket() {
    passes_everything("socket");
}

#[test]
fn what_is_passed_at_the_commit_is_exact_in_a_takeover() {
    passes_everything("takeover");
}

#[test]
fn a_callback_that_fails_or_hangs_is_a_failed_upgrade() {
    let mut exact = Exact::start("pipes");
    let mut client = Client::new(&exact.server.addr());
    assert_eq!(client.ask(), (1, 1));
    for (how, reason) in [("fail", "as planned"), ("hang", "took longer than 3s")] {
        exact.touch(how);
        exact.server.signal(Signal::HUP);
        let failed = exact.server.wait("upgrade failed");
        assert!(failed.contains("lines") && failed.contains(reason), "{failed}");
        exact.remove(how);
        client.ask();
    }
    exact.server.upgrade();
    assert_eq!(client.ask(), (2, 4));
}

#[test]
fn state_that_a_limit_on_files_forbids_is_a_failed_upgrade() {
    let mut exact = Exact::start("pipes");
    let mut client = Client::new(&exact.server.addr());
    limit_files(&exact.server);
    let failed = exact.server.fail_to_upgrade();
    assert!(failed.contains("lines") && failed.contains("File too large"), "{failed}");
    assert_eq!(client.ask(), (1, 1));
}

/// If the parent is stopped before the commit, it passes nothing. The child reports that and does not start with empty
/// state.
#[test]
fn what_a_parent_did_not_pass_is_an_error() {
    let mut exact = Exact::start("pipes");
    let parent = exact.server.first_pid();
    exact.touch("wait");
    exact.server.signal(Signal::HUP);
    exact.server.wait("waiting gen=2");
    freeze(parent);
    exact.touch("go");
    exact.server.wait("incomplete gen=2: cannot open socket bytes lines");
    send_signal(parent, Signal::CONT);
}
