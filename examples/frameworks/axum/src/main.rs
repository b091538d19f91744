//! axum: HTTP/1.0, HTTP/1.1, HTTP/2 and WebSockets, across any number of upgrades without a failed request.
//!
//!     cargo run --bin ecdysis-axum -- 127.0.0.1:3000      # in examples/frameworks
//!     curl http://127.0.0.1:3000/                         # in a second terminal: gen=1 pid=4711
//!     curl http://127.0.0.1:3000/slow/3000                # answers after 3 s, even if an upgrade happens in between
//!     kill -HUP 4711
//!
//! After an upgrade, the server answers running requests and the next request on every open connection. These responses say
//! `Connection: close`. An idle connection is closed after [`GRACE`], because closing it immediately would reset a request
//! that is already on its way. WebSockets are closed with code 1012, "service restart", which makes clients reconnect.
//!
//! The accept loop uses hyper-util and not `axum::serve`, which sets no time limit for the head of a request: a client that
//! sends half of a head would keep the old process alive until [`DRAIN`] ends.

use axum::extract::ws::{CloseFrame, Message, WebSocketUpgrade};
use axum::extract::{ConnectInfo, Path, State};
use axum::http::{header::CONNECTION, HeaderValue, Request, StatusCode, Version};
use axum::middleware::{from_fn_with_state, Next};
use axum::response::Response;
use axum::{body::Body, routing::get, Router};
use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::{conn::auto, graceful::GracefulShutdown};
use say::say;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;

/// How long an idle connection stays open after the upgrade.
const GRACE: Duration = Duration::from_secs(2);

/// How long the head of a request may take to arrive, and how long running requests may take after the upgrade.
const HEAD: Duration = Duration::from_secs(10);
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> io::Result<()> {
    say::help(include_str!("main.rs"));
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:3000".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse().map_err(io::Error::other)?)?;
    let (gen, pid) = (builder.generation(), std::process::id());
    say(format_args!("listening {} gen={gen} pid={pid}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format_args!("serving gen={gen} pid={pid}"));

    let slow = move |Path(ms): Path<u64>| async move {
        sleep(Duration::from_millis(ms)).await;
        format!("gen={gen} pid={pid} slow\n")
    };
    let app = Router::new()
        .route("/", get(move || async move { format!("gen={gen} pid={pid}\n") }))
        .route("/peer", get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() }))
        .route("/slow/{ms}", get(slow))
        .route("/echo", get(echo).with_state(ecdysis.shutdown()))
        .layer(from_fn_with_state(ecdysis.shutdown(), say_close));

    let (mut http, graceful) = (auto::Builder::new(TokioExecutor::new()), GracefulShutdown::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    while let Some(Ok((stream, peer))) = connections.accept().await {
        let app = app.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            app.clone().oneshot(request)
        });
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::spawn(graceful.watch(connection.into_owned()));
    }
    sleep(GRACE).await;
    let cut = timeout(DRAIN, graceful.shutdown()).await.is_err();
    // hyper no longer knows the WebSockets. Their guards make this wait for them.
    let left = ecdysis.drain(DRAIN).await?;
    say(format_args!("ended gen={gen} pid={pid} left={} {:?}", cut || left > 0, exit.await.map_err(io::Error::from)?));
    Ok(())
}

/// Once this generation is over, every response is the last one on its connection.
async fn say_close(State(shutdown): State<Shutdown>, request: Request<Body>, next: Next) -> Response {
    let version = request.version();
    let mut response = next.run(request).await;
    if shutdown.is_over() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if version == Version::HTTP_10 {
        // Otherwise hyper adds `keep-alive` to the `close`, and `ab -k` obeys that.
        *response.version_mut() = version;
    }
    response
}

/// An echo WebSocket, until this generation is over.
async fn echo(upgrade: WebSocketUpgrade, State(shutdown): State<Shutdown>) -> Response {
    let (guard, mut over) = (shutdown.guard(), shutdown.over());
    upgrade.on_upgrade(move |mut socket| async move {
        let _guard = guard;
        loop {
            tokio::select! {
                message = socket.recv() => match message {
                    Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => drop(socket.send(message).await),
                    Some(Ok(_)) => {}
                    _ => return,
                },
                () = &mut over => break,
            }
        }
        let restart = CloseFrame { code: 1012, reason: "service restart".into() };
        let _ = socket.send(Message::Close(Some(restart))).await;
        // Wait for the client's own close frame. Closing before it arrives would reset the connection.
        while let Some(Ok(_)) = socket.recv().await {}
    })
}
