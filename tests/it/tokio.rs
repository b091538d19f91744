//! The asynchronous interface with real processes: `tokio_whoami`, alone and alternating with `whoami`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::*;
use ecdysis::tokio_ecdysis::{
    ExitFuture, ExitMode, ExitReason, SignalKind, StopOnShutdown, Stoppable, StoppableStream, TokioEcdysis,
    TokioEcdysisBuilder, UdpStream, UnixSeqpacketListenerStream,
};
use futures::StreamExt;
use rustix::process::Signal;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

const LOCAL: &str = "127.0.0.1:0";

fn command<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(example("tokio_whoami"));
    command.args(args);
    command
}

fn server<'a>(args: impl IntoIterator<Item = &'a str>) -> Server {
    Server::serving(command(args))
}

/// Upgrades, and waits until the new generation has reported that it serves, so that the next signal goes to it.
fn upgrade(server: &mut Server) {
    let new: u32 = field(&server.upgrade(), "pid");
    eventually("it serves", || server.pid() == new);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn upgrades_under_load() {
    for workers in ["0", "2"] {
        let mut server = server(["--listen", LOCAL, "--workers", workers, "--probation", "20"]);
        let load = Load::on(&server.addr(), 4);
        for _ in 0..10 {
            upgrade(&mut server);
        }
        load.stop().assert_none_failed();
        assert_eq!(generation(&server.addr()), 11);
    }
}

/// Each task notices the upgrade and the stop. A task that missed one would delay the drain.
#[test]
fn several_tasks_accept_from_one_stream() {
    let dir = tempdir();
    let socket = format!("unix:{}", path(&dir.path().join("socket")));
    for workers in ["0", "2"] {
        let args = ["--listen", LOCAL, "--listen", &socket, "--workers", workers, "--tasks", "3", "--drain", "600"];
        let mut server = server(args.into_iter().chain(["--probation", "20"]));
        let loads = [Load::on(&server.addr(), 2), Load::on(&socket, 2)];
        for gen in 1..4 {
            upgrade(&mut server);
            let ended = server.wait(&format!("ended gen={gen}"));
            assert!(ended.contains("left=0"), "{ended}");
        }
        for load in loads {
            load.stop().assert_none_failed();
        }
        let load = Load::paced(&[server.addr(), socket.clone()], Duration::from_millis(10));
        eventually("there is load", || load.answered() > 20);
        server.signal(Signal::TERM);
        let ended = server.wait("ended gen=4");
        assert!(ended.contains("left=0"), "{ended}");
        drop(load);
    }
}

#[test]
fn yields_nothing_before_ready() {
    let dir = tempdir();
    let gate = dir.path().join("gate");
    let mut server = Server::start(command(["--listen", LOCAL, "--gate", path(&gate)]));
    server.wait("listening ");
    // The kernel completes the handshake, and the task with the stream runs. The task must not accept the connection.
    let mut early = connect(&server.addr()).unwrap();
    early.write_all(b"who\n").unwrap();
    let mut opened = None;
    eventually("the gate", || {
        opened = unix(&gate).ok();
        opened.is_some()
    });
    let mut opened = opened.unwrap();
    let mut accepted = String::new();
    opened.read_to_string(&mut accepted).unwrap();
    assert_eq!(accepted, "accepted=0\n");
    server.wait("serving ");
    let mut answer = String::new();
    early.read_to_string(&mut answer).unwrap();
    assert_eq!(field::<u64>(&answer, "gen"), 1);
}

#[test]
fn a_generation_that_fails_before_ready_took_nothing() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let mut server = server(["--listen", LOCAL, "--misbehave", path(&misbehave), "--probation", "0"]);
    let load = Load::on(&server.addr(), 4);
    for (word, why) in [("sleep=200 exit=3", "exit status: 3"), ("sleep=200 refuse=today", "refused: today")] {
        fs::write(&misbehave, word).unwrap();
        let failed = server.fail_to_upgrade();
        assert!(failed.contains(why), "{failed}");
    }
    load.stop().assert_none_failed();
    assert_eq!(generation(&server.addr()), 1);
    fs::remove_file(&misbehave).unwrap();
    upgrade(&mut server);
    assert_eq!(generation(&server.addr()), 2);
}

