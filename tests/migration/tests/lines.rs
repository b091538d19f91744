//! Checks that the replacement lines in `src/guide/migrating.md` compile.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use futures::StreamExt;
use new::tokio_ecdysis::{
    Socket, StopOnShutdown, StoppableStream, TokioEcdysis, TokioEcdysisUpgradeResult, UnixSeqpacketListenerStream,
};
use tokio_seqpacket::UnixSeqpacket;

fn build(b: Socket, addr: SocketAddr) -> io::Result<TcpListener> {
    socket2::SockRef::from(&b).set_tos(16)?;
    b.bind(&addr.into())?;
    b.listen(128)?;
    Ok(b.into())
}

async fn next(stream: &mut StoppableStream<UnixSeqpacketListenerStream>) -> io::Result<UnixSeqpacket> {
    let c = stream.next().await.unwrap()?;
    UnixSeqpacket::try_from(OwnedFd::from(c))
}

fn exited(result: TokioEcdysisUpgradeResult) -> Result<(), String> {
    result?;
    Ok(())
}

fn blocking(ecdysis: &TokioEcdysis, addr: SocketAddr) -> io::Result<TcpListener> {
    ecdysis.std_ecdysis().build_listen_tcp(addr, |b, addr| {
        b.bind(addr)?;
        b.listen(128)?;
        Ok(b.into())
    })?;
    ecdysis.std_ecdysis().stop();
    Ok(ecdysis.std_ecdysis().listen_tcp(addr)?)
}

/// The items in the table for synchronous programs.
fn synchronous(addr: SocketAddr) -> Result<(), new::Error> {
    let starting = new::Ecdysis::builder().upgrade_on_signal(1).pid_file("pid").start()?;
    let _: (bool, u64) = (starting.is_child(), starting.generation());
    let listener: TcpListener = starting.listen_tcp(addr)?;
    let _: std::os::unix::net::UnixListener = starting.listen_unix("socket")?;
    let (_, _): (Option<UnixDatagram>, Result<UnixDatagram, _>) = starting.unix_datagram_pair("chain");
    let server: new::Ecdysis = starting.ready()?;
    for _connection in server.shutdown().incoming(&listener) {}
    let _: (u32, u64, Duration) = server.upgrade().map(|new| (new.pid, new.generation, new.commit))?;
    server.stop();
    server.run().map(drop)
}

#[test]
fn lines_compile_and_a_seqpacket_connection_works_as_the_other_type() {
    let _ = (exited as fn(_) -> _, blocking as fn(_, _) -> _, synchronous as fn(_) -> _);
    let dir = tempfile::tempdir().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let builder = new::tokio_ecdysis::TokioEcdysisBuilder::new(tokio::signal::unix::SignalKind::hangup()).unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let _tcp = builder.build_listen_tcp(StopOnShutdown::Yes, addr, build).unwrap();
        let mut records = builder.listen_unix_seqpacket(StopOnShutdown::Yes, dir.path().join("records")).unwrap();
        let _ready = builder.ready().unwrap();
        let client = UnixSeqpacket::connect(dir.path().join("records")).await.unwrap();
        let server = next(&mut records).await.unwrap();
        client.send(b"hello").await.unwrap();
        let mut record = [0; 64];
        assert_eq!(server.recv(&mut record).await.unwrap(), 5);
    });
}
