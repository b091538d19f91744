//! The traps about sockets, with real processes.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::Command;

use rustix::process::Signal;
use support::*;

/// With blocking listeners, every thread that polled readable and lost the race would sit in `accept` for ever, and
/// take one connection each after the upgrade.
#[test]
fn no_old_code_accepts_after_an_upgrade() {
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--threads", "16", "--hold", "--probation", "50"]);
    let addr = server.addr();
    let load = Load::on(&addr, 4);
    // Keeps the old generation alive, in its drain.
    let mut held = connect(&addr).unwrap();
    held.write_all(b"who\n").unwrap();
    let mut line = [0; 6];
    held.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"gen=1 ");
    server.upgrade();
    drop(load);
    for _ in 0..64 {
        let mut stream = connect(&addr).unwrap();
        stream.write_all(b"who\n").unwrap();
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"gen=2 ");
    }
}

/// A child that accepted before its ready would take connections along when it then fails.
#[test]
fn a_child_takes_nothing_before_it_is_ready() {
    let dir = tempdir();
    let how = dir.path().join("how");
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--misbehave", how.to_str().unwrap()]);
    let addr = server.addr();
    let load = Load::on(&addr, 2);
    for words in ["sleep=300 exit=3", "sleep=200 panic", "sleep=100 signal=9"] {
        fs::write(&how, words).unwrap();
        server.fail_to_upgrade();
    }
    load.stop().assert_none_failed();
    assert_eq!(generation(&addr), 1);
}

#[test]
fn port_0_and_two_kinds_on_one_port() {
    // An address of this process's own, on which no port is taken.
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    let own = format!("127.{}.{}.1:7000", high.max(1), low);
    let args = [own.clone(), format!("udp:{own}"), "127.0.0.1:0".into(), "[::1]:0".into()];
    let mut server = Server::whoami(args.iter().flat_map(|addr| ["--listen", addr]));
    let before = server.addrs();
    server.upgrade();
    for addr in [&before[0], &before[2], &before[3]] {
        assert_eq!(generation(addr), 2, "{addr}");
    }
    let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.send_to(b"x", before[1].strip_prefix("udp:").unwrap()).unwrap();
    let mut answer = [0; 100];
    let n = client.recv(&mut answer).unwrap();
    assert!(answer[..n].starts_with(b"gen=2 "));
}

/// The kernel would complete handshakes for it, and nobody would ever answer.
#[test]
fn what_nobody_claims_is_closed() {
    let dir = tempdir();
    let next = dir.path().join("next");
    let args = ["--listen", "127.0.0.1:0", "--listen", "127.0.0.2:0", "--exec", next.to_str().unwrap()];
    let mut server = Server::whoami(args.into_iter().chain(["--probation", "50"]));
    let addrs = server.addrs();
    let whoami = example("whoami");
    fs::write(&next, format!("#!/bin/sh\nexec {} --listen 127.0.0.1:0\n", whoami.display())).unwrap();
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).unwrap();
    server.upgrade();
    server.wait("ended gen=1");
    wait_exit(server.first_pid());
    assert_eq!(generation(&addrs[0]), 2);
    assert_eq!(connect(&addrs[1]).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Closing a listener resets what waits in its queue: at a stop that is accepted first.
#[test]
fn a_stop_serves_what_waits_in_the_queue() {
    for kind in ["127.0.0.1:0", "unix:@stop"] {
        let name = format!("{kind}-{}", std::process::id());
        let kind = if kind.starts_with("unix") { &name } else { kind };
        let mut server = Server::whoami(["--listen", kind]);
        let addr = server.addr();
        // The accept loop runs: a drain cannot wait for a thread that has not come so far.
        assert_eq!(generation(&addr), 1);
        server.signal(Signal::STOP);
        eventually("stopped", || threads(server.first_pid()).values().all(|state| *state == 'T'));
        let mut waiting: Vec<_> = (0..50).map(|_| connect(&addr).unwrap()).collect();
        for stream in &mut waiting {
            stream.write_all(b"who\n").unwrap();
        }
        server.signal(Signal::TERM);
        server.signal(Signal::CONT);
        for mut stream in waiting {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("gen=1 "), "{answer:?}");
        }
        server.wait_all_ended();
    }
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempdir();
    let path = dir.path().join("s");
    let listen = format!("unix:{}", path.display());
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::whoami(["--listen", &listen]);
    assert_eq!(generation(&listen), 1);

    let mut second = Command::new(example("whoami"));
    let second = second.args(["--listen", &listen]).output().unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains(&format!("unix {}", path.display())) && said.contains("in use"), "{said}");
    assert_eq!(generation(&listen), 1, "the live one was harmed");
    drop(server);
}