#[test]
fn an_upgrade_does_not_block_a_current_thread_runtime() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    fs::write(&misbehave, "stop-self").unwrap();
    let mut server = server(["--listen", LOCAL, "--misbehave", path(&misbehave), "--probation", "100"]);
    let mut in_flight = connect(&server.addr()).unwrap();
    in_flight.write_all(b"wh").unwrap();

    let old = server.pid();
    server.signal(Signal::HUP);
    let child = field(&server.wait(" gen=2 "), "pid");
    frozen(child);
    // The only thread of the runtime keeps serving while the child starts.
    for _ in 0..10 {
        assert_eq!(generation(&server.addr()), 1);
    }
    send_signal(child, Signal::CONT);
    server.wait("upgrade ok");
    assert_eq!(generation(&server.addr()), 2);

    // The process that began a request also finishes it.
    in_flight.write_all(b"o\n").unwrap();
    let mut answer = String::new();
    in_flight.read_to_string(&mut answer).unwrap();
    assert_eq!(field::<u64>(&answer, "gen"), 1);
    server.wait("ended gen=1");
    wait_exit(old);
}

#[test]
fn hands_over_to_threads_and_back() {
    let dir = tempdir();
    let (current, socket) = (dir.path().join("current"), format!("unix:{}", path(&dir.path().join("socket"))));
    symlink(example("tokio_whoami"), &current).unwrap();
    let args = ["--listen", LOCAL, "--listen", &socket, "--exec", path(&current), "--probation", "20"];
    let mut server = server(args);
    let (tcp, unix) = (Load::on(&server.addr(), 2), Load::on(&socket, 2));
    for (gen, next) in [(2, "whoami"), (3, "tokio_whoami"), (4, "whoami"), (5, "whoami"), (6, "tokio_whoami")] {
        let new = dir.path().join("new");
        symlink(example(next), &new).unwrap();
        fs::rename(&new, &current).unwrap();
        upgrade(&mut server);
        assert_eq!((generation(&server.addr()), generation(&socket)), (gen, gen));
        let program = fs::read_link(format!("/proc/{}/exe", server.pid())).unwrap();
        assert_eq!(program, fs::canonicalize(example(next)).unwrap());
    }
    tcp.stop().assert_none_failed();
    unix.stop().assert_none_failed();
}

#[test]
fn a_stop_during_an_upgrade_stops_the_service() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    fs::write(&misbehave, "sleep=60000").unwrap();
    let mut server = server(["--listen", LOCAL, "--misbehave", path(&misbehave)]);
    server.signal(Signal::HUP);
    server.wait("upgrading ");
    server.signal(Signal::TERM);
    let ended = server.wait("ended gen=1");
    assert!(ended.contains("FullStop"), "{ended}");
    server.wait_all_ended();
}

#[test]
fn accepts_again_when_the_child_dies_on_probation() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let mut server = server(["--listen", LOCAL, "--misbehave", path(&misbehave), "--probation", "20000"]);
    fs::write(&misbehave, "die-after-ready=100").unwrap();
    let failed = server.fail_to_upgrade();
    assert!(failed.contains("died"), "{failed}");
    assert_eq!(generation(&server.addr()), 1);
    // Nothing is left of the dead child, and the next upgrade works.
    fs::remove_file(&misbehave).unwrap();
    send_signal(server.first_pid(), Signal::HUP);
    server.wait("committed ");
    // Parent and child are alive, and the parent's stream is paused.
    for _ in 0..10 {
        assert_eq!(generation(&server.addr()), 2);
    }
    // A stop of the parent stops both.
    send_signal(server.first_pid(), Signal::TERM);
    let over = server.wait("over gen=2");
    assert!(over.ends_with("FullStop (Parent)"), "{over}");
    server.wait_all_ended();
}

#[test]
fn udp_as_stream_and_as_stoppable() {
    for kind in ["udp", "stoppable-udp"] {
        let mut server = server(["--listen", &format!("{kind}:{LOCAL}"), "--probation", "20"]);
        let addr = server.addr();
        let client = UdpSocket::bind(LOCAL).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.connect(addr.rsplit_once("udp:").unwrap().1).unwrap();
        for gen in 1..=4 {
            let mut answer = [0; 100];
            client.send(b"hello").unwrap();
            let length = client.recv(&mut answer).unwrap();
            let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
            assert!(answer.ends_with(" hello"), "{answer}");
            assert_eq!(field::<u64>(&answer, "gen"), gen);
            upgrade(&mut server);
            server.wait("ended ");
        }
    }
}

