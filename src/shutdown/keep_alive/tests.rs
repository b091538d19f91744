//! The wait between two requests, with real sockets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::mpsc;

use super::super::gate::State;
use super::*;

/// Far longer than anything here takes, even on a loaded machine.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

/// Waits on a connection in a separate thread, which sends the result to the receiver.
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
    // With pipelining, data in the buffer needs no wait.
    let (more, waiting) = soon(&waiting.consume(b"one").wait(Duration::ZERO, LONG));
    assert!(more);
    let told = waiting.consume(b"two").wait(LONG, LONG);
    assert!(told.recv_timeout(SHORT).is_err(), "it is neither over nor idle for long");
    gate.set(State::HandedOver);
    assert!(told.recv_timeout(SHORT).is_err(), "the grace is not over");
    client.write_all(b"three").unwrap();
    let (more, waiting) = soon(&told);
    assert!(more);
    // It has been idle for the grace period since its last answer.
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
    // A nonblocking connection, or one with a short timeout, waits in the same way.
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

/// Each connection has its own time, and the thread that wakes them ends after the last one.
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

/// The first bytes of a request arrive just as its reader is woken. The rest is read, and the connection does not end.
#[test]
fn a_request_that_is_half_read_is_read_whole() {
    let (mut client, server) = tcp();
    let mut requests = BufReader::new(server);
    client.write_all(b"half ").unwrap();
    assert_eq!(requests.fill_buf().unwrap(), b"half ");
    assert!(wake_reader(requests.get_ref().as_raw_fd(), Duration::ZERO));
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

/// Its thread has not left the list of idle connections yet.
#[test]
fn a_connection_with_a_byte_of_a_request_is_not_idle() {
    let deadline = Deadline::after(LONG);
    loop {
        let (mut client, mut server) = tcp();
        let connections = Arc::new(IdleConnections::default());
        let gate = Arc::new(Gate::new().unwrap());
        connections.watched.store(true, Ordering::SeqCst); // by this test
        let idle = Idle { since: Instant::now(), longest: Duration::ZERO, grace: LONG, woken: false };
        let entry = connections.enter(&gate, server.as_raw_fd(), idle).unwrap();
        let sent = Instant::now();
        client.write_all(b"half").unwrap();
        assert!(wait_readable(&server, deadline));
        connections.wake(None);
        // The first part has been read, so nothing in the socket shows it any more.
        server.read_exact(&mut [0; 4]).unwrap();
        connections.wake(None);
        if sent.elapsed() < RECENT {
            assert!(!entry.leave());
            server.set_read_timeout(Some(SHORT)).unwrap();
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it waits for the rest");
            break;
        }
        assert!(!deadline.has_passed());
    }
}

/// The first halves of many requests arrive while the grace of their connections ends, and the rest after a pause. Each
/// connection is closed before its request, or the request is read whole.
fn cross<C: Read + Write + Send + 'static, S: Connection + Send + 'static>(pair: impl Fn() -> (C, S)) {
    const PAUSE: Duration = Duration::from_millis(300);
    let (gate, connections) = (Arc::new(Gate::new().unwrap()), Arc::new(IdleConnections::default()));
    gate.set(State::Accepting);
    let (mut clients, servers): (Vec<_>, Vec<_>) = (0..100).map(|_| pair()).unzip();
    let told: Vec<_> = servers
        .into_iter()
        .map(|server| {
            let requests = BufReader::new(server);
            Waiting { gate: gate.clone(), connections: connections.clone(), requests }.wait(LONG, PAUSE)
        })
        .collect();
    gate.set(State::HandedOver);
    let end = gate.over_since().unwrap() + PAUSE;
    let sender = thread::spawn(move || {
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        clients.iter_mut().for_each(|client| drop(client.write_all(b"half ")));
        thread::sleep(PAUSE);
        clients.iter_mut().for_each(|client| drop(client.write_all(b"a request\n")));
        clients
    });
    for told in told {
        let (more, mut waiting) = soon(&told);
        let mut line = String::new();
        if more {
            waiting.requests.read_line(&mut line).unwrap();
            assert_eq!(line, "half a request\n");
        }
    }
    drop(sender.join().unwrap());
}

#[test]
fn a_request_that_crosses_the_end_of_the_grace_is_read_whole() {
    cross(tcp);
    cross(|| UnixStream::pair().unwrap());
}