/// Whoever binds the path of a live control socket by mistake looks whether it is stale, and must not ask for anything
/// by looking: a connection to one of these stops the server.
#[test]
fn looking_whether_a_socket_is_stale_triggers_nothing() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut args = vec!["--listen".to_owned(), "127.0.0.1:0".into()];
    let sockets = ["stop", "partial-stop", "upgrade", "control", "takeover"];
    for name in sockets {
        args.extend([format!("--{name}-socket"), path(name)]);
    }
    let mut server = Server::whoami(&args);
    let addr = server.addr();
    for name in sockets {
        let mut second = Command::new(example("whoami"));
        second.args(["--listen", &format!("unix:{}", path(name))]);
        let line = Server::start(second).wait("whoami: ");
        assert!(line.contains("in use"), "{name}: {line}");
    }
    server.upgrade();
    let line = server.wait_any("ended gen=1 ");
    assert!(line.contains("(signal 1)"), "{line}");
    assert_eq!(generation(&addr), 2);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let dir = tempdir();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let output = Command::new(example("whoami")).args(["--listen", &format!("unix:{}", path.display())]).output();
    assert!(!output.unwrap().status.success());
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
}

/// Many that start at a time find the same stale file: one gets it, and is not robbed of it.
#[test]
fn of_many_that_find_a_stale_socket_one_wins() {
    let dir = tempdir();
    let path = dir.path().join("s");
    let listen = format!("unix:{}", path.display());
    drop(UnixListener::bind(&path).unwrap());
    let mut servers: Vec<_> = (0..8)
        .map(|_| {
            let mut command = Command::new(example("whoami"));
            command.args(["--listen", &listen]);
            Server::start(command)
        })
        .collect();
    let mut serving = Vec::new();
    for server in &mut servers {
        let line = server.wait("");
        if line.starts_with("listening") {
            serving.push(server.first_pid());
        }
    }
    assert_eq!(serving.len(), 1, "{serving:?}");
    assert_eq!(field::<u32>(&ask(&listen).unwrap(), "pid"), serving[0]);
}

#[test]
fn a_unix_socket_file_outlives_upgrades_and_goes_with_a_stop() {
    let dir = tempdir();
    let path = dir.path().join("s");
    let listen = format!("unix:{}", path.display());
    let mut server = Server::whoami(["--listen", &listen, "--probation", "50"]);
    let inode = fs::metadata(&path).unwrap().ino();
    let load = Load::on(&listen, 2);
    for _ in 0..3 {
        server.upgrade();
        server.wait("ended ");
    }
    load.stop().assert_none_failed();
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert!(!path.exists());
}

#[test]
fn a_stop_leaves_a_socket_file_that_is_not_ours() {
    let dir = tempdir();
    let path = dir.path().join("s");
    let mut server = Server::whoami(["--listen", &format!("unix:{}", path.display())]);
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert!(path.exists());
}

/// A level-triggered poll would spin; and the loop must not end.
#[test]
fn a_want_of_descriptors_neither_spins_nor_ends_the_loop() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 24; exec \"$0\" --listen 127.0.0.1:0 --hold"]).arg(example("whoami"));
    let server = Server::serving(command);
    let addr = server.addr();
    let mut held: Vec<_> = (0..30).map(|_| connect(&addr).unwrap()).collect();
    let pid = server.first_pid();
    eventually("no descriptor is left", || fds(pid).range(..24).count() == 24);
    let busy = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let times = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        times.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = busy();
    // Nothing to wait for but time: this measures that none is used.
    assert!(rustix::event::poll(&mut [], Some(&timespec(std::time::Duration::from_millis(500)))).is_ok());
    assert!(busy() - before <= 10, "{} ticks of 50 in half a second", busy() - before);
    held.truncate(2);
    let mut stream = connect(&addr).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = [0; 6];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"gen=1 ");
}
