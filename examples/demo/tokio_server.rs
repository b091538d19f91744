//! The same server on Tokio: `demo --tokio`.

use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, StoppableStream, TokioEcdysisBuilder, UdpStream};
use ecdysis::{Ecdysis, Shutdown};
use futures::{Stream, StreamExt};
use std::{error::Error, io, process, thread};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};

use crate::load::now;
use crate::request::Use;
use crate::server::{say, tell, text, GRACE, PATIENCE};
use crate::Options;

pub fn serve(options: &Options) -> Result<(), Box<dyn Error>> {
    tokio::runtime::Runtime::new()?.block_on(run(options))
}

async fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let began = now();
    let mut builder = TokioEcdysisBuilder::from_builder(
        Ecdysis::builder().ready_timeout(options.timeout).probation(options.probation()).on_event(tell),
    )?;
    builder.upgrade_on_signal(SignalKind::hangup())?;
    builder.stop_on_signal(SignalKind::terminate())?;
    let (gen, pid) = (builder.generation(), process::id());
    let (shutdown, answer) = (builder.shutdown(), format!("gen={gen} pid={pid}"));
    let address = if let Some(path) = options.listen.strip_prefix("unix:") {
        let connections = builder.listen_unix(StopOnShutdown::Yes, path)?;
        tokio::spawn(each(connections, shutdown, answer, options.connections));
        options.listen.clone()
    } else if let Some(address) = options.listen.strip_prefix("udp:") {
        let stream = builder.build_stream_udp(StopOnShutdown::Yes, address.parse()?, |socket, address| {
            socket.bind(&address.into())?;
            Ok(socket.into())
        })?;
        let address = stream.get_ref().ok_or("over")?.local_addr()?;
        tokio::spawn(datagrams(stream, answer));
        format!("udp:{address}")
    } else {
        let connections = builder.listen_tcp(StopOnShutdown::Yes, options.listen.parse()?)?;
        let address = connections.get_ref().ok_or("over")?.local_addr()?;
        tokio::spawn(each(connections, shutdown, answer, options.connections));
        address.to_string()
    };
    let ready = now();
    let (ecdysis, exit) = builder.ready()?;
    say(format!("listening {address} gen={gen} pid={pid} began={began} ready={ready}"));

    // The demo holds the other end of stdin, so every generation ends when the demo ends for any reason.
    let stop = ecdysis.clone();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        stop.stop();
    });
    let (mode, reason) = exit.await?;
    let left = ecdysis.drain(options.timeout).await?;
    say(format!("ended gen={gen} pid={pid} left={left} at={} {mode:?} ({reason:?})", now()));
    Ok(())
}

async fn each<S, C>(mut connections: S, shutdown: Shutdown, answer: String, kept: Use)
where
    S: Stream<Item = io::Result<C>> + Unpin,
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    while let Some(Ok(connection)) = connections.next().await {
        let (guard, shutdown, answer) = (shutdown.guard(), shutdown.clone(), answer.clone());
        tokio::spawn(async move {
            let connection = BufReader::with_capacity(256, connection);
            let _ = replies(connection, &shutdown, &answer, kept).await;
            drop(guard);
        });
    }
}

/// Like `server::replies`.
async fn replies<C>(mut requests: BufReader<C>, shutdown: &Shutdown, answer: &str, kept: Use) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    while shutdown.next_request_async(&mut requests, PATIENCE, GRACE).await? {
        let mut line = String::new();
        while requests.read_line(&mut line).await? > 0 && kept == Use::Http && line != "\r\n" {
            line.clear();
        }
        let last = line.is_empty() || kept == Use::Once || shutdown.is_over();
        requests.write_all(text(answer, kept, last).as_bytes()).await?;
        if last {
            break;
        }
    }
    Ok(())
}

async fn datagrams(mut datagrams: StoppableStream<UdpStream>, answer: String) {
    while let Some(Ok((datagram, peer))) = datagrams.next().await {
        let Some(socket) = datagrams.get_ref() else { break };
        let _ = socket.send_to(&[answer.as_bytes(), b" ", &datagram].concat(), peer).await;
    }
}
