//! poem: an acceptor on the library's stream, and responses that say when their connection ends.
//!
//!     cargo run -p ecdysis-poem -- 127.0.0.1:3000     # in examples/frameworks
//!     curl http://127.0.0.1:3000/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711
//!
//! With a certificate and its key as the second and third argument, it uses TLS.

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, StoppableStream, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::FuturesUnordered;
use futures::{SinkExt, StreamExt};
use poem::http::{header::CONNECTION, uri::Scheme, HeaderValue, StatusCode, Version};
use poem::listener::{Acceptor, AcceptorExt};
use poem::web::websocket::{CloseCode, Message, WebSocket};
use poem::web::{Data, LocalAddr, RemoteAddr};
use poem::{get, handler, Endpoint, EndpointExt, IntoResponse, Response, Route, Server};
use say::say;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tls::{TlsAcceptor, TlsStream};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;

/// How long an idle connection stays open, and how long requests may run, after the upgrade.
const GRACE: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(30);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("main.rs"));
    let mut args = std::env::args().skip(1);
    let addr = args.next().unwrap_or("127.0.0.1:3000".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = Connections(builder.listen_tcp(StopOnShutdown::Yes, addr.parse()?)?);
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.0.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;

    let shutdown = ecdysis.shutdown();
    let app = Route::new().at("/", get(index)).at("/echo", get(echo)).data(who.clone()).data(shutdown.clone()).around(
        move |endpoint, request| {
            let (version, shutdown) = (request.version(), shutdown.clone());
            async move {
                let mut response = endpoint.get_response(request).await;
                // Once this generation is over, every response is the last one on its connection.
                if shutdown.is_over() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                if version == Version::HTTP_10 {
                    // Otherwise hyper adds `keep-alive` to the `close`, and `ab -k` obeys that.
                    response.set_version(version);
                }
                Ok(response)
            }
        },
    );
    let idle_end = ecdysis.shutdown().over_after(GRACE);
    let acceptor = match (args.next(), args.next()) {
        (Some(cert), Some(key)) => {
            let tls = Arc::new(tls::config(&cert, &key, &["h2", "http/1.1"])?);
            Tls { connections, tls: tls.into(), handshakes: FuturesUnordered::new() }.boxed()
        }
        _ => connections.boxed(),
    };
    let server = Server::new_with_acceptor(acceptor).run_with_graceful_shutdown(app, idle_end, Some(DRAIN));
    let server = tokio::spawn(server);
    say(format!("serving {who}"));

    let exit = exit.await.map_err(io::Error::from)?;
    server.await??;
    // The guards of the WebSockets make this wait for them.
    let left = ecdysis.drain(DRAIN).await? > 0;
    say(format!("ended {who} left={left} {exit:?}"));
    Ok(())
}

#[handler]
fn index(who: Data<&String>) -> Response {
    format!("{}\n", who.0).into_response()
}

/// An echo WebSocket, until this generation is over.
#[handler]
fn echo(upgrade: WebSocket, shutdown: Data<&Shutdown>) -> impl IntoResponse {
    let (guard, mut over) = (shutdown.guard(), shutdown.over());
    upgrade.on_upgrade(move |mut socket| async move {
        let _guard = guard;
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
        let _ = socket.send(Message::close_with(CloseCode::Restart, "service restart")).await;
        // Wait for the client's own close frame. Closing before it arrives would reset the connection.
        while let Some(Ok(_)) = socket.next().await {}
    })
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

/// The same with TLS: connections that have finished their handshakes. (poem's own feature for that needs aws-lc.)
struct Tls {
    connections: Connections,
    tls: TlsAcceptor,
    handshakes: FuturesUnordered<BoxFuture<'static, io::Result<Accepted<TlsStream<TcpStream>>>>>,
}

type Accepted<S> = (S, LocalAddr, RemoteAddr, Scheme);

impl Acceptor for Tls {
    type Io = TlsStream<TcpStream>;

    fn local_addr(&self) -> Vec<LocalAddr> {
        self.connections.local_addr()
    }

    async fn accept(&mut self) -> io::Result<Accepted<Self::Io>> {
        loop {
            tokio::select! {
                accepted = self.connections.accept() => {
                    let (stream, local, remote, _) = accepted?;
                    let handshake = timeout(HANDSHAKE, self.tls.accept(stream));
                    let finished = async { Ok((handshake.await??, local, remote, Scheme::HTTPS)) };
                    self.handshakes.push(finished.boxed());
                }
                Some(finished) = self.handshakes.next() => if let Ok(finished) = finished {
                    return Ok(finished);
                },
            }
        }
    }
}
