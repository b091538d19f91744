//! The futures of the shutdown handle, and the wait between two requests.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::io::{duplex, AsyncWriteExt, BufReader};
use tokio::task;
use tokio::time::timeout;

use crate::shutdown::{Shutdown, State};

/// Far more than anything here takes, also on a loaded machine.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(20);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.expect("it takes too long")
}

#[tokio::test]
async fn futures_follow_the_states() {
    let shutdown = Shutdown::new().unwrap();
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
    let shutdown = Shutdown::new().unwrap();
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
    assert!(more.unwrap(), "the grace lets a request in");
    tokio::io::AsyncBufReadExt::consume(&mut requests, 3);
    assert!(!soon(shutdown.next_request_async(&mut requests, LONG, SHORT)).await.unwrap());
}

#[tokio::test]
async fn a_connection_ends_when_its_idle_time_is_over_or_its_peer_closes() {
    let shutdown = Shutdown::new().unwrap();
    shutdown.set(State::Accepting);
    let (client, server) = duplex(64);
    let mut requests = BufReader::new(server);
    assert!(!soon(shutdown.next_request_async(&mut requests, SHORT, LONG)).await.unwrap());
    drop(client);
    assert!(!soon(shutdown.next_request_async(&mut requests, LONG, LONG)).await.unwrap());
}
