// A server on ecdysis 1.1.1 that uses every public item of its `tokio_ecdysis`, with its types in the signatures. It is
// built with that version and with this one, from the same source.
//
//     program DIRECTORY PORT

use bytes::BytesMut;
use ecdysis::tokio_ecdysis::{
    supervisor, ExitMode, ExitReason, SignalKind, StopOnShutdown, Stoppable, StoppableStream, TokioEcdysis,
    TokioEcdysisBuilder, TokioEcdysisUpgradeResult, UdpStream,
};
use ecdysis::{
    Ecdysis, SystemdNotifier, SystemdNotifierError, SystemdSocketError, SystemdSocketsReadError,
    UnixSeqpacketListenerStream,
};
use futures::{Stream, StreamExt};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{io, process, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, UnixDatagram, UnixStream};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

/// Writes each line with one call, because two generations share stderr.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write;
        let _ = io::stderr().write_all((format!($($words)*) + "\n").as_bytes());
    }};
}

struct Listeners {
    tcp: StoppableStream<TcpListenerStream>,
    built: supervisor::StoppableStream<TcpListenerStream>,
    unix: StoppableStream<UnixListenerStream>,
    passed: Option<StoppableStream<UnixListenerStream>>,
    records: StoppableStream<UnixSeqpacketListenerStream>,
    datagrams: StoppableStream<UdpStream>,
    socket: Stoppable<UdpSocket>,
}

impl Listeners {
    async fn open(ecdysis: &TokioEcdysis, dir: &Path, port: u16) -> io::Result<Listeners> {
        let (one, two) = (SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([127, 0, 0, 2], port)));
        Ok(Listeners {
            tcp: ecdysis.listen_tcp(StopOnShutdown::Yes, one)?,
            built: ecdysis.build_listen_tcp(StopOnShutdown::Yes, two, |b, addr| {
                b.set_reuse_address(true)?;
                b.bind(&addr.into())?;
                b.listen(128)?;
                Ok(b.into())
            })?,
            unix: ecdysis.listen_unix(supervisor::StopOnShutdown::No, dir.join("unix"))?,
            passed: passed(ecdysis, dir).await,
            records: ecdysis.listen_unix_seqpacket(StopOnShutdown::Yes, dir.join("records"))?,
            datagrams: ecdysis.build_stream_udp(StopOnShutdown::Yes, one, |b, addr| {
                b.bind(&addr.into())?;
                Ok(b.into())
            })?,
            socket: ecdysis.build_stoppable_socket_udp(StopOnShutdown::Yes, two, |b, addr| {
                b.bind(&addr.into())?;
                Ok(b.into())
            })?,
        })
    }

    fn serve(self, answer: &'static str) -> JoinSet<()> {
        let mut set = JoinSet::new();
        set.spawn(each::<_, TcpStream>(self.tcp, answer));
        set.spawn(each::<_, TcpStream>(self.built, answer));
        if let Some(passed) = self.passed {
            set.spawn(each::<_, UnixStream>(passed, answer));
        }
        set.spawn(records(self.records, answer));
        set.spawn(datagrams(self.datagrams));
        set.spawn(socket(self.socket, answer));
        // This stream continues after a stop.
        tokio::spawn(each::<_, UnixStream>(self.unix, answer));
        set
    }
}

async fn each<S, C>(mut connections: StoppableStream<S>, answer: &'static str)
where
    S: Stream<Item = io::Result<C>> + Unpin,
    C: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(mut connection)) = connections.next().await {
        let _ = connection.read(&mut [0; 64]).await;
        let _ = connection.write_all(answer.as_bytes()).await;
    }
}

async fn records(mut connections: StoppableStream<UnixSeqpacketListenerStream>, answer: &'static str) {
    while let Some(Ok(connection)) = connections.next().await {
        let mut record = [0; 64];
        let _length: io::Result<usize> = connection.recv(&mut record).await;
        let _length: io::Result<usize> = connection.send(answer.as_bytes()).await;
    }
}

/// It cannot answer, because the stream of 1.1.1 does not expose its socket.
async fn datagrams(mut datagrams: StoppableStream<UdpStream>) {
    while let Some(Ok((datagram, sender))) = datagrams.next().await {
        heard(datagram, sender);
    }
}

fn heard(datagram: BytesMut, sender: SocketAddr) {
    say!("heard {} from {sender} pid={}", String::from_utf8_lossy(&datagram), process::id());
}

async fn socket(mut socket: Stoppable<UdpSocket>, answer: &'static str) {
    let mut datagram = [0; 64];
    while let Some(Ok((_, sender))) = socket.until_stopped(|socket| socket.recv_from(&mut datagram)).await {
        let _ = socket.until_stopped_mut(|socket| socket.send_to(answer.as_bytes(), sender)).await;
    }
    let _: &mut UdpSocket = socket.as_unstoppable_mut();
    let _: &UdpSocket = socket.as_unstoppable_ref();
}

