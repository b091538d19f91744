//! tokio-tungstenite: echo WebSockets. At an upgrade each is closed with code 1012, "service restart". Clients then
//! reconnect and reach the new version.
//!
//!     cargo run -p ecdysis-tungstenite -- 127.0.0.1:9001      # in examples/frameworks
//!     kill -HUP 4711
//!
//! With a certificate and its key as the second and third argument, it uses TLS.

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use futures::{SinkExt, StreamExt};
use say::say;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tls::TlsAcceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::protocol::{frame::coding::CloseCode, CloseFrame, Message};
use tokio_tungstenite::tungstenite::Error;

/// How long clients may take to answer the close frame.
const DRAIN: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("main.rs"));
    let mut args = std::env::args().skip(1);
    let addr = args.next().unwrap_or("127.0.0.1:9001".into());
    let tls = match (args.next(), args.next()) {
        (Some(cert), Some(key)) => Some(TlsAcceptor::from(Arc::new(tls::config(&cert, &key, &["http/1.1"])?))),
        _ => None,
    };

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse()?)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format!("serving {who}"));

    let shutdown = ecdysis.shutdown();
    while let Some(Ok((stream, _peer))) = connections.accept().await {
        // The guard is created before the handshake, so that `drain` waits for the handshake too.
        let (guard, over, tls) = (shutdown.guard(), shutdown.over(), tls.clone());
        tokio::spawn(async move {
            let _guard = guard;
            match tls {
                Some(tls) => echo(tls.accept(stream).await?, over).await,
                None => echo(stream, over).await,
            }
        });
    }
    let exit = exit.await.map_err(io::Error::from)?;
    let left = ecdysis.drain(DRAIN).await?;
    say(format!("ended {who} left={left} {exit:?}"));
    Ok(())
}

async fn echo<S>(stream: S, mut over: impl Future<Output = ()> + Unpin) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
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
