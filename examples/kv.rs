//! An in-memory key-value server. An upgrade keeps every connection and every value.
//!
//!     cargo run --example kv                          # or: kv 127.0.0.1:7071 /tmp/kv.control
//!     nc 127.0.0.1 7070                               # in a second terminal: set a 1 → ok; get a → 1; version → 1
//!     kill -HUP 4711                                  # in a third, with the PID that the server has printed: the upgrade
//!
//! Type `get a` and `version` into the `nc` that is still open: it answers 1 and 2. The second argument is a control socket
//! for `--example ctl`.
//!
//! If it is built with `--features systemd` and runs in a unit with `FileDescriptorStoreMax=`, `systemctl restart`
//! keeps them too.
//!
//! The handed-over state is exact because no request runs between the snapshot and the end of this process. Every request,
//! and every accept, locks `turn` for reading and then checks whether this process still serves. The snapshot locks it for
//! writing. If the new process fails, the pause ends, and the threads here continue.

mod support;

use ecdysis::{Ecdysis, Key, Shutdown, Sockets};
use rustix::event::{poll, PollFd, PollFlags};
use std::collections::HashMap;
use std::error::Error;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use std::{env, process, thread};
use support::{help, say};

/// The longest request.
const LONGEST: usize = 64 << 10;

/// How long a client may leave an answer unread. The commit waits for this, so it must be shorter than a commit may take.
const PATIENCE: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    help(include_str!("kv.rs"));
    let mut args = env::args().skip(1);
    let address: SocketAddr = args.next().as_deref().unwrap_or("127.0.0.1:7070").parse()?;
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM).stop_on_signal(libc::SIGINT);
    if let Some(path) = args.next() {
        builder.control_on_socket(path);
    }
    #[cfg(feature = "systemd")]
    builder.systemd_notify(true).systemd_sockets(true).systemd_keep_passed(true);

    let starting = builder.start()?;
    let listener = starting.listen_tcp(address)?;
    let whoami = format!("gen={} pid={}", starting.generation(), process::id());
    say(format_args!("listening {} {whoami}", listener.local_addr()?));

    let server = Arc::new(Server {
        generation: starting.generation(),
        shutdown: starting.shutdown(),
        sockets: (*starting).clone(),
        turn: RwLock::default(),
        kept: Mutex::default(),
    });
    starting.pass_bytes_at_commit("state", {
        let server = server.clone();
        move || server.snapshot()
    })?;
    let ecdysis = starting.ready()?;
    server.inherit()?;
    thread::spawn({
        let server = server.clone();
        move || server.accept(&listener)
    });
    say(format_args!("serving {whoami}"));

    let exit = ecdysis.run()?;
    say(format_args!("ended {whoami} {exit}"));
    Ok(())
}

struct Server {
    generation: u64,
    shutdown: Shutdown,
    sockets: Sockets,
    turn: RwLock<()>,
    kept: Mutex<Kept>,
}

/// The state that survives an upgrade.
#[derive(Default)]
struct Kept {
    values: HashMap<String, String>,
    connections: HashMap<u64, Arc<Connection>>,
    last: u64,
}

struct Connection {
    stream: TcpStream,
    /// The start of an incomplete request.
    received: Mutex<Vec<u8>>,
}

