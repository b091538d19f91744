//! warp: its filters as a service on hyper-util. `warp::serve` is not used, because it accepts only from Tokio's own listeners
//! and does not stop at an upgrade.
//!
//!     cargo run -p ecdysis-warp -- 127.0.0.1:3030     # in examples/frameworks
//!     curl http://127.0.0.1:3030/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use futures::{FutureExt, SinkExt, StreamExt};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::{conn::auto, graceful::GracefulShutdown};
use say::say;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tower_service::Service;
use warp::http::{header::CONNECTION, HeaderValue, Request, StatusCode, Version};
use warp::ws::{Message, WebSocket, Ws};
use warp::Filter;

/// How long an idle connection stays open after the upgrade.
const GRACE: Duration = Duration::from_secs(2);

/// How long the head of a request may take to arrive, and how long running requests may take after the upgrade.
const HEAD: Duration = Duration::from_secs(10);
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> io::Result<()> {
    say::help(include_str!("main.rs"));
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:3030".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse().map_err(io::Error::other)?)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format!("serving {who}"));

    let (body, shutdown) = (format!("{who}\n"), ecdysis.shutdown());
    let index = warp::path::end().map(move || body.clone());
    let websocket = warp::path("echo").and(warp::ws()).map(move |upgrade: Ws| {
        let (guard, over) = (shutdown.guard(), shutdown.over());
        upgrade.on_upgrade(|socket| echo(socket, over).map(|()| drop(guard)))
    });
    let routes = warp::service(index.or(websocket));
    let (mut http, graceful) = (auto::Builder::new(TokioExecutor::new()), GracefulShutdown::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    let shutdown = ecdysis.shutdown();
    let service = service_fn(move |request: Request<Incoming>| {
        let (version, answer, shutdown) = (request.version(), routes.clone().call(request), shutdown.clone());
        async move {
            let mut response = answer.await?;
            if shutdown.is_over() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if version == Version::HTTP_10 {
                // Otherwise hyper adds `keep-alive` to the `close`, and `ab -k` obeys that.
                *response.version_mut() = version;
            }
            Ok::<_, Infallible>(response)
        }
    });
    while let Some(Ok((stream, _peer))) = connections.accept().await {
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service.clone());
        tokio::spawn(graceful.watch(connection.into_owned()));
    }
    sleep(GRACE).await;
    let cut = timeout(DRAIN, graceful.shutdown()).await.is_err();
    // hyper no longer knows the WebSockets. Their guards make this wait for them.
    let left = ecdysis.drain(DRAIN).await?;
    say(format!("ended {who} left={} {:?}", cut || left > 0, exit.await.map_err(io::Error::from)?));
    Ok(())
}

/// An echo WebSocket, until this generation is over.
async fn echo(mut socket: WebSocket, mut over: impl Future<Output = ()> + Unpin) {
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(message)) if message.is_text() || message.is_binary() => drop(socket.send(message).await),
                Some(Ok(_)) => {}
                _ => return,
            },
            () = &mut over => break,
        }
    }
    let _ = socket.send(Message::close_with(1012_u16, "service restart")).await;
    // Wait for the client's own close frame. Closing before it arrives would reset the connection.
    while let Some(Ok(_)) = socket.next().await {}
}
