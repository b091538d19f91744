//! Runs the examples as a new user would: starts them, follows the comments at their top, and upgrades them under load.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

use crate::support::*;
use serde_json::{json, Value};

#[test]
fn each_answers_help() {
    let mut all = vec!["ctl", "demo", "echo", "hold", "http", "kv", "takeover", "udp", "whoami"];
    if cfg!(feature = "tokio_ecdysis") {
        all.extend(["tokio_echo", "tokio_whoami"]);
    }
    for name in all {
        let output = output(Command::new(example(name)).arg("--help"));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.lines().count() > 3, "{name}: {text}");
    }
}

// ---- ctl ----

/// Returns the exit code, stdout and stderr of `ctl SOCKET WORDS...`.
fn ctl(socket: &Path, words: &[&str]) -> (i32, String, String) {
    ended(start_ctl(socket, words))
}

fn start_ctl(socket: &Path, words: &[&str]) -> Child {
    let mut command = Command::new(example("ctl"));
    command.arg(socket).args(words).args(["--timeout", &DEADLINE.as_secs().to_string()]);
    guard::mark(&mut command, 0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(mut ctl: Child) -> (i32, String, String) {
    wait(&mut ctl);
    let output = ctl.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn ctl_json(socket: &Path, command: &str) -> Value {
    let (code, out, err) = ctl(socket, &[command, "--json"]);
    assert_eq!((err.as_str(), out.matches('\n').count()), ("", 1), "{out}");
    let value: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(value["exit"], code);
    value
}

#[track_caller]
fn ctl_upgrades(socket: &Path) {
    let (code, out, err) = ctl(socket, &["upgrade"]);
    assert!(code == 0 && out.starts_with("upgraded: generation "), "{code} {out} {err}");
}

#[test]
fn ctl_tells_the_outcome_in_words_in_json_and_by_its_exit_code() {
    let dir = tempdir();
    let (socket, how) = (dir.path().join("control"), dir.path().join("how"));
    let mut command = Command::new(example("whoami"));
    command.args(["--listen", "127.0.0.1:0", "--probation", "20", "--control-socket"]).arg(&socket);
    command.arg("--misbehave").arg(&how);
    let server = Server::serving(command);

    let (code, out, _) = ctl(&socket, &["status"]);
    let start = format!("pid {}, generation 1, up ", server.pid());
    assert!(code == 0 && out.starts_with(&start) && out.ends_with("\n  tcp 127.0.0.1:0\n"), "{code} {out}");
    let status = ctl_json(&socket, "status");
    let part = |name: &str| status[name].clone();
    assert_eq!((part("pid"), part("phase")), (json!(server.pid()), json!("serving")));
    let sockets = [format!("unix {}", socket.display()), "tcp 127.0.0.1:0".into()];
    assert_eq!((part("sockets"), part("draining")), (json!(sockets), json!([])));

    ctl_upgrades(&socket);
    server.wait_serving();
    let upgraded = ctl_json(&socket, "upgrade");
    server.wait_serving();
    assert_eq!((&upgraded["outcome"], &upgraded["generation"]), (&json!("upgraded"), &json!(3)));
    assert_eq!(upgraded["pid"], server.pid());

    fs::write(&how, "refuse=not today").unwrap();
    let (code, _, err) = ctl(&socket, &["upgrade"]);
    assert!(code == 1 && err.starts_with("ctl: failed: ") && err.contains("not today"), "{code} {err}");
    assert_eq!(ctl_json(&socket, "upgrade")["outcome"], "failed");

    fs::write(&how, "hang").unwrap();
    let pid = server.pid();
    let hanging = start_ctl(&socket, &["upgrade"]);
    eventually("there is a child", || !children(pid).is_empty());
    assert_eq!(ctl(&socket, &["upgrade"]).0, 2);
    assert_eq!(ctl_json(&socket, "status")["phase"], "upgrading");

    assert_eq!(ctl_json(&socket, "stop")["outcome"], "stopped");
    // The kernel closes the connection shortly before the process is gone.
    wait_exit(pid);
    let (code, _, err) = ended(hanging);
    assert_eq!((code, err.as_str()), (2, "ctl: the server is stopping\n"));
    server.wait_all_ended();
    assert_eq!(ctl(&socket, &["status"]).0, 3);
}

#[test]
fn ctl_gives_up_on_a_server_that_does_not_answer_and_on_wrong_usage() {
    let dir = tempdir();
    let socket = dir.path().join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let mute = output(Command::new(example("ctl")).arg(&socket).args(["upgrade", "--timeout", "0.05"]));
    assert_eq!(mute.status.code(), Some(4), "{mute:?}");
    readable(&listener, "ctl connects");
    drop(listener.accept().unwrap());

    let closing = start_ctl(&socket, &["upgrade"]);
    readable(&listener, "ctl connects");
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 8]).unwrap();
    drop(stream);
    let (code, _, err) = ended(closing);
    assert!(code == 4 && err.starts_with("ctl: no answer"), "{code} {err}");

    // It also gives up if the server does not accept. With this queue length the second connect waits.
    rustix::net::listen(&listener, 0).unwrap();
    let _queued = UnixStream::connect(&socket).unwrap();
    let full = output(Command::new(example("ctl")).arg(&socket).args(["status", "--timeout", "0.05"]));
    assert_eq!(full.status.code(), Some(4), "{full:?}");

    for wrong in [&["dance"][..], &[], &["stop", "now"], &["stop", "--timeout", "-1"], &["stop", "--fast"]] {
        let (code, out, err) = ctl(&socket, wrong);
        assert!(code == 2 && out.is_empty() && err.contains("usage: ctl"), "{wrong:?}: {code} {out} {err}");
    }
}

// ---- http ----

/// `http` with a control socket, run from a copy of the program, which the test can replace.
struct Http {
    server: Server,
    addr: String,
    control: PathBuf,
    program: PathBuf,
    _dir: TempDir,
}

impl Http {
    fn start() -> Self {
        let dir = tempdir();
        let (control, program) = (dir.path().join("control"), dir.path().join("http"));
        install("http", &program);
        let mut command = Command::new(&program);
        command.arg("127.0.0.1:0").arg(&control);
        let server = Server::serving(command);
        Self { addr: server.addr(), server, control, program, _dir: dir }
    }

    fn get(&self, path: &str) -> Answer {
        Client::new(&self.addr).unwrap().get(path).unwrap()
    }

    /// Returns the value of a metric.
    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }
}