impl Server {
    /// Accepts until this process is over. `Shutdown::accept` could return a connection after the snapshot was taken.
    /// Here no pause can begin between the accept and the connection's entry in the list.
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while self.readable_in_turn(listener) {
            let _turn = self.turn.read().unwrap();
            if !self.serves() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => self.keep(stream, Vec::new()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // Out of descriptors or memory: the connection waits in the queue.
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Adds an accepted or inherited connection to the list, and starts its thread.
    fn keep(self: &Arc<Self>, stream: TcpStream, received: Vec<u8>) {
        let connection = Arc::new(Connection { stream, received: Mutex::new(received) });
        let mut kept = self.kept.lock().unwrap();
        kept.last += 1;
        let (server, id) = (self.clone(), kept.last);
        kept.connections.insert(id, connection.clone());
        drop(kept);
        thread::spawn(move || {
            // An error means that the client ended the connection. When this process ends, `serve` returns Ok, and the
            // connection continues in the next generation.
            if server.serve(&connection).is_err() {
                server.kept.lock().unwrap().connections.remove(&id);
                server.sockets.retire(&Key::stream(id.to_string()));
            }
        });
    }

    fn serve(&self, connection: &Connection) -> io::Result<()> {
        let mut stream = &connection.stream;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        while self.readable_in_turn(stream) {
            let _turn = self.turn.read().unwrap();
            if !self.serves() {
                continue;
            }
            let (mut received, mut chunk) = (connection.received.lock().unwrap(), [0; 4096]);
            match stream.read(&mut chunk)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                length => received.extend_from_slice(&chunk[..length]),
            }
            while let Some(end) = received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = received.drain(..=end).collect();
                let answer = self.answer(String::from_utf8_lossy(&line).trim_end());
                stream.write_all(format!("{answer}\n").as_bytes())?;
            }
            if received.len() > LONGEST {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }

    /// Whether a request may run. Check the pause first, because the end follows the pause: in the other order, a thread that
    /// sleeps between the two checks could miss both, and a value that it then set would be lost.
    fn serves(&self) -> bool {
        !self.shutdown.is_paused() && !self.shutdown.is_over()
    }

    /// Blocks until `fd` is readable and this process serves. Returns false once it no longer serves.
    fn readable_in_turn(&self, fd: impl AsFd) -> bool {
        while self.shutdown.wait_accepting() {
            let mut fds =
                [PollFd::new(&fd, PollFlags::IN), PollFd::from_borrowed_fd(self.shutdown.gate(), PollFlags::IN)];
            if poll(&mut fds, None).is_ok() && !fds[0].revents().is_empty() {
                return true;
            }
        }
        false
    }

    fn answer(&self, request: &str) -> String {
        let values = &mut self.kept.lock().unwrap().values;
        match request.splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["set", key, value] => {
                values.insert(key.into(), value.into());
                "ok".into()
            }
            ["get", key] => values.get(key).cloned().unwrap_or_default(),
            ["count"] => values.len().to_string(),
            ["version"] => self.generation.to_string(),
            _ => "set KEY VALUE, get KEY, count, or version".into(),
        }
    }

    /// Hands over every connection, and returns every value and every incomplete request. Runs between the pause and the
    /// commit.
    fn snapshot(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        let _all_turns = self.turn.write().unwrap();
        let (kept, mut state) = (self.kept.lock().unwrap(), Vec::new());
        // The values come first, because the next generation serves each connection as soon as it has read it.
        for (key, value) in &kept.values {
            writeln!(state, "set {key} {value}")?;
        }
        for (id, connection) in &kept.connections {
            let received = connection.received.lock().unwrap();
            self.sockets.pass_stream(id.to_string(), &connection.stream)?;
            writeln!(state, "connection {id} {}", received.len())?;
            state.extend_from_slice(&received);
        }
        Ok(state)
    }

    /// Restores the snapshot in the next generation.
    fn inherit(self: &Arc<Self>) -> Result<(), Box<dyn Error>> {
        let state = self.sockets.take_bytes("state")?.unwrap_or_default();
        let (mut state, mut line) = (&state[..], String::new());
        while state.read_line(&mut line)? > 0 {
            match line.trim_end_matches('\n').splitn(3, ' ').collect::<Vec<_>>()[..] {
                ["connection", id, length] => {
                    let mut received = vec![0; length.parse()?];
                    state.read_exact(&mut received)?;
                    // None if the connection ended just then.
                    if let Some(stream) = self.sockets.take_stream(id)? {
                        self.keep(stream, received);
                    }
                }
                ["set", key, value] => drop(self.kept.lock().unwrap().values.insert(key.into(), value.into())),
                _ => return Err(format!("unknown state: {line:?}").into()),
            }
            line.clear();
        }
        Ok(())
    }
}
