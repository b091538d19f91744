//! actix-web: its own accept thread and workers on an inherited listener, with calls to pause, resume and stop.
//!
//!     cargo run -p ecdysis-actix -- 127.0.0.1:8080    # in examples/frameworks
//!     curl http://127.0.0.1:8080/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711
//!
//! With a certificate and its key as the second and third argument, it uses TLS, and HTTP/2.

use actix_web::http::{ConnectionType, StatusCode};
use actix_web::{dev::Service, web, App, HttpRequest, HttpResponse, HttpServer};
use actix_ws::{CloseCode, CloseReason, Message};
use ecdysis::tokio_ecdysis::{SignalKind, TokioEcdysisBuilder};
use ecdysis::Shutdown;
use futures::StreamExt;
use say::say;
use std::io;
use std::time::Duration;
use tokio::time::sleep;

/// How long an idle connection stays open, and how many seconds requests may run, after the upgrade.
const GRACE: Duration = Duration::from_secs(2);
const DRAIN: u64 = 30;

#[actix_web::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("main.rs"));
    let mut args = std::env::args().skip(1);
    let addr = args.next().unwrap_or("127.0.0.1:8080".into());

    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    builder.stop_on_signal(SignalKind::interrupt())?;
    let listener = builder.std_ecdysis().listen_tcp(addr.parse()?)?;
    let who = format!("gen={} pid={}", builder.generation(), std::process::id());
    say(format!("listening {} {who}", listener.local_addr()?));
    let (ecdysis, exit) = builder.ready()?;

    let (shutdown, body) = (ecdysis.shutdown(), format!("{who}\n"));
    let app = move || {
        let (shutdown, of_websockets, body) = (shutdown.clone(), shutdown.clone(), body.clone());
        App::new()
            .wrap_fn(move |request, service| {
                // Once this generation is over, every response is the last one on its connection.
                let (shutdown, answer) = (shutdown.clone(), service.call(request));
                async move {
                    let mut response = answer.await?;
                    if shutdown.is_over() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
                    }
                    Ok(response)
                }
            })
            .route("/", web::get().to(move || std::future::ready(body.clone())))
            .app_data(web::Data::new(of_websockets.clone()))
            .route("/echo", web::get().to(echo))
    };
    let server = HttpServer::new(app).workers(2).disable_signals().shutdown_timeout(DRAIN);
    let server = match (args.next(), args.next()) {
        (Some(cert), Some(key)) => server.listen_rustls_0_23(listener, tls::config(&cert, &key, &[])?)?.run(),
        _ => server.listen(listener)?.run(),
    };
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

/// An echo WebSocket, until this generation is over.
async fn echo(
    request: HttpRequest,
    body: web::Payload,
    shutdown: web::Data<Shutdown>,
) -> actix_web::Result<HttpResponse> {
    let (response, mut socket, mut messages) = actix_ws::handle(&request, body)?;
    let mut over = shutdown.over();
    actix_web::rt::spawn(async move {
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(Ok(Message::Text(text))) => drop(socket.text(text).await),
                    Some(Ok(Message::Binary(bytes))) => drop(socket.binary(bytes).await),
                    Some(Ok(Message::Ping(bytes))) => drop(socket.pong(&bytes).await),
                    Some(Ok(_)) => {}
                    _ => return,
                },
                () = &mut over => break,
            }
        }
        let restart = CloseReason { code: CloseCode::Restart, description: Some("service restart".into()) };
        let _ = socket.close(Some(restart)).await;
        // Wait for the client's own close frame. Closing before it arrives would reset the connection.
        while let Some(Ok(_)) = messages.next().await {}
    });
    Ok(response)
}
