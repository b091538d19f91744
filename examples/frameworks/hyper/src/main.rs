//! hyper with hyper-util: HTTP/1.0, HTTP/1.1 and HTTP/2 on your own accept loop.
//!
//!     cargo run -p ecdysis-hyper -- 127.0.0.1:3000    # in examples/frameworks
//!     curl http://127.0.0.1:3000/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{HeaderValue, CONNECTION};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::{conn::auto, graceful::GracefulShutdown};
use say::say;
use std::convert::Infallible;
use std::io;
use std::time::Duration;
use tokio::time::{sleep, timeout};

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
    say(format!("listening {} gen={gen} pid={pid}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format!("serving gen={gen} pid={pid}"));

    let (mut http, graceful) = (auto::Builder::new(TokioExecutor::new()), GracefulShutdown::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    while let Some(Ok((stream, _peer))) = connections.accept().await {
        let shutdown = ecdysis.shutdown();
        let service = service_fn(move |request| answer(request, gen, shutdown.clone()));
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::spawn(graceful.watch(connection.into_owned()));
    }
    // Accepting has ended. Responses announce the end of their connection, and idle connections are closed.
    sleep(GRACE).await;
    let left = timeout(DRAIN, graceful.shutdown()).await.is_err();
    say(format!("ended gen={gen} pid={pid} left={left} {:?}", exit.await.map_err(io::Error::from)?));
    Ok(())
}

async fn answer(request: Request<Incoming>, gen: u64, shutdown: Shutdown) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::from(format!("gen={gen} pid={}\n", std::process::id())));
    if shutdown.is_over() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if request.version() == Version::HTTP_10 {
        // Otherwise hyper adds `keep-alive` to the `close`, and `ab -k` obeys that.
        *response.version_mut() = Version::HTTP_10;
    }
    Ok(response)
}
