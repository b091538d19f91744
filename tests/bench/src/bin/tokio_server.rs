//! This library under Tokio: `way=count` accepts and counts, `way=over` waits for the end in many tasks, `way=watch`
//! does so with Tokio's own watch, `way=drain-tasks` and `way=drain-guards` drain.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use ecdysis::{Ecdysis, Shutdown};
use ecdysis_bench::rate::{count, report_rate_of};
use ecdysis_bench::{hear, say, Args};
use tokio::sync::{watch, Barrier};
use tokio_stream::StreamExt;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::get();
    match args.text("way") {
        Some("count") => Ok(accept(&args).await?),
        Some("over") => Ok(over(&args, true).await?),
        Some("watch") => Ok(over(&args, false).await?),
        Some("drain-tasks") => drain(args.number("count", 10_000), true).await,
        _ => drain(args.number("count", 10_000), false).await,
    }
}

async fn accept(args: &Args) -> io::Result<()> {
    let builder = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    let port = args.number("port", 0) as u16;
    let mut stream = builder.listen_tcp(StopOnShutdown::Yes, ([127, 0, 0, 1], port).into())?;
    let _running = builder.ready()?;
    std::thread::spawn(move || report_rate_of(port));
    while let Some(Ok(stream)) = stream.next().await {
        count(stream);
    }
    Ok(())
}

/// Each task creates the future again in each turn of its `select!`, as loops of servers do.
async fn over(args: &Args, ours: bool) -> Result<(), ecdysis::Error> {
    let (tasks, turns) = (args.number("tasks", 64), args.number("turns", 20_000));
    let service = Ecdysis::builder().start()?.ready()?;
    let (_sender, receiver) = watch::channel(false);
    let begin = Arc::new(Barrier::new(tasks + 1));
    let mut all = Vec::new();
    for _ in 0..tasks {
        let (shutdown, mut receiver, begin) = (service.shutdown(), receiver.clone(), begin.clone());
        all.push(tokio::spawn(async move {
            begin.wait().await;
            for _ in 0..turns {
                if ours {
                    tokio::select! { biased; () = shutdown.over() => return, () = tokio::task::yield_now() => {} }
                } else {
                    tokio::select! { biased; _ = receiver.changed() => return, () = tokio::task::yield_now() => {} }
                }
            }
        }));
    }
    begin.wait().await;
    let since = Instant::now();
    for task in all {
        let _ = task.await;
    }
    let turn = since.elapsed().as_nanos() as f64 / (tasks * turns) as f64;
    say(&format!("turn ns={turn:.1}"));
    Ok(())
}

/// Measures the time from the stop to the return of `drain`, with this many guards, held by tasks or by a thread.
async fn drain(count: usize, tasks: bool) -> Result<(), Box<dyn std::error::Error>> {
    let service = Ecdysis::builder().start()?.ready()?;
    let shutdown = service.shutdown();
    let held: Vec<_> = (0..count).map(|_| shutdown.guard()).collect();
    if tasks {
        for guard in held {
            let over = shutdown.over();
            tokio::spawn(async move {
                over.await;
                drop(guard);
            });
        }
    } else {
        let over = shutdown.clone();
        std::thread::spawn(move || {
            over.wait();
            drop(held);
        });
    }
    say("ready");
    hear();
    let since = Instant::now();
    service.stop();
    let left = tokio::task::spawn_blocking(move || Shutdown::drain(&shutdown, Duration::from_secs(30))).await?;
    say(&format!("drained ns={} left={left}", since.elapsed().as_nanos()));
    Ok(())
}