#[test]
fn seqpacket_and_the_chain_of_datagram_pairs() {
    let dir = tempdir();
    let file = dir.path().join("records");
    let mut server = server(["--listen", &format!("seqpacket:{}", path(&file)), "--probation", "20"]);
    let ask = || {
        let connection = ecdysis::UnixSeqpacketConn::connect(&file).unwrap();
        let mut answers = Vec::new();
        for record in ["one", "two"] {
            connection.send(record.as_bytes()).unwrap();
            readable(&connection, "an answer");
            let mut answer = [0; 100];
            let length = connection.recv(&mut answer).unwrap();
            answers.push(String::from_utf8_lossy(&answer[..length]).into_owned());
        }
        assert!(answers[0].ends_with(" one") && answers[1].ends_with(" two"), "{answers:?}");
        field::<u64>(&answers[0], "gen")
    };
    assert_eq!(ask(), 1);
    for gen in 2..=4 {
        server.signal(Signal::HUP);
        server.wait(&format!("heard hello from gen={gen}"));
        server.wait(&format!("ended gen={}", gen - 1));
        assert_eq!(ask(), gen);
    }
    server.signal(Signal::TERM);
    server.wait("ended gen=4");
    assert!(!file.exists());
}

/// All features of a service manager, for a program that enables them after the start, as programs for 1.1.1 do.
#[cfg(feature = "systemd")]
#[test]
fn under_a_service_manager() {
    use std::os::unix::net::{UnixDatagram, UnixListener};
    let dir = tempdir();
    let (file, notify) = (dir.path().join("passed"), dir.path().join("notify"));
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    let hear = |what: &str| {
        let mut said = String::new();
        while !said.contains(what) {
            let mut message = [0; 4096];
            let length = manager.recv(&mut message).unwrap_or_else(|e| panic!("{what}: {e}; said {said:?}"));
            said = String::from_utf8_lossy(&message[..length]).into_owned();
        }
        said
    };
    // The unit's socket is descriptor 3.
    let passed = UnixListener::bind(&file).unwrap();
    let script = "exec 3>&1 1>/dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web exec \"$0\" \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, path(&example("tokio_whoami")), "--systemd", "--probation", "20"]);
    shell.args(["--listen", &format!("unit:web={}", path(&file))]);
    shell.env("NOTIFY_SOCKET", &notify).stdout(std::os::fd::OwnedFd::from(passed));
    let mut server = Server::serving(shell);
    assert!(hear("READY=1").contains("generation 1"));
    let addr = format!("unix:{}", path(&file));
    assert_eq!(generation(&addr), 1);
    for gen in 2..=3 {
        server.signal(Signal::HUP);
        hear("RELOADING=1");
        assert!(hear("MAINPID=").contains("READY=1"));
        hear("BARRIER=1");
        server.wait(&format!("ended gen={}", gen - 1));
        assert_eq!(generation(&addr), gen);
    }
    server.signal(Signal::USR2);
    let over = server.wait("over gen=3");
    assert!(over.contains("PartialStopWithSystemd"), "{over}");
    // The extension is the drain's deadline, and is requested when the drain has begun.
    hear("EXTEND_TIMEOUT_USEC=10000000");
    server.wait_all_ended();
    assert!(file.exists(), "it is the unit's");
}

#[test]
fn a_stranger_takes_over() {
    let dir = tempdir();
    let socket = dir.path().join("takeover");
    let args = ["--listen", LOCAL, "--takeover-socket", path(&socket), "--probation", "20"];
    let mut old = server(args);
    let load = Load::on(&old.addr(), 2);
    let mut new = server(args.into_iter().chain(["--take-over", path(&socket)]));
    old.wait("ended gen=1");
    old.wait_all_ended();
    load.stop().assert_none_failed();
    assert_eq!(generation(&old.addr()), 2);
    new.signal(Signal::TERM);
    new.wait("ended gen=2");
}

/// Connections in the queue would be reset when the listener closes.
#[test]
fn a_stop_takes_what_is_queued_first() {
    for workers in ["0", "2"] {
        let mut server = server(["--listen", LOCAL, "--workers", workers]);
        send_signal(server.pid(), Signal::STOP);
        let queued: Vec<_> = (0..100)
            .map(|_| {
                let mut connection = connect(&server.addr()).unwrap();
                connection.write_all(b"who\n").unwrap();
                connection
            })
            .collect();
        server.signal(Signal::TERM);
        send_signal(server.pid(), Signal::CONT);
        for (at, mut connection) in queued.into_iter().enumerate() {
            let mut answer = String::new();
            connection.read_to_string(&mut answer).unwrap_or_else(|e| panic!("connection {at}: {e}"));
            assert_eq!(field::<u64>(&answer, "gen"), 1);
        }
        let ended = server.wait("ended gen=1");
        assert!(ended.contains("left=0"), "{ended}");
    }
}