/// A keep-alive connection.
struct Client(BufReader<TcpStream>);

#[derive(Debug)]
struct Answer {
    status: String,
    closes: bool,
    body: String,
}

impl Client {
    fn new(addr: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    fn say(&mut self, text: &str) -> io::Result<()> {
        self.0.get_mut().write_all(text.as_bytes())
    }

    fn hear(&mut self) -> io::Result<Answer> {
        let mut line = || {
            let mut line = String::new();
            match self.0.read_line(&mut line)? {
                0 => Err(io::Error::from(ErrorKind::UnexpectedEof)),
                _ => Ok(line.trim_end().to_owned()),
            }
        };
        let status = line()?.strip_prefix("HTTP/1.1 ").expect("an HTTP status line").to_owned();
        let (mut closes, mut length) = (false, 0);
        loop {
            match line()?.split_once(": ") {
                None => break,
                Some(("Connection", value)) => closes = value == "close",
                Some(("Content-Length", value)) => length = value.parse().unwrap(),
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(Answer { status, closes, body: String::from_utf8(body).unwrap() })
    }

    fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.say(&format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"))?;
        self.hear()
    }

    /// Whether the server has closed the connection without sending more.
    fn closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

#[test]
fn http_keeps_every_request_of_keep_alive_clients_through_upgrades_and_counts_them() {
    let http = Http::start();
    let stop = Arc::new(AtomicBool::new(false));
    // The newest generation that has answered each client.
    let seen: Arc<[AtomicU64; 4]> = Arc::default();
    let clients: Vec<_> = (0..4)
        .map(|number| {
            let (addr, stop, seen) = (http.addr.clone(), stop.clone(), seen.clone());
            thread::spawn(move || {
                let (mut generations, mut requests, mut connections) = (BTreeSet::new(), 0_u64, 0_u64);
                while !stop.load(Ordering::Relaxed) {
                    let mut client = Client::new(&addr).unwrap();
                    connections += 1;
                    while !stop.load(Ordering::Relaxed) {
                        let answer = client.get("/").unwrap();
                        requests += 1;
                        let generation = field(&answer.body, "gen");
                        generations.insert(generation);
                        seen[number].store(generation, Ordering::Relaxed);
                        if answer.closes {
                            break;
                        }
                    }
                }
                (generations, requests, connections)
            })
        })
        .collect();
    let each_has_seen = |generation| {
        let newest = || seen.iter().all(|newest| newest.load(Ordering::Relaxed) == generation);
        eventually("each client is answered by the newest generation", newest);
    };
    each_has_seen(1);
    for generation in 2..=4 {
        ctl_upgrades(&http.control);
        // From here on the new generation answers new connections and requests for metrics.
        assert_eq!(http.metric("ecdysis_generation"), generation as f64);
        assert_eq!(http.metric("ecdysis_upgrades_total{outcome=\"ok\"}"), (generation - 1) as f64);
        each_has_seen(generation);
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let (generations, requests, connections) = client.join().expect("no request may fail");
        assert!(generations.into_iter().eq(1..=4) && requests > connections, "{requests} {connections}");
    }

    // A file that is not a program cannot be executed, and the metrics count the failed upgrade.
    fs::remove_file(&http.program).unwrap();
    fs::write(&http.program, "not a program").unwrap();
    let (code, _, err) = ctl(&http.control, &["upgrade"]);
    assert!(code == 1, "{code} {err}");
    assert_eq!(http.metric("ecdysis_upgrades_total{outcome=\"failed\"}"), 1.0);
    fs::remove_file(&http.program).unwrap();
    install("http", &http.program);
    ctl_upgrades(&http.control);
    assert_eq!(http.metric("ecdysis_upgrades_total{outcome=\"failed\"}"), 1.0);
    assert_eq!(http.metric("ecdysis_upgrades_total{outcome=\"ok\"}"), 4.0);
    let commit = http.metric("ecdysis_commit_seconds");
    assert!(commit > 0.0 && commit < DEADLINE.as_secs_f64(), "{commit}");
    assert!(http.metric("ecdysis_connections") >= 1.0 && http.metric("http_requests_total") >= 1.0);

    assert_eq!(ctl(&http.control, &["stop"]).0, 0);
    http.server.wait_all_ended();
    assert!(http.server.said().iter().filter(|line| line.starts_with("ended ")).all(|line| line.contains("left=0")));
}

#[test]
fn http_answers_what_has_begun_and_closes_what_is_idle_at_the_upgrade() {
    let mut http = Http::start();
    let mut clients: Vec<_> = (0..3).map(|_| Client::new(&http.addr).unwrap()).collect();
    for client in &mut clients {
        let answer = client.get("/").unwrap();
        assert!(answer.status == "200 OK" && !answer.closes, "{answer:?}");
    }
    let [begun, idle, unused] = &mut clients[..] else { unreachable!() };
    begun.say("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhe").unwrap();
    ctl_upgrades(&http.control);

    // When these connections end, generation 1 has noticed that it is over.
    assert!(idle.closed() && unused.closed());
    begun.say("llo").unwrap();
    let answer = begun.hear().unwrap();
    assert!(answer.closes && field::<u64>(&answer.body, "gen") == 1, "{answer:?}");
    assert!(begun.closed());
    drop(clients);
    assert!(http.server.wait("ended gen=1").contains("left=0"));
    assert_eq!(field::<u64>(&http.get("/").body, "gen"), 2);
}

#[test]
fn http_rejects_malformed_requests() {
    let http = Http::start();
    let mut client = Client::new(&http.addr).unwrap();
    client.say("GET / HTTP/1.1\r\n\r\nHEAD /metrics HTTP/1.1\r\nConnection: x, close\r\n\r\n").unwrap();
    assert!(!client.hear().unwrap().closes);
    let mut head = String::new();
    client.0.read_to_string(&mut head).unwrap();
    assert!(head.contains("Connection: close\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    for (request, status) in [
        ("GET /nowhere HTTP/1.0\r\n\r\n", "404 Not Found"),
        ("PUT /metrics HTTP/1.0\r\n\r\n", "405 Method Not Allowed"),
        ("nonsense\r\n\r\n", "400 Bad Request"),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "400 Bad Request"),
        ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", "400 Bad Request"),
        ("GET / HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", "413 Content Too Large"),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "501 Not Implemented"),
        (&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000)), "431 Request Header Fields Too Large"),
    ] {
        let mut client = Client::new(&http.addr).unwrap();
        client.say(request).unwrap();
        let answer = client.hear().unwrap();
        assert!(answer.closes && answer.status == status, "{request}: {answer:?}");
        assert!(client.closed(), "{request}");
    }
}

// ---- udp ----

#[test]
fn udp_answers_every_datagram_through_upgrades() {
    let dir = tempdir();
    let control = dir.path().join("control");
    let mut command = Command::new(example("udp"));
    command.arg("127.0.0.1:0").arg(&control);
    let server = Server::serving(command);
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicU64::new(0));
    let client = thread::spawn({
        let (addr, stop, seen) = (server.addr(), stop.clone(), seen.clone());
        move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(addr).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            let (mut generations, mut answer) = (BTreeSet::new(), [0; 100]);
            for number in 0_u64.. {
                socket.send(format!("number={number}").as_bytes()).unwrap();
                let length = socket.recv(&mut answer).expect("every datagram is answered");
                let answer = std::str::from_utf8(&answer[..length]).unwrap();
                assert_eq!(field::<u64>(answer, "number"), number);
                let generation = field(answer, "gen");
                generations.insert(generation);
                seen.store(generation, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            generations
        }
    });
    let has_seen = |generation| eventually("it is answered", || seen.load(Ordering::Relaxed) == generation);
    has_seen(1);
    for generation in 2..=4 {
        ctl_upgrades(&control);
        has_seen(generation);
    }
    stop.store(true, Ordering::Relaxed);
    let generations = client.join().unwrap();
    assert!(generations.into_iter().eq(1..=4));
    assert_eq!(ctl(&control, &["stop"]).0, 0);
    server.wait_all_ended();
}
