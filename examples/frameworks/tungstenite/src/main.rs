//! tokio-tungstenite: echo WebSockets. At an upgrade each is closed with code 1012, "service restart". Clients then reconnect
//! and reach the new version.
//!
//!     cargo run -p ecdysis-tungstenite -- 127.0.0.1:9001      # in examples/frameworks
//!     kill -HUP 4711

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use futures::{FutureExt, SinkExt, StreamExt};
use say::say;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::{frame::coding::CloseCode, CloseFrame, Message};
use tokio_tungstenite::tungstenite::Error;

/// How long clients may take to answer the close frame.
const DRAIN: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> io::Result<()> {
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:9001".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let mut connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse().map_err(io::Error::other)?)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format!("serving {who}"));

    let shutdown = ecdysis.shutdown();
    while let Some(Ok((stream, _peer))) = connections.accept().await {
        // The guard is created before the handshake, so that `drain` waits for the handshake too.
        let guard = shutdown.guard();
        tokio::spawn(echo(stream, shutdown.over()).map(|_| drop(guard)));
    }
    let exit = exit.await.map_err(io::Error::from)?;
    let left = ecdysis.drain(DRAIN).await?;
    say(format!("ended {who} left={left} {exit:?}"));
    Ok(())
}

async fn echo(stream: TcpStream, mut over: impl Future<Output = ()> + Unpin) -> Result<(), Error> {
    let mut socket = tokio_tungstenite::accept_async(stream).await?;
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(message) => match message? {
                    message @ (Message::Text(_) | Message::Binary(_)) => socket.send(message).await?,
                    _ => {}
                },
                None => return Ok(()),
            },
            () = &mut over => break,
        }
    }
    socket.close(Some(CloseFrame { code: CloseCode::Restart, reason: "service restart".into() })).await?;
    // Wait for the client's own close frame. Closing before it arrives would reset the connection.
    while socket.next().await.is_some() {}
    Ok(())
}
