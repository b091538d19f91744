//! Traps about sockets, tested with real processes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use crate::support::*;
use rustix::process::Signal;

/// With a blocking listener, each thread that polled it readable and lost the race would block in `accept` forever, and
/// accept one connection after the upgrade.
#[test]
fn no_old_code_accepts_after_an_upgrade() {
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--threads", "16", "--hold", "--probation", "50"]);
    let addr = server.addr();
    let load = Load::on(&addr, 4);
    // This connection keeps the old generation alive in its drain.
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

/// Parent and child share the flag, so changing it would change the accept loop of the other process.
#[test]
fn a_listener_is_nonblocking_in_every_generation() {
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--listen", "unix:DIR/sock", "--probation", "20000"]);
    let nonblocking = |pid: u32| {
        let listeners = fds(pid).into_iter().filter(|(_, target)| target.starts_with("socket:"));
        listeners.map(|(fd, _)| fd_flags(pid, fd).unwrap() & libc::O_NONBLOCK != 0).collect::<Vec<_>>()
    };
    assert_eq!(nonblocking(server.first_pid()), [true; 4], "two listeners, each held twice");
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    for pid in [server.first_pid(), server.pid()] {
        let all = nonblocking(pid);
        assert!(all.len() >= 4 && all.iter().all(|is| *is), "{all:?}");
    }
}

/// If a child accepted before it is ready and then failed, its connections would be lost.
#[test]
fn a_child_takes_nothing_before_it_is_ready() {
    let dir = tempdir();
    let how = dir.path().join("how");
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--misbehave", how.to_str().unwrap()]);
    let addr = server.addr();
    let load = Load::on(&addr, 2);
    for words in ["sleep=300 exit=3", "sleep=200 panic", "sleep=100 signal=9"] {
        fs::write(&how, words).unwrap();
        server.signal(Signal::HUP);
        server.wait("gen=2 pid=");
        let open: Vec<_> = (0..20).map(|_| connect(&addr).unwrap()).collect();
        let line = server.wait("upgrade ");
        assert!(line.starts_with("upgrade failed"), "{line}");
        for mut stream in open {
            stream.write_all(b"who\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(field::<u64>(&answer, "gen"), 1);
        }
    }
    load.stop().assert_none_failed();
}

/// There is no gap between the two, and clients never wait for a new version to warm up.
#[test]
fn the_parent_accepts_until_the_child_is_ready() {
    let dir = tempdir();
    let how = dir.path().join("how");
    fs::write(&how, "hang").unwrap();
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--misbehave", how.to_str().unwrap()]);
    server.signal(Signal::HUP);
    let child = server.wait("gen=2 pid=");
    for _ in 0..10 {
        assert_eq!(generation(&server.addr()), 1);
    }
    send_signal(field(&child, "pid"), Signal::KILL);
    server.wait("upgrade failed");
}

/// With a plain poll, a connection would wake every waiting thread.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "poll(2) wakes all")]
fn one_connection_wakes_one_thread() {
    const THREADS: usize = 16;
    let server = Server::whoami(["--listen", "127.0.0.1:0", "--threads", &THREADS.to_string()]);
    let (addr, pid) = (server.addr(), server.first_pid());
    // The threads of the accept loops, the main thread, and perhaps the observer's.
    eventually("all wait", || {
        let states = threads(pid);
        states.len() > THREADS && states.values().all(|state| *state == 'S')
    });
    let waiting = threads(pid);
    // The number of times that the threads have gone to sleep.
    let sleeps = || {
        let count = |tid: &u32| status_field(*tid, "voluntary_ctxt_switches").parse::<usize>().unwrap();
        waiting.keys().map(count).sum::<usize>()
    };
    let before = sleeps();
    for _ in 0..100 {
        ask(&addr).unwrap();
    }
    let woken = sleeps() - before;
    assert!(woken < 100 * THREADS / 2, "100 connections woke {woken} threads");
}

/// An error of one connection must not affect the others.
#[test]
fn a_connection_that_is_lost_ends_no_loop() {
    if !has_strace() {
        return;
    }
    for errno in ["ECONNABORTED", "EINTR", "EPROTO", "ENOBUFS"] {
        let mut command = Command::new("strace");
        let inject = format!("inject=accept4:error={errno}:when=1+2");
        command.args(["-f", "-o", "/dev/null", "-e", "trace=accept4", "-e", &inject]);
        command.arg(example("whoami")).args(["--listen", "127.0.0.1:0"]);
        let server = Server::serving(command);
        for _ in 0..3 {
            assert_eq!(generation(&server.addr()), 1, "{errno}");
        }
    }
}

#[test]
fn port_0_and_two_kinds_on_one_port() {
    // An address that only this process uses, so no port is taken.
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    let own = format!("127.{}.{}.1:7000", high.max(1), low);
    // Many containers have no IPv6.
    let last = ["[::1]:0", "127.0.0.2:0"].into_iter().find(|addr| std::net::TcpListener::bind(addr).is_ok()).unwrap();
    let mut args = [own.clone(), format!("udp:{own}"), "127.0.0.1:0".into(), last.into()];
    let dir = tempdir();
    let next = dir.path().join("next");
    let listen = args.iter().flat_map(|addr| ["--listen", addr]);
    let mut server = Server::whoami(listen.chain(["--exec", next.to_str().unwrap()]));
    // The order matters only among sockets of the same kind with the same address.
    args.reverse();
    script(&next, &format!("exec {} --listen {}", whoami_in_shell(), args.join(" --listen ")));
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

/// Otherwise the kernel would complete handshakes, and no process would ever answer.
#[test]
fn what_nobody_claims_is_closed() {
    let dir = tempdir();
    let next = dir.path().join("next");
    let args = ["--listen", "127.0.0.1:0", "--listen", "127.0.0.2:0", "--exec", next.to_str().unwrap()];
    let mut server = Server::whoami(args.into_iter().chain(["--probation", "50"]));
    let addrs = server.addrs();
    script(&next, &format!("exec {} --listen 127.0.0.1:0", whoami_in_shell()));
    server.upgrade();
    server.wait("ended gen=1");
    wait_exit(server.first_pid());
    assert_eq!(generation(&addrs[0]), 2);
    assert_eq!(connect(&addrs[1]).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Closing a listener resets the connections in its queue, so a stop accepts these first.
#[test]
fn a_stop_serves_what_waits_in_the_queue() {
    for kind in ["127.0.0.1:0", "unix:DIR/stop"] {
        let server = Server::whoami(["--listen", kind]);
        let addr = server.addr();
        // Make sure that the accept loop runs. A drain cannot wait for a thread that has not started it yet.
        assert_eq!(generation(&addr), 1);
        freeze(server.first_pid());
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
    second.args(["--listen", &listen]);
    let said = Server::start(second).wait("whoami: ");
    assert!(said.contains(&format!("unix {}", path.display())) && said.contains("in use"), "{said}");
    assert_eq!(generation(&listen), 1, "the live one was harmed");
    drop(server);
}

/// Binding the path of a live control socket by mistake checks whether the socket is stale. That check must not trigger
/// anything, although a connection to one of these sockets stops the server.
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
    assert!(line.contains("(SIGHUP)"), "{line}");
    assert_eq!(generation(&addr), 2);
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let dir = tempdir();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let started = output(Command::new(example("whoami")).args(["--listen", &format!("unix:{}", path.display())]));
    assert!(!started.status.success());
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
}

/// Many processes that start at the same time find the same stale file. One binds it, and no other takes it away.
#[test]
fn of_many_that_find_a_stale_socket_one_wins() {
    let dir = tempdir();
    let path = dir.path().join("s");
    let listen = format!("unix:{}", path.display());
    drop(UnixListener::bind(&path).unwrap());
    let traced = has_strace();
    let start = |number: usize| {
        let mut command = Command::new(if traced { "strace".into() } else { example("whoami") });
        if traced {
            // The delays let each process remove the file, if it may, after the earlier ones have bound theirs.
            let inject = format!("inject=?unlink,unlinkat:delay_enter={}", number * 100_000);
            command
                .args(["-f", "-o", "/dev/null", "-e", "trace=?unlink,unlinkat", "-e", &inject])
                .arg(example("whoami"));
        }
        command.args(["--listen", &listen]);
        Server::start(command)
    };
    let mut servers: Vec<_> = (1..=8).map(start).collect();
    let mut serving: Vec<u32> = Vec::new();
    for server in &mut servers {
        let line = server.wait("");
        if line.starts_with("listening") {
            serving.push(field(&line, "pid"));
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
    let server = Server::whoami(["--listen", &format!("unix:{}", path.display())]);
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert!(path.exists());
}

/// A level-triggered poll would spin. The loop must not end either.
#[test]
fn a_lack_of_descriptors_neither_spins_nor_ends_the_loop() {
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
    let sleeps = || {
        let count = |tid: u32| status_field(tid, "voluntary_ctxt_switches").parse::<u64>().unwrap();
        threads(pid).into_keys().map(count).sum::<u64>()
    };
    let (before, slept) = (busy(), sleeps());
    // A busy loop never sleeps, even if it gets little processor time.
    eventually("the accept loop waits", || sleeps() >= slept + 10);
    assert!(busy() - before <= 10, "{} ticks for 10 attempts", busy() - before);
    held.truncate(2);
    let mut stream = connect(&addr).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut line = [0; 6];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"gen=1 ");
}
