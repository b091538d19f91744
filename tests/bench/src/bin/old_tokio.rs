//! The same small server with `ecdysis` 1.1.1 and Tokio, written like that crate's own example.

use std::io;

use ecdysis_bench::rate::{count, report_rate_of};
use ecdysis_bench::{say_serving, say_upgraded, sys, Args};
use old::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_stream::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    sys::mark("main");
    let args = Args::get();
    let builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    if args.text("way") == Some("count") {
        // It does not expose the actual port for port 0.
        let port = args.number("port", 0) as u16;
        let mut stream = builder.listen_tcp(StopOnShutdown::Yes, ([127, 0, 0, 1], port).into())?;
        let _running = builder.ready()?;
        std::thread::spawn(move || report_rate_of(port));
        while let Some(Ok(stream)) = stream.next().await {
            count(stream);
        }
        return Ok(());
    }
    let mut serving = Vec::new();
    for address in args.addresses() {
        let mut stream = builder.listen_tcp(StopOnShutdown::Yes, address)?;
        serving.push(tokio::spawn(async move {
            while let Some(Ok(stream)) = stream.next().await {
                tokio::spawn(answer(stream));
            }
        }));
    }
    let (_ecdysis, upgraded) = builder.ready()?;
    sys::mark("ready");
    say_serving();
    // The signal starts its upgrade inside this future. The measuring program knows when it sent the signal.
    let since = sys::now();
    upgraded.await.map_err(|e| io::Error::other(format!("{e:?}")))?;
    let committed = sys::now();
    sys::mark("end");
    say_upgraded(since, committed);
    for task in serving {
        task.await?;
    }
    Ok(())
}

async fn answer(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    if matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {
        let _ = stream.write_all(b"served\n").await;
    }
}