#[test]
fn a_stop_under_load_ends_accepting_soon() {
    for workers in ["0", "2"] {
        stops_soon_under_load(server(["--listen", LOCAL, "--workers", workers, "--drain", "600"]));
    }
}

#[test]
fn those_that_do_not_stop_go_on_after_a_stop_but_not_after_an_upgrade() {
    let dir = tempdir();
    let file = dir.path().join("socket");
    let unix = format!("unix:{}", path(&file));
    let mut server = server(["--listen", LOCAL, "--listen", &unix, "--keep", "--probation", "20"]);
    upgrade(&mut server);
    for _ in 0..10 {
        assert_eq!((generation(&server.addr()), generation(&unix)), (2, 2));
    }
    server.signal(Signal::TERM);
    server.wait("keeps on gen=2");
    assert_eq!((generation(&server.addr()), generation(&unix)), (2, 2));
}

#[test]
fn a_dropped_exit_future_changes_nothing() {
    let dir = tempdir();
    let socket = dir.path().join("control");
    let server = server(["--listen", LOCAL, "--forget-exit", "--control-socket", path(&socket), "--probation", "20"]);
    for gen in 2..5 {
        let answer = control(&socket, "upgrade\n").unwrap();
        assert!(answer.starts_with("upgraded "), "{answer}");
        assert_eq!(generation(&server.addr()), gen);
    }
    assert_eq!(control(&socket, "stop\n").unwrap(), "stopping\n");
    server.wait_all_ended();
}

#[test]
fn partial_stop_and_its_reason() {
    let mut server = server(["--listen", LOCAL]);
    server.signal(Signal::USR2);
    let over = server.wait("over gen=1");
    assert!(over.ends_with("PartialStop (Signal(SignalKind(12)))"), "{over}");
    server.wait_all_ended();
}

#[test]
fn a_lack_of_descriptors_ends_no_stream_and_no_trigger() {
    let dir = tempdir();
    let control_socket = dir.path().join("control");
    let server = {
        let mut shell = Command::new("sh");
        let program = example("tokio_whoami");
        shell.args(["-c", "ulimit -n 40; exec \"$0\" \"$@\"", path(&program)]);
        shell.args(["--listen", LOCAL, "--hold", "--control-socket", path(&control_socket)]);
        Server::serving(shell)
    };
    let mut held: Vec<_> = (0..60).map(|_| connect(&server.addr()).unwrap()).collect();
    for connection in &mut held {
        connection.write_all(b"who\n").unwrap();
    }
    eventually("no descriptor is left", || fds(server.pid()).len() >= 40);
    let last = held.pop().unwrap();
    let mut asks = unix(&control_socket).unwrap();
    asks.write_all(b"status\n").unwrap();
    asks.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(asks.read(&mut [0]).is_err(), "there is no descriptor for it");
    drop(held);
    asks.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(asks.read(&mut [0]).unwrap(), 1);
    let mut answer = String::new();
    BufReader::new(last).read_line(&mut answer).unwrap();
    assert_eq!(field::<u64>(&answer, "gen"), 1);
}

#[test]
fn descriptors_do_not_climb() {
    let dir = tempdir();
    let unix = format!("unix:{}", path(&dir.path().join("fds")));
    let mut server = server(["--listen", LOCAL, "--listen", &unix, "--probation", "0"]);
    let next = |server: &mut Server| {
        let old = server.pid();
        upgrade(server);
        // As long as a generation is alive, its successors need one more descriptor.
        wait_exit(old);
        fds(server.pid()).into_keys().collect::<Vec<_>>()
    };
    next(&mut server);
    let third = next(&mut server);
    let mut last = Vec::new();
    for _ in 0..20 {
        // Which numbers are used depends on the order in which processes end. On the fallbacks for other systems, a
        // flag has two descriptors.
        let limit = if cfg!(ecdysis_unix) { 60 } else { 30 };
        last = next(&mut server);
        assert!(last.last() < Some(&limit), "{last:?} after {third:?}");
    }
    // Some may be about to be opened or closed. A leak would be one in each generation.
    assert!(last.len() < third.len() + 10, "{last:?} after {third:?}");
}

