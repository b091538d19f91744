//! axum over TLS with rustls: HTTP/1.1 and HTTP/2 by ALPN, and session tickets that the next version accepts.
//!
//!     openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key.pem -out cert.pem
//!     cargo run -p ecdysis-axum --bin ecdysis-axum-tls -- 127.0.0.1:3443 cert.pem key.pem
//!     curl -k https://127.0.0.1:3443/                 # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711
//!
//! Every upgrade reads the certificate again. The key of the session tickets is handed over in memory. `main.rs` beside this
//! file explains what an upgrade means for a connection.

use axum::extract::State;
use axum::http::{header::CONNECTION, HeaderValue, Request};
use axum::middleware::{from_fn_with_state, Next};
use axum::response::Response;
use axum::{body::Body, routing::get, Router};
use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::{conn::auto, graceful::GracefulShutdown};
use hyper_util::service::TowerToHyperService;
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, CHACHA20_POLY1305, NONCE_LEN};
use ring::rand::{SecureRandom, SystemRandom};
use say::say;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tls::{ProducesTickets, TlsAcceptor};
use tokio::time::{sleep, timeout};

/// How long an idle connection stays open after the upgrade.
const GRACE: Duration = Duration::from_secs(2);

/// How long a handshake or the head of a request may take to arrive, and how long running requests may take after the upgrade.
const HEAD: Duration = Duration::from_secs(10);
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("tls.rs"));
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [addr, cert, key] = &args[..] else { return Err("usage: ecdysis-axum-tls ADDRESS CERT.pem KEY.pem".into()) };

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;

    let secret = match builder.std_ecdysis().take_bytes("ticket key")? {
        Some(secret) => secret,
        None => ring::rand::generate::<[u8; 32]>(&SystemRandom::new()).map_err(|_| "no randomness")?.expose().to_vec(),
    };
    let mut tls = tls::config(cert, key, &["h2", "http/1.1"])?;
    tls.ticketer = Arc::new(Tickets::new(&secret)?);
    let tls = TlsAcceptor::from(Arc::new(tls));
    builder.std_ecdysis().pass_bytes("ticket key", move || Ok::<_, io::Error>(secret.clone()))?;

    let connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse()?)?;
    let (gen, pid) = (builder.generation(), std::process::id());
    say(format_args!("listening {} gen={gen} pid={pid}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;
    say(format_args!("serving gen={gen} pid={pid}"));

    let app = Router::new()
        .route("/", get(move || async move { format!("gen={gen} pid={pid}\n") }))
        .layer(from_fn_with_state(ecdysis.shutdown(), say_close));
    let (mut http, graceful) = (auto::Builder::new(TokioExecutor::new()), GracefulShutdown::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    while let Some(Ok((tcp, _peer))) = connections.accept().await {
        let (tls, http, service) = (tls.clone(), http.clone(), TowerToHyperService::new(app.clone()));
        // Created before the handshake, so that the shutdown waits for the handshake too.
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            let Ok(Ok(stream)) = timeout(HEAD, tls.accept(tcp)).await else { return };
            let _ = watcher.watch(http.serve_connection(TokioIo::new(stream), service).into_owned()).await;
        });
    }
    sleep(GRACE).await;
    let left = timeout(DRAIN, graceful.shutdown()).await.is_err();
    say(format_args!("ended gen={gen} pid={pid} left={left} {:?}", exit.await.map_err(io::Error::from)?));
    Ok(())
}

/// Session tickets, encrypted with a key that every generation has. (A ticket key that is used for months undoes forward
/// secrecy. A long-running service should replace it from time to time, and hand over the previous key as well.)
#[derive(Debug)]
struct Tickets(LessSafeKey);

impl Tickets {
    fn new(secret: &[u8]) -> Result<Self, &'static str> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, secret).map_err(|_| "the ticket key is not a key")?;
        Ok(Self(LessSafeKey::new(key)))
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        12 * 60 * 60
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let (mut nonce, mut ticket) = ([0; NONCE_LEN], plain.to_vec());
        SystemRandom::new().fill(&mut nonce).ok()?;
        self.0.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut ticket).ok()?;
        ticket.extend(nonce);
        Some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (sealed, nonce) = ticket.split_last_chunk()?;
        let mut plain = sealed.to_vec();
        let length = self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut plain).ok()?.len();
        plain.truncate(length);
        Some(plain)
    }
}

/// Once this generation is over, every response is the last one on its connection.
async fn say_close(State(shutdown): State<Shutdown>, request: Request<Body>, next: Next) -> Response {
    let mut response = next.run(request).await;
    if shutdown.is_over() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
