//! `examples/kv`: connections and values survive the processes that served them.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustix::process::Signal;

use crate::support::*;

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(server.addr()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn receive(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.strip_suffix('\n').expect("the connection ended").to_owned()
    }

    fn ask(&mut self, request: &str) -> String {
        self.send(&format!("{request}\n"));
        self.receive()
    }
}

fn kv() -> Server {
    let mut command = Command::new(example("kv"));
    command.arg("127.0.0.1:0");
    let mut server = Server::serving(command);
    // So that each upgrade waits for its own line, and not for that of the version before.
    server.wait("serving ");
    server
}

fn upgrade(server: &mut Server) {
    let old = server.pid();
    server.signal(Signal::HUP);
    server.wait("serving ");
    wait_exit(old);
}

#[test]
fn connections_and_values_live_through_ten_versions() {
    const VERSIONS: usize = 10;
    const CLIENTS: usize = 8;
    let mut server = kv();
    let stop = AtomicBool::new(false);
    // No client sends its first requests so late that version 2 answers them.
    let begun = AtomicUsize::new(0);
    let mut patient = Client::connect(&server);
    // Half a request now, and the second half ten versions later.
    patient.send("set pat");
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (begun, stop, mut client) = (&begun, &stop, Client::connect(&server));
                scope.spawn(move || {
                    let mut versions = vec![];
                    for count in 0.. {
                        // Its value before the requests: the last ones are for the last version.
                        let is_last = stop.load(Ordering::Relaxed);
                        assert_eq!(client.ask(&format!("set key-{number} {count}")), "ok");
                        // Two pipelined requests in one packet. A snapshot may happen between them.
                        client.send(&format!("get key-{number}\nversion\n"));
                        assert_eq!(client.receive(), count.to_string(), "a value was lost");
                        versions.push(client.receive().parse::<usize>().unwrap());
                        if is_last {
                            return (count + 1, versions);
                        }
                        if count == 0 {
                            begun.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    unreachable!()
                })
            })
            .collect();
        eventually("each client was answered", || begun.load(Ordering::Relaxed) == CLIENTS);
        for _ in 1..VERSIONS {
            upgrade(&mut server);
        }
        stop.store(true, Ordering::Relaxed);
        let mut requests = 0;
        for client in clients {
            let (count, mut versions) = client.join().unwrap();
            versions.dedup();
            requests += 3 * count;
            // On a loaded machine a client may miss one between them.
            assert!(versions.is_sorted() && versions[0] == 1 && versions.ends_with(&[VERSIONS]), "{versions:?}");
        }
        println!("{requests} requests on {CLIENTS} connections, each served by {VERSIONS} versions");
    });
    assert_eq!(patient.ask("ient yes"), "ok");
    assert_eq!(patient.ask("get patient"), "yes");
    assert_eq!(patient.ask("count"), "9");
}

/// The new version dies during its probation. The old one then has the connections again, and the values as they were.
#[test]
fn a_version_that_dies_gives_everything_back() {
    let mut server = kv();
    let mut client = Client::connect(&server);
    assert_eq!(client.ask("set a 1"), "ok");
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    send_signal(server.pid(), Signal::KILL);
    assert_eq!((client.ask("get a"), client.ask("version")), ("1".into(), "1".into()));
    assert_eq!(Client::connect(&server).ask("get a"), "1");
}