/// Takes the socket that the service manager passes, if there is one. It never passes the others.
async fn passed(ecdysis: &TokioEcdysis, dir: &Path) -> Option<StoppableStream<UnixListenerStream>> {
    use SystemdSocketError::*;
    let missing = |error: SystemdSocketError| match error {
        SystemdSocketsNotInitialized => "nothing was read".to_string(),
        SocketNotFoundInParent(_) => "not passed".to_string(),
        SocketNotFoundInChildRegistry(_) => "not handed over".to_string(),
        SockInfoIncorrect(_) => "another".to_string(),
        IoError(error) => panic!("{error}"),
    };
    let (yes, name, nowhere) = (|| StopOnShutdown::Yes, || "none".to_string(), SocketAddr::from(([127, 0, 0, 3], 9)));
    let found = ecdysis.systemd_listen_unix(yes(), "web".to_string(), dir.join("passed")).await;
    let none = [
        ecdysis.systemd_listen_unix(yes(), "unknown".to_string(), dir.join("passed")).await.err().map(missing),
        ecdysis.systemd_listen_tcp(yes(), name(), nowhere).await.err().map(missing),
        ecdysis.systemd_listen_unix_seqpacket(yes(), name(), dir.join("none")).await.err().map(missing),
        ecdysis.systemd_socket_udp(name(), nowhere).await.err().map(missing),
        ecdysis.systemd_stream_udp(yes(), name(), nowhere).await.err().map(missing),
    ];
    say!("passed {} {none:?}", found.is_ok());
    found.ok()
}

fn read(builder: &mut TokioEcdysisBuilder) -> &'static str {
    let result: Result<(), SystemdSocketsReadError> = builder.read_systemd_sockets();
    match result {
        Ok(()) => "read",
        Err(SystemdSocketsReadError::EnvironmentVariableError(_)) => "nothing",
        Err(SystemdSocketsReadError::DoesNotMatchListenPid) => "for another",
        Err(SystemdSocketsReadError::DuplicateSystemdSocketsRead) => "twice",
    }
}

fn notify(builder: &mut TokioEcdysisBuilder) -> &'static str {
    match builder.enable_systemd_notifications() {
        Ok(()) => "notifies",
        Err(SystemdNotifierError::NotifySocketUnset) => "silent",
        Err(SystemdNotifierError::SocketCreateError(error) | SystemdNotifierError::SocketConnectError(error)) => {
            panic!("{error}")
        }
    }
}

async fn say_stopping(mut notifier: SystemdNotifier) -> io::Result<()> {
    notifier.notify_ready().await?;
    notifier.notify_reloading().await?;
    notifier.notify_extend_timeouts(Duration::from_secs(1)).await?;
    notifier.notify([("STATUS", "so far")].into_iter()).await?;
    notifier.notify_stopping().await
}

async fn end(exit: impl Future<Output = TokioEcdysisUpgradeResult>) -> Result<String, String> {
    let (mode, reason): (ExitMode, ExitReason) = exit.await?;
    let mode = match mode {
        ExitMode::Upgrade => "upgrade",
        ExitMode::FullStop => "full stop",
        ExitMode::PartialStop => "partial stop",
        ExitMode::PartialStopWithSystemd(notifier) => {
            say_stopping(notifier).await.map_err(|error| error.to_string())?;
            "partial stop with systemd"
        }
    };
    let reason = match reason.clone() {
        ExitReason::Signal(kind) => format!("signal {}", kind.as_raw_value()),
        ExitReason::UnixListener(path) => format!("socket {}", path.file_name().unwrap().to_string_lossy()),
    };
    Ok(format!("{mode} by {reason}"))
}

fn blocking(ecdysis: &Ecdysis, dir: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    assert!(!dir.as_os_str().is_empty() && (ecdysis.is_child() || !dir.join("std").exists()));
    Ok(ecdysis.listen_unix(dir.join("std"))?)
}

#[tokio::main]
async fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().collect();
    let (dir, port) = (PathBuf::from(&arguments[1]), arguments[2].parse().unwrap());
    let mut builder: TokioEcdysisBuilder = TokioEcdysisBuilder::new(SignalKind::hangup()).unwrap();
    builder.stop_on_signal(SignalKind::terminate()).unwrap();
    builder.partial_stop_on_signal(SignalKind::user_defined1()).unwrap();
    builder.upgrade_on_socket(dir.join("upgrade")).unwrap();
    builder.stop_on_socket(dir.join("stop")).unwrap();
    builder.partial_stop_on_socket(dir.join("partial")).unwrap();
    builder.set_pid_file(dir.join("pid"));
    say!("systemd {} {} {}", notify(&mut builder), read(&mut builder), read(&mut builder));
    builder.extend_systemd_timeouts(Duration::from_secs(1)).await.unwrap();

    let gen = if builder.is_child() { 2 } else { 1 };
    let answer: &'static str = format!("gen={gen} pid={}\n", process::id()).leak();
    let mut serving = Listeners::open(&builder, &dir, port).await.unwrap().serve(answer);
    let _std = blocking(builder.std_ecdysis(), &dir).unwrap();
    let (parent, child): (Option<io::Result<UnixDatagram>>, io::Result<UnixDatagram>) =
        builder.unix_datagram_pair("chain".to_string());
    if let Some(parent) = parent {
        parent.unwrap().send(b"hello").await.unwrap();
    }
    let child = child.unwrap();
    tokio::spawn(async move {
        let length = child.recv(&mut [0; 64]).await.unwrap();
        say!("greeted with {length} bytes");
    });

    let (ecdysis, exit) = builder.ready().unwrap();
    let ecdysis: Arc<TokioEcdysis> = ecdysis;
    say!("serving gen={gen} pid={} child={}", process::id(), ecdysis.is_child());
    let how = end(exit).await?;
    while serving.join_next().await.is_some() {}
    say!("ended {how} pid={}", process::id());
    Ok(())
}
