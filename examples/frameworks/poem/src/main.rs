//! poem: an acceptor on the library's stream, and responses that say when their connection ends.
//!
//!     cargo run -p ecdysis-poem -- 127.0.0.1:3000     # in examples/frameworks
//!     curl http://127.0.0.1:3000/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, StoppableStream, TokioEcdysisBuilder};
use poem::http::{header::CONNECTION, uri::Scheme, HeaderValue, Version};
use poem::listener::Acceptor;
use poem::web::{LocalAddr, RemoteAddr};
use poem::{get, handler, Endpoint, EndpointExt, IntoResponse, Response, Route, Server};
use say::say;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_stream::wrappers::TcpListenerStream;

/// How long an idle connection stays open, and how long requests may run, after the upgrade.
const GRACE: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> io::Result<()> {
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:3000".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = Connections(builder.listen_tcp(StopOnShutdown::Yes, addr.parse().map_err(io::Error::other)?)?);
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.0.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;

    let shutdown = ecdysis.shutdown();
    let app = Route::new().at("/", get(index)).data(who.clone()).around(move |endpoint, request| {
        let (version, shutdown) = (request.version(), shutdown.clone());
        async move {
            let mut response = endpoint.get_response(request).await;
            // Once this generation is over, every response is the last one on its connection.
            if shutdown.is_over() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if version == Version::HTTP_10 {
                // Otherwise hyper adds `keep-alive` to the `close`, and `ab -k` obeys that.
                response.set_version(version);
            }
            Ok(response)
        }
    });
    let idle_end = ecdysis.shutdown().over_after(GRACE);
    let server = Server::new_with_acceptor(connections).run_with_graceful_shutdown(app, idle_end, Some(DRAIN));
    let server = tokio::spawn(server);
    say(format!("serving {who}"));

    let exit = exit.await.map_err(io::Error::from)?;
    server.await??;
    say(format!("ended {who} {exit:?}"));
    Ok(())
}

#[handler]
fn index(who: poem::web::Data<&String>) -> Response {
    format!("{}\n", who.0).into_response()
}

/// The acceptor for poem. Poem's accept loop never ends, so once the stream has ended, this stays pending until the graceful
/// shutdown begins.
struct Connections(StoppableStream<TcpListenerStream>);

impl Acceptor for Connections {
    type Io = TcpStream;

    fn local_addr(&self) -> Vec<LocalAddr> {
        self.0.local_addr().map(|addr| LocalAddr(addr.into())).into_iter().collect()
    }

    async fn accept(&mut self) -> io::Result<(TcpStream, LocalAddr, RemoteAddr, Scheme)> {
        let (stream, peer) = self.0.accept_or_pend().await;
        let local = stream.local_addr()?;
        Ok((stream, LocalAddr(local.into()), RemoteAddr(peer.into()), Scheme::HTTP))
    }
}
