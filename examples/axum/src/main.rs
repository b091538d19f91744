//! HTTP with keep-alive on axum, replaced by its next version without one failed request.
//!
//!     cargo run -- 127.0.0.1:3000                     # in this directory
//!     curl http://127.0.0.1:3000/                     # in a second terminal: gen=1 pid=4711
//!     curl http://127.0.0.1:3000/slow/3000            # answers after 3 s, also if there is an upgrade meanwhile
//!     kill -HUP 4711
//!
//! At the upgrade a connection is in one of three states. A request that runs is answered, with `Connection: close`. So
//! is the next request on a connection that is between two. A connection that stays idle is closed after [`GRACE`]: to
//! close it at once would reset a request that is just on its way. One that is on its way when the grace ends meets the
//! same fate, as it does with every server that closes idle connections; a client sends it again.

use axum::extract::{Path, State};
use axum::http::{header::CONNECTION, HeaderValue, Request};
use axum::middleware::{from_fn_with_state, Next};
use axum::response::Response;
use axum::serve::Listener;
use axum::{routing::get, Router};
use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, StoppableStream, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use std::future::{pending, IntoFuture};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_stream::wrappers::TcpListenerStream;

/// How long a connection may be idle after the upgrade.
const GRACE: Duration = Duration::from_millis(500);

/// How long running requests may take after it.
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> io::Result<()> {
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let addr: SocketAddr = addr.parse().map_err(io::Error::other)?;

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = Connections(builder.listen_tcp(StopOnShutdown::Yes, addr)?);
    let (gen, pid) = (builder.generation(), std::process::id());
    say(format!("listening {} gen={gen} pid={pid}", connections.local_addr()?));

    let (ecdysis, exit) = builder.ready()?;
    let who = move || async move { format!("gen={gen} pid={pid}\n") };
    let slow = move |Path(ms): Path<u64>| async move {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        format!("gen={gen} pid={pid} slow\n")
    };
    let app = Router::new()
        .route("/", get(who))
        .route("/slow/{ms}", get(slow))
        .layer(from_fn_with_state(ecdysis.shutdown(), say_close));

    let over = ecdysis.over();
    let idle_ends = async move {
        over.await;
        tokio::time::sleep(GRACE).await;
    };
    let server = axum::serve(connections, app).with_graceful_shutdown(idle_ends);
    let server = tokio::spawn(server.into_future());
    say(format!("serving gen={gen} pid={pid}"));

    let exit = exit.await.map_err(io::Error::from)?;
    // axum waits for every connection; a client that never ends its request must not keep this process for ever.
    let left = tokio::time::timeout(DRAIN, server).await.is_err();
    say(format!("ended gen={gen} pid={pid} left={left} {exit:?}"));
    Ok(())
}

/// What axum accepts from. It asks in a loop and knows no end: after ours it is answered no more, and stops when its
/// graceful shutdown begins.
struct Connections(StoppableStream<TcpListenerStream>);

impl Listener for Connections {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        match self.0.accept().await {
            Some(Ok(accepted)) => accepted,
            Some(Err(error)) => {
                // Only the listener itself: everything else is dealt with before.
                say(format!("cannot accept any more: {error}"));
                pending().await
            }
            None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().ok_or(io::ErrorKind::NotConnected)?.local_addr()
    }
}

/// Once this generation is over, every answer is the last one of its connection.
async fn say_close(State(shutdown): State<Shutdown>, request: Request<axum::body::Body>, next: Next) -> Response {
    let mut response = next.run(request).await;
    if shutdown.is_over() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// One write a line: several generations share stderr.
fn say(line: String) {
    let _ = io::stderr().write_all((line + "\n").as_bytes());
}