/// One test, because a process can have only one started `Ecdysis` at a time.
#[test]
fn in_one_process() {
    if !is_alone("tokio::in_one_process") {
        return;
    }
    fn send<T: Send>() {}
    send::<StoppableStream<TcpListenerStream>>();
    send::<StoppableStream<UnixListenerStream>>();
    send::<StoppableStream<UnixSeqpacketListenerStream>>();
    send::<StoppableStream<UdpStream>>();
    send::<Stoppable<tokio::net::UdpSocket>>();
    send::<TokioEcdysisBuilder>();
    send::<TokioEcdysis>();
    send::<ExitFuture>();

    let listen = |builder: &TokioEcdysisBuilder| builder.listen_tcp(StopOnShutdown::Yes, LOCAL.parse().unwrap());
    let new = || TokioEcdysisBuilder::new(SignalKind::user_defined1()).unwrap();

    // Without a runtime this is an error. (Tokio alone would panic.)
    let builder = new();
    let error = listen(&builder).unwrap_err();
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ecdysis::Error>());
    assert!(matches!(inner, Some(ecdysis::Error::Socket { .. })), "{error:?}");
    drop(builder);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let deadline = |future| tokio::time::timeout(DEADLINE, future);

        // The builder is dropped before `ready`: the stream ends, although a connection is queued.
        let builder = new();
        let mut stream = listen(&builder).unwrap();
        let addr = stream.get_ref().unwrap().local_addr().unwrap();
        let _waiting = std::net::TcpStream::connect(addr).unwrap();
        tokio::select! {
            biased;
            _ = stream.next() => panic!("before ready"),
            _ = tokio::task::yield_now() => drop(builder),
        }
        assert!(stream.next().await.is_none());
        assert!(stream.next().await.is_none() && stream.get_ref().is_none());

        // An upgrade before `ready` is an error. A stop before `ready` takes effect after it.
        let builder = new();
        let mut stream = listen(&builder).unwrap();
        assert!(matches!(builder.upgrade().await, Err(ecdysis::Error::NotReady)));
        builder.stop();
        let (ecdysis, exit) = builder.ready().unwrap();
        let (mode, reason) = deadline(Box::pin(exit)).await.unwrap().unwrap();
        assert!(matches!(mode, ExitMode::FullStop), "{mode:?} {reason:?}");
        assert_eq!((reason.clone(), format!("{reason:?}").as_str()), (ExitReason::CALL, "Call"));
        ecdysis.over().await;
        assert!(stream.next().await.is_none());
        assert_eq!(ecdysis.drain(Duration::from_secs(20)).await.unwrap(), 0);
        assert!(matches!(ecdysis.upgrade().await, Err(ecdysis::Error::Over)));
    });
}

/// The file is chosen after the start, but it still has only one owner, so its previous contents are restored.
#[test]
fn a_pid_file_is_restored_when_a_takeover_is_given_up() {
    let dir = tempdir();
    let (socket, pid_file) = (dir.path().join("takeover"), dir.path().join("pid"));
    fs::write(&pid_file, "4711\n").unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let args = ["--listen", LOCAL, "--take-over", path(&socket), "--pid-file", path(&pid_file)];
    let mut new = Server::start(command(args));
    readable(&listener, "a process that takes over");
    let mut old = BufReader::new(listener.accept().unwrap().0);
    old.get_ref().set_read_timeout(Some(DEADLINE)).unwrap();
    let mut line = String::new();
    old.read_line(&mut line).unwrap();
    old.get_mut().write_all(b"ecdysis 1\ngeneration 1\nend\n").unwrap();
    while line != "ready\n" {
        line.clear();
        assert_ne!(old.read_line(&mut line).unwrap(), 0);
    }
    // Sending `serving` fails, and only then does it read the reason.
    old.get_ref().shutdown(std::net::Shutdown::Read).unwrap();
    old.get_mut().write_all(b"commit\n").unwrap();
    eventually("the file names it", || fs::read_to_string(&pid_file).unwrap() == format!("{}\n", new.first_pid()));
    old.get_mut().write_all(b"stop\n").unwrap();
    new.wait("gave up");
    new.wait_all_ended();
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), "4711\n");
}
