//! The futures of the shutdown handle, several tasks on one stream, and the wait between two requests.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{duplex, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;

use super::{StopOnShutdown, StoppableStream};
use crate::shutdown::{Shutdown, State};

/// Far longer than anything here takes, even on a loaded machine.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.expect("it took too long")
}

#[tokio::test]
async fn futures_follow_the_states() {
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    let (mut paused, mut over, mut accepting) = (shutdown.paused(), shutdown.over(), shutdown.accepting());
    assert!(timeout(SHORT, &mut paused).await.is_err(), "not ready yet is not paused");
    assert!(timeout(SHORT, &mut accepting).await.is_err());
    shutdown.set(State::Accepting);
    assert!(soon(accepting).await);
    assert!(timeout(SHORT, &mut paused).await.is_err());
    shutdown.set(State::Paused);
    soon(paused).await;
    assert!(shutdown.is_paused() && !shutdown.is_over());
    let resumed = task::spawn(shutdown.accepting());
    shutdown.set(State::Accepting);
    assert!(soon(resumed).await.unwrap());
    assert!(timeout(SHORT, &mut over).await.is_err());
    shutdown.set(State::Stopped);
    soon(over).await;
    assert!(!soon(shutdown.accepting()).await);
    soon(shutdown.paused()).await;
    assert!(!shutdown.is_paused());
    let started = Instant::now();
    soon(shutdown.over_after(SHORT)).await;
    assert!(started.elapsed() >= SHORT);
}

#[tokio::test]
async fn a_busy_connection_outlives_the_grace_and_an_idle_one_does_not() {
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    shutdown.set(State::Accepting);
    let (mut client, server) = duplex(64);
    let mut requests = BufReader::new(server);
    client.write_all(b"one").await.unwrap();
    assert!(soon(shutdown.next_request_async(&mut requests, LONG, SHORT)).await.unwrap());
    tokio::io::AsyncBufReadExt::consume(&mut requests, 3);

    let between = {
        let shutdown = shutdown.clone();
        task::spawn(async move {
            let more = shutdown.next_request_async(&mut requests, LONG, LONG).await;
            (requests, more)
        })
    };
    shutdown.set(State::HandedOver);
    client.write_all(b"two").await.unwrap();
    let (mut requests, more) = soon(between).await.unwrap();
    assert!(more.unwrap(), "a request arrives within the grace period");
    tokio::io::AsyncBufReadExt::consume(&mut requests, 3);
    assert!(!soon(shutdown.next_request_async(&mut requests, LONG, SHORT)).await.unwrap());
}

#[tokio::test]
async fn a_connection_ends_when_its_idle_time_is_over_or_its_peer_closes() {
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    shutdown.set(State::Accepting);
    let (client, server) = duplex(64);
    let mut requests = BufReader::new(server);
    assert!(!soon(shutdown.next_request_async(&mut requests, SHORT, LONG)).await.unwrap());
    drop(client);
    assert!(!soon(shutdown.next_request_async(&mut requests, LONG, LONG)).await.unwrap());
}

/// The first halves of many requests arrive while the grace of their connections ends, and the rest after a pause. Each
/// connection is closed before its request, or the request is read whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_crosses_the_end_of_the_grace_is_read_whole() {
    use std::io::Write;
    use tokio::io::AsyncBufReadExt;
    const PAUSE: Duration = Duration::from_millis(300);
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    shutdown.set(State::Accepting);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (mut clients, mut servers) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        clients.push(std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (mut requests, shutdown) = (BufReader::new(listener.accept().await.unwrap().0), shutdown.clone());
        servers.push(task::spawn(async move {
            let mut line = String::new();
            let more = shutdown.next_request_async(&mut requests, LONG, PAUSE).await.unwrap();
            if more {
                requests.read_line(&mut line).await.unwrap();
            }
            (more, line)
        }));
    }
    shutdown.set(State::HandedOver);
    let end = Instant::now() + PAUSE;
    let sender = std::thread::spawn(move || {
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        clients.iter_mut().for_each(|client| drop(client.write_all(b"half ")));
        std::thread::sleep(PAUSE);
        clients.iter_mut().for_each(|client| drop(client.write_all(b"a request\n")));
        clients
    });
    for server in servers {
        let (more, line) = soon(server).await.unwrap();
        assert_eq!(line, if more { "half a request\n" } else { "" });
    }
    drop(sender.join().unwrap());
}

