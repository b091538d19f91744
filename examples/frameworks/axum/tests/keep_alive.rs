//! HTTP with keep-alive while the server is upgraded: no request fails. Needs the examples: run `cargo build --examples` in
//! the repository's root first.

#[path = "../../../../tests/support/mod.rs"]
mod support;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use support::{field, wait_exit, Server, SetOnDrop, DEADLINE};

fn server() -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ecdysis-axum"));
    command.arg("127.0.0.1:0");
    Server::serving(command)
}

struct Client(BufReader<TcpStream>);

struct Answer {
    body: String,
    close: bool,
}

impl Client {
    fn connect(addr: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    fn send(&mut self, path: &str) -> io::Result<()> {
        self.0.get_mut().write_all(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes())
    }

    fn receive(&mut self) -> io::Result<Answer> {
        let (mut length, mut close, mut line) = (0, false, String::new());
        self.0.read_line(&mut line)?;
        if line.trim_end() != "HTTP/1.1 200 OK" {
            return Err(io::Error::other(format!("answered {line:?}")));
        }
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            match line.trim_end().to_ascii_lowercase().split_once(": ") {
                Some(("content-length", value)) => length = value.parse().map_err(io::Error::other)?,
                Some(("connection", value)) => close = value == "close",
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(Answer { body: String::from_utf8(body).map_err(io::Error::other)?, close })
    }

    fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.send(path)?;
        self.receive()
    }
}

fn upgrade(server: &mut Server) {
    server.signal(rustix::process::Signal::HUP);
    // This server does not report the verdict, so wait for the end of the old process.
    server.wait("serving ");
}

#[test]
fn no_request_fails_over_upgrades() {
    const UPGRADES: usize = 10;
    let mut server = server();
    let (addr, stop) = (server.addr(), AtomicBool::new(false));
    server.wait("serving gen=1");
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        // Half of the clients send without a break. The others pause, but for less than the server's grace period.
        let clients: Vec<_> = (0..16)
            .map(|number| {
                let (addr, stop) = (&addr, &stop);
                scope.spawn(move || {
                    let (mut requests, mut closes, mut failures) = (0_u64, 0_u64, Vec::new());
                    let mut client = Client::connect(addr).unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        requests += 1;
                        if number % 2 == 1 {
                            thread::sleep(Duration::from_millis(requests * 37 % 200));
                        }
                        let close = client.get("/").map(|answer| answer.close);
                        match close {
                            Ok(false) => continue,
                            Ok(true) => closes += 1,
                            Err(error) => failures.push(error.to_string()),
                        }
                        client = Client::connect(addr).unwrap();
                    }
                    (requests, closes, failures)
                })
            })
            .collect();
        for _ in 0..UPGRADES {
            let old = server.pid();
            upgrade(&mut server);
            wait_exit(old);
        }
        stop.store(true, Ordering::Relaxed);
        let (mut requests, mut closes) = (0, 0);
        for client in clients {
            let (sent, closed, failures) = client.join().unwrap();
            assert!(failures.is_empty(), "of {sent} requests {} failed: {failures:?}", failures.len());
            requests += sent;
            closes += closed;
        }
        // At every upgrade, every connection got a response that announced its end.
        assert!(closes >= UPGRADES as u64, "{closes}");
        println!("{requests} requests over {UPGRADES} upgrades, {closes} connections closed, none failed");
    });
}

/// Upgrades from this server to one with threads, whose ecdysis is built with other features, and back.
#[test]
fn hands_over_to_threads_with_other_features_and_back() {
    let dir = support::tempdir();
    let current = dir.path().join("current");
    // Their arguments differ, but each generation passes its own arguments to the next, so a script sets them.
    let install = |command: &str| {
        let script = format!("#!/bin/bash\nexec -a \"$0\" {command}\n");
        let by = "printf %s \"$1\" >\"$0.new\" && chmod +x \"$0.new\" && mv \"$0.new\" \"$0\"";
        assert!(Command::new("sh").args(["-c", by]).arg(&current).arg(script).status().unwrap().success());
    };
    let axum = format!("{} 127.0.0.1:0", env!("CARGO_BIN_EXE_ecdysis-axum"));
    let whoami = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../target/debug/examples/whoami");
    let threads = format!("{} --listen 127.0.0.1:0 --probation 20", whoami.display());
    install(&axum);
    let mut server = Server::serving(Command::new(&current));
    for (gen, next) in (2..=5).zip([&threads, &axum].into_iter().cycle()) {
        install(next);
        let old = server.pid();
        server.signal(rustix::process::Signal::HUP);
        server.wait(&format!("serving gen={gen}"));
        wait_exit(old);
        let answered = match next {
            next if *next == axum => field(&Client::connect(&server.addr()).unwrap().get("/").unwrap().body, "gen"),
            _ => support::generation(&server.addr()),
        };
        assert_eq!(answered, gen);
    }
}

#[test]
fn idle_connections_end_and_running_requests_finish() {
    let mut server = server();
    server.wait("serving gen=1");
    let (mut idle, mut between, mut running) = (
        Client::connect(&server.addr()).unwrap(),
        Client::connect(&server.addr()).unwrap(),
        Client::connect(&server.addr()).unwrap(),
    );
    for client in [&mut idle, &mut between] {
        assert!(!client.get("/").unwrap().close);
    }
    running.send("/slow/3000").unwrap();
    let old = server.pid();
    upgrade(&mut server);
    // Whether the probation still runs or has just ended, the process that has the connection answers.
    assert_eq!(field::<u64>(&between.get("/").unwrap().body, "gen"), 1);

    let mut nothing = Vec::new();
    idle.0.read_to_end(&mut nothing).unwrap();
    assert!(nothing.is_empty());
    assert_eq!(field::<u64>(&Client::connect(&server.addr()).unwrap().get("/").unwrap().body, "gen"), 2);
    let answer = running.receive().unwrap();
    assert!(answer.close && answer.body.ends_with(" slow\n"), "{}", answer.body);
    assert_eq!(field::<u64>(&answer.body, "gen"), 1);
    let ended = server.wait("ended gen=1");
    assert!(ended.contains("left=false"), "{ended}");
    wait_exit(old);
}
