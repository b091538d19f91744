//! actix-web: its own accept thread and workers on an inherited listener, with calls to pause, resume and stop.
//!
//!     cargo run -p ecdysis-actix -- 127.0.0.1:8080    # in examples/frameworks
//!     curl http://127.0.0.1:8080/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711

use actix_web::http::ConnectionType;
use actix_web::{dev::Service, web, App, HttpServer};
use ecdysis::tokio_ecdysis::{SignalKind, TokioEcdysisBuilder};
use say::say;
use std::io;
use std::time::Duration;
use tokio::time::sleep;

/// How long an idle connection stays open, and how many seconds requests may run, after the upgrade.
const GRACE: Duration = Duration::from_secs(2);
const DRAIN: u64 = 30;

#[actix_web::main]
async fn main() -> io::Result<()> {
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:8080".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let listener =
        builder.std_ecdysis().listen_tcp(addr.parse().map_err(io::Error::other)?).map_err(io::Error::other)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", listener.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;

    let (shutdown, body) = (ecdysis.shutdown(), format!("{who}\n"));
    let app = move || {
        let (shutdown, body) = (shutdown.clone(), body.clone());
        App::new()
            .wrap_fn(move |request, service| {
                // Once this generation is over, every response is the last one on its connection.
                let (shutdown, answer) = (shutdown.clone(), service.call(request));
                async move {
                    let mut response = answer.await?;
                    if shutdown.is_over() {
                        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
                    }
                    Ok(response)
                }
            })
            .route("/", web::get().to(move || std::future::ready(body.clone())))
    };
    let server = HttpServer::new(app).workers(2).disable_signals().shutdown_timeout(DRAIN).listen(listener)?.run();
    let handle = server.handle();
    let server = tokio::spawn(server);
    say(format!("serving {who}"));

    let shutdown = ecdysis.shutdown();
    while shutdown.accepting().await {
        handle.resume().await;
        shutdown.paused().await;
        handle.pause().await;
    }
    sleep(GRACE).await;
    handle.stop(true).await;
    server.await??;
    say(format!("ended {who} {:?}", exit.await.map_err(io::Error::from)?));
    Ok(())
}