type Stream = Arc<StoppableStream<TcpListenerStream>>;

async fn stream() -> (Shutdown, Stream) {
    let shutdown = Shutdown::new(Duration::ZERO).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = StoppableStream::new(TcpListenerStream::new(listener), shutdown.clone(), StopOnShutdown::Yes);
    (shutdown, Arc::new(stream))
}

/// A task that accepts one connection and then ends. Returns whether it got one.
fn accepts(stream: &Stream) -> task::JoinHandle<bool> {
    let stream = stream.clone();
    task::spawn(async move { stream.accept().await.is_some_and(|accepted| accepted.is_ok()) })
}

#[tokio::test]
async fn each_of_two_tasks_on_one_stream_is_woken() {
    let (shutdown, stream) = stream().await;
    let addr = stream.local_addr().unwrap();
    // They wait at the gate, before `ready` and in a pause.
    for closed in [State::Starting, State::Paused] {
        shutdown.set(closed);
        let clients = [TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap()];
        let (mut one, mut other) = (accepts(&stream), accepts(&stream));
        assert!(timeout(SHORT, async { tokio::select!(one = &mut one => one, other = &mut other => other) })
            .await
            .is_err());
        shutdown.set(State::Accepting);
        assert!(soon(one).await.unwrap() && soon(other).await.unwrap());
        drop(clients);
    }
    // Connections that arrive one after the other wake them.
    let (mut one, mut other) = (accepts(&stream), accepts(&stream));
    task::yield_now().await;
    let _first = TcpStream::connect(addr).await.unwrap();
    let first = soon(async { tokio::select!(_ = &mut one => 1, _ = &mut other => 2) }).await;
    let _second = TcpStream::connect(addr).await.unwrap();
    assert!(soon(if first == 1 { other } else { one }).await.unwrap());
    // The pause wakes them from the wait for a connection, and so does the end.
    let (one, other) = (accepts(&stream), accepts(&stream));
    task::yield_now().await;
    shutdown.set(State::Paused);
    task::yield_now().await;
    assert!(stream.get_ref().is_some());
    shutdown.set(State::HandedOver);
    assert!(!soon(one).await.unwrap() && !soon(other).await.unwrap());
    assert!(stream.get_ref().is_none(), "the listener is closed");
    assert!(soon(stream.accept()).await.is_none());
    assert_eq!(shutdown.drain(LONG), 0);
}

#[tokio::test]
async fn a_stop_waits_until_each_task_on_a_stream_has_ended() {
    let (shutdown, stream) = stream().await;
    shutdown.set(State::Accepting);
    let waits = accepts(&stream);
    task::yield_now().await;
    // The end of one stream does not end another one, and the drain still waits for the other.
    let lost = task::spawn({
        let stream = stream.clone();
        async move { stream.accept().await.is_none() }
    });
    task::yield_now().await;
    lost.abort();
    let _client = TcpStream::connect(stream.local_addr().unwrap()).await.unwrap();
    shutdown.set(State::Stopped);
    assert!(soon(waits).await.unwrap(), "queued connections are accepted");
    assert_eq!(shutdown.drain(Duration::ZERO), 1, "it may accept more");
    assert!(soon(stream.accept()).await.is_none());
    assert_eq!(shutdown.drain(Duration::ZERO), 0);
}

#[tokio::test]
async fn a_task_that_is_dropped_before_its_end_keeps_no_listener() {
    let (shutdown, stream) = stream().await;
    shutdown.set(State::Accepting);
    let addr = stream.local_addr().unwrap();
    let mut dropped = Box::pin(stream.accept());
    assert!(timeout(Duration::ZERO, &mut dropped).await.is_err());
    shutdown.set(State::HandedOver);
    assert!(soon(stream.accept()).await.is_none());
    drop(dropped);
    assert!(TcpStream::connect(addr).await.is_err(), "clients would wait in a queue that no process serves");
}
