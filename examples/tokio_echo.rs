//! An echo server on Tokio that is upgraded without losing a connection.
//!
//!     cargo run --features tokio --example tokio_echo &
//!     nc 127.0.0.1 8080                               # in a second terminal: the server sends back what you type
//!     kill -HUP $!                                    # in the first: the upgrade; -USR1 would stop the server
//!
//! The open `nc` stays connected to the old process, which exits when `nc` does. A new `nc` reaches the new process.

mod support;

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use futures::StreamExt;
use std::net::SocketAddr;
use tokio::{net::TcpStream, task::JoinSet};

#[tokio::main]
async fn main() {
    support::help(include_str!("tokio_echo.rs"));
    let mut ecdysis_builder = TokioEcdysisBuilder::new(SignalKind::hangup()).unwrap();
    ecdysis_builder.stop_on_signal(SignalKind::user_defined1()).unwrap();
    let addr: SocketAddr = "0.0.0.0:8080".parse().unwrap();
    let stream = ecdysis_builder
        .build_listen_tcp(StopOnShutdown::Yes, addr, |builder, addr| {
            builder.set_reuse_address(true)?;
            builder.bind(addr.into())?;
            builder.listen(128)?;
            Ok(builder.into())
        })
        .unwrap();
    let server_handle = tokio::spawn(async move {
        let mut stream = stream;
        let mut set = JoinSet::new();
        while let Some(Ok(socket)) = stream.next().await {
            set.spawn(handle_connection(socket));
        }
        set.join_all().await;
    });
    let (_ecdysis, shutdown_fut) = ecdysis_builder.ready().unwrap();
    let shutdown_reason = shutdown_fut.await;
    log::info!("shutting down: {shutdown_reason:?}");
    server_handle.await.unwrap();
}

async fn handle_connection(mut socket: TcpStream) {
    let (mut from, mut to) = socket.split();
    // An error here means that this client has gone away.
    let _ = tokio::io::copy(&mut from, &mut to).await;
}
