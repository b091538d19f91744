//! The wait between two requests, with real sockets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::mpsc;

use super::super::gate::State;
use super::*;

/// Far more than anything here takes, also on a loaded machine.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

/// The wait on a connection, in a thread of its own; what it returns arrives at the receiver.
struct Waiting<S: Connection> {
    gate: Arc<Gate>,
    connections: Arc<IdleConnections>,
    requests: BufReader<S>,
}

impl<S: Connection + Send + 'static> Waiting<S> {
    fn on(stream: S) -> Self {
        let gate = Arc::new(Gate::new().unwrap());
        gate.set(State::Accepting);
        Self { gate, connections: Arc::default(), requests: BufReader::new(stream) }
    }

    fn wait(mut self, idle: Duration, grace: Duration) -> mpsc::Receiver<(bool, Self)> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let more = next_request(&self.gate, &self.connections, &mut self.requests, idle, grace).unwrap();
            let _ = tell.send((more, self));
        });
        told
    }

    fn consume(mut self, expected: &[u8]) -> Self {
        let mut received = vec![0; expected.len()];
        self.requests.read_exact(&mut received).unwrap();
        assert_eq!(received, expected);
        self
    }
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn soon<T>(told: &mpsc::Receiver<T>) -> T {
    told.recv_timeout(LONG).expect("the wait does not end")
}

fn a_life<C: Read + Write, S: Connection + Send + 'static>(mut client: C, server: S) {
    let waiting = Waiting::on(server);
    let gate = waiting.gate.clone();
    client.write_all(b"onetwo").unwrap();
    let (more, waiting) = soon(&waiting.wait(LONG, LONG));
    assert!(more);
    // Pipelined: what is in the buffer needs no wait.
    let (more, waiting) = soon(&waiting.consume(b"one").wait(Duration::ZERO, LONG));
    assert!(more);
    let told = waiting.consume(b"two").wait(LONG, LONG);
    assert!(told.recv_timeout(SHORT).is_err(), "it is neither over nor idle for long");
    gate.set(State::HandedOver);
    assert!(told.recv_timeout(SHORT).is_err(), "the grace is not over");
    client.write_all(b"three").unwrap();
    let (more, waiting) = soon(&told);
    assert!(more);
    // Since its last answer it has been idle for the grace.
    let (more, waiting) = soon(&waiting.consume(b"three").wait(LONG, SHORT));
    assert!(!more);
    drop(waiting);
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "closed, and not reset");
}

#[test]
fn a_busy_connection_stays_and_an_idle_one_closes_after_the_grace() {
    let (client, server) = tcp();
    a_life(client, server);
    let (client, server) = UnixStream::pair().unwrap();
    a_life(client, server);
    // It does not block, or not for long: the wait is the same.
    let (client, server) = tcp();
    server.set_nonblocking(true).unwrap();
    a_life(client, server);
    let (client, server) = tcp();
    server.set_read_timeout(Some(SHORT)).unwrap();
    a_life(client, server);
}

#[test]
fn a_connection_closes_after_its_idle_time_or_when_its_peer_has_closed() {
    let (client, server) = tcp();
    let (more, waiting) = soon(&Waiting::on(server).wait(SHORT, LONG));
    assert!(!more);
    drop((client, waiting));
    let (client, server) = tcp();
    let told = Waiting::on(server).wait(LONG, LONG);
    drop(client);
    assert!(!soon(&told).0);
}

/// Each has its own time, and the thread that wakes them ends with the last one.
#[test]
fn many_connections_close_by_one_thread() {
    let gate = Arc::new(Gate::new().unwrap());
    let connections = Arc::new(IdleConnections::default());
    let pairs: Vec<_> = (0..20).map(|_| tcp()).collect();
    let told: Vec<_> = pairs
        .iter()
        .map(|(_, server)| {
            let requests = BufReader::new(server.try_clone().unwrap());
            Waiting { gate: gate.clone(), connections: connections.clone(), requests }.wait(LONG, SHORT)
        })
        .collect();
    gate.set(State::Stopped);
    assert!(told.iter().all(|told| !soon(told).0));
    let deadline = Deadline::after(LONG);
    while connections.watched.load(Ordering::SeqCst) {
        assert!(!deadline.has_passed());
        thread::sleep(SHORT);
    }
    assert!(connections.parts.iter().all(|part| part.lock().unwrap().is_empty()));
}

/// The first bytes of a request and the wake-up have crossed. What follows is read, and not taken for the end.
#[test]
fn a_request_that_is_half_read_is_read_whole() {
    let (mut client, server) = tcp();
    let mut requests = BufReader::new(server);
    client.write_all(b"half ").unwrap();
    assert_eq!(requests.fill_buf().unwrap(), b"half ");
    wake_reader(requests.get_ref().as_raw_fd());
    let sender = thread::spawn(move || {
        for byte in b"a request\n" {
            thread::sleep(SHORT);
            client.write_all(&[*byte]).unwrap();
        }
        client
    });
    wait_for_the_rest(&requests, Duration::from_secs(1));
    let mut line = String::new();
    requests.read_line(&mut line).unwrap();
    assert_eq!(line, "half a request\n");
    drop(sender.join().unwrap());
}
