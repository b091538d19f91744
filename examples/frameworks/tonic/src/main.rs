//! tonic: gRPC with unary calls and streams. At an upgrade, clients receive GOAWAY, and running calls are finished.
//!
//!     cargo run -p ecdysis-tonic -- 127.0.0.1:50051   # in examples/frameworks
//!     kill -HUP 4711
//!
//! With a certificate and its key as the second and third argument, it uses TLS.
//!
//! After GOAWAY, a client that follows the protocol, such as grpcio, sends its next call on a new connection, so no call is
//! lost. The server ends endless streams with a status that tells the client to try again.

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use futures::stream::{self, BoxStream, StreamExt};
use say::say;
use std::future::pending;
use std::io;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

mod generated {
    include!(concat!(env!("OUT_DIR"), "/demo.Whoami.rs"));
}
use generated::whoami_server::{Whoami, WhoamiServer};

#[derive(Clone, PartialEq, prost::Message)]
pub struct Nothing {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Who {
    #[prost(string, tag = "1")]
    who: String,
}

/// How long calls may run after the upgrade.
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("main.rs"));
    let mut args = std::env::args().skip(1);
    let addr = args.next().unwrap_or("127.0.0.1:50051".into());
    let mut server = Server::builder();
    if let (Some(cert), Some(key)) = (args.next(), args.next()) {
        let identity = Identity::from_pem(std::fs::read(cert)?, std::fs::read(key)?);
        server = server.tls_config(ServerTlsConfig::new().identity(identity))?;
    }

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let connections = builder.listen_tcp(StopOnShutdown::Yes, addr.parse()?)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", connections.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;

    let service = WhoamiServer::new(Service { who: who.clone(), shutdown: ecdysis.shutdown() });
    // The end of `connections` starts the graceful shutdown, so no other signal is needed. `serve_with_incoming` would
    // return at that point and cut every connection.
    let server = server.add_service(service).serve_with_incoming_shutdown(connections, pending());
    let server = tokio::spawn(server);
    say(format!("serving {who}"));

    let exit = exit.await.map_err(io::Error::from)?;
    let left = timeout(DRAIN, server).await.is_err();
    say(format!("ended {who} left={left} {exit:?}"));
    Ok(())
}

struct Service {
    who: String,
    shutdown: Shutdown,
}

#[tonic::async_trait]
impl Whoami for Service {
    async fn ask(&self, _: Request<Nothing>) -> Result<Response<Who>, Status> {
        Ok(Response::new(Who { who: self.who.clone() }))
    }

    type WatchStream = BoxStream<'static, Result<Who, Status>>;

    /// Streams a message every 50 ms until this generation is over.
    async fn watch(&self, _: Request<Nothing>) -> Result<Response<Self::WatchStream>, Status> {
        let who = self.who.clone();
        let messages = stream::unfold(who, |who| async {
            sleep(Duration::from_millis(50)).await;
            Some((Ok(Who { who: who.clone() }), who))
        });
        let restart = stream::once(async { Err(Status::unavailable("the server is restarting")) });
        let until_over = messages.take_until(self.shutdown.over()).chain(restart);
        Ok(Response::new(until_over.boxed()))
    }
}
