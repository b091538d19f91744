//! The probation, during which the parent can take the commit back; and the overlap of generations.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::*;
use rustix::process::Signal;

fn server(dir: &TempDir, more: &[&str]) -> (Server, impl Fn(&str)) {
    let how = dir.path().join("how");
    let args = ["--listen", "127.0.0.1:0", "--misbehave", how.to_str().unwrap()];
    (Server::whoami(args.iter().chain(more)), move |words: &str| fs::write(&how, words).unwrap())
}

/// With the libraries compared in the guide, no process serves then.
#[test]
fn a_child_that_dies_after_ready_gives_the_service_back() {
    for way in [&["--probation", "20000"][..], &["--probation", "20000", "--fork"]] {
        let dir = tempdir();
        let pid_file = dir.path().join("pid");
        let up = dir.path().join("up");
        let more = ["--pid-file", pid_file.to_str().unwrap(), "--upgrade-socket", up.to_str().unwrap()];
        let (server, misbehave) = server(&dir, &[way, &more].concat());
        let (addr, pid) = (server.addr(), server.first_pid());
        for after in [0, 50, 500] {
            misbehave(&format!("die-after-ready={after}"));
            let line = control(&up, "").unwrap();
            assert!(line.starts_with("failed: child ") && line.contains("signal: 9"), "{line}");
            let answer = ask(&addr).unwrap();
            assert_eq!(field::<u32>(&answer, "pid"), pid, "the first serves again");
            assert_eq!(fs::read_to_string(&pid_file).unwrap().trim(), pid.to_string());
            assert_eq!(children(pid), Default::default());
        }
        misbehave("");
        server.signal_first(Signal::HUP);
        eventually("the new one serves", || generation(&addr) == 2);
    }
}

/// New connections wait in the queue. None is refused, and only those that the dead child had accepted are reset.
#[test]
fn nobody_is_refused_when_a_child_dies() {
    let dir = tempdir();
    let (mut server, misbehave) = server(&dir, &["--probation", "20000", "--hold"]);
    let addr = server.addr();
    misbehave("die-after-ready=100");
    server.signal(Signal::HUP);
    server.wait("committed ");
    let mut refused = 0;
    let deadline = std::time::Instant::now() + DEADLINE;
    // Connections without a request: the kernel has a queue for each of them.
    while !server.said().iter().any(|line| line.starts_with("upgrade failed")) {
        // Without a free local port, a client sends nothing.
        refused += usize::from(connect(&addr).is_err_and(|e| e.kind() != ErrorKind::AddrNotAvailable));
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(refused, 0);
    let mut stream = connect(&addr).unwrap();
    stream.write_all(b"who\n").unwrap();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"gen=1 ");
}

#[test]
fn a_child_that_stops_on_purpose_is_not_taken_for_dead() {
    let dir = tempdir();
    let (mut server, misbehave) = server(&dir, &["--probation", "20000"]);
    let addr = server.addr();
    misbehave("stop-after-ready=50");
    server.signal(Signal::HUP);
    server.wait("upgrade ok");
    server.wait_all_ended();
    assert_eq!(connect(&addr).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn each_generation_upgrades_after_its_own_verdict() {
    let (mut server, addr) = {
        let server = Server::whoami(["--listen", "127.0.0.1:0", "--probation", "500"]);
        let addr = server.addr();
        (server, addr)
    };
    let load = Load::on(&addr, 1);
    for generation in 2..6 {
        server.signal(Signal::HUP);
        server.wait(&format!("serving gen={generation}"));
    }
    for generation in 1..4 {
        server.wait_any(&format!("ended gen={generation} "));
    }
    load.stop().assert_none_failed();
    assert_eq!(generation(&addr), 5);
    assert!(!server.said().iter().any(|line| line.contains("upgrade failed")));
}

#[test]
fn a_stop_during_the_probation_stops_the_service() {
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--probation", "20000"]);
    let addr = server.addr();
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    server.signal_first(Signal::TERM);
    server.wait_all_ended();
    assert_eq!(connect(&addr).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Such a signal, for example Ctrl-C in a terminal, is one request: the parent's copy does not end the child's delay,
/// and the child's stop does not end the parent's after a rollback.
#[test]
fn a_stop_of_the_process_group_is_delayed_as_one() {
    const DELAY: Duration = Duration::from_secs(2);
    for last in [2, 1] {
        let dir = tempdir();
        let verify = dir.path().join("verify");
        let args =
            ["--stop-delay", "2000", "--log", "--verify", verify.to_str().unwrap(), "--ready-timeout", "3600000"];
        let (mut server, _) = server(&dir, &args);
        let addr = server.addr();
        server.signal(Signal::HUP);
        server.wait("serving gen=2");
        let began = Instant::now();
        server.signal_all(Signal::TERM);
        server.wait_any("accepting for 2s more");
        server.wait_any("forwarded to pid");
        if last == 1 {
            fs::write(&verify, "bad").unwrap();
            server.wait_any("upgrade failed");
        }
        server.wait_any(&format!("ended gen={last} "));
        assert!(began.elapsed() >= DELAY, "after {:?}", began.elapsed());
        server.wait_all_ended();
        assert_eq!(connect(&addr).map(drop).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn no_thread_accepts_for_the_paused_parent() {
    let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--probation", "1000", "--threads", "8"]);
    let addr = server.addr();
    server.signal(Signal::HUP);
    server.wait("committed ");
    for _ in 0..200 {
        assert_eq!(generation(&addr), 2);
    }
    server.wait("upgrade ok");
}

/// `Overlap::Allow` is the default.
#[test]
fn overlap_allowed_each_generation_finishes_its_own() {
    let dir = tempdir();
    let ctl = dir.path().join("ctl");
    let (server, _) = server(&dir, &["--probation", "20", "--drain", "60", "--control-socket", ctl.to_str().unwrap()]);
    let addr = server.addr();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(hold(&addr, &ctl));
        upgrade(&ctl);
        server.wait_serving();
    }
    eventually("all four drain", || control(&ctl, "status\n").unwrap().contains("draining=1,2,3,4 "));
    for (stream, generation) in held.iter_mut().zip(1..) {
        assert_eq!(answer(stream), generation);
    }
    eventually("none drains", || control(&ctl, "status\n").unwrap().contains("draining= "));
}

/// The PID, age, phase and number of connections of each, from the newest to the oldest.
#[test]
fn the_status_tells_of_every_generation_that_drains() {
    for transport in ["pipes", "socket"] {
        let dir = tempdir();
        let ctl = dir.path().join("ctl");
        let more = ["--probation", "20", "--drain", "60", "--transport", transport];
        let (server, _) = server(&dir, &[&more[..], &["--control-socket", ctl.to_str().unwrap()]].concat());
        let (addr, first) = (server.addr(), server.first_pid());
        let mut held = vec![hold(&addr, &ctl)];
        held.push(connect(&addr).unwrap());
        let status = || control(&ctl, "status\n").unwrap();
        eventually("both are accepted", || field::<u64>(&status(), "connections") == 2);
        upgrade(&ctl);
        server.wait_serving();
        let second = server.pid();
        let mut of_second = hold(&addr, &ctl);
        upgrade(&ctl);
        server.wait_serving();
        let tells = |generation: u64, pid: u32, connections: u64| {
            let status = status();
            let begin = format!("older=generation:{generation},phase:draining,pid:{pid},uptime_ms:");
            let end = format!(",connections:{connections}");
            status.split(' ').any(|word| word.starts_with(&begin) && word.ends_with(&end))
        };
        eventually("both older ones are in it", || tells(1, first, 2) && tells(2, second, 1));
        assert_eq!(answer(&mut held[0]), 1);
        eventually("one connection less", || tells(1, first, 1) && tells(2, second, 1));
        assert_eq!(answer(&mut of_second), 2);
        eventually("one older generation is left", || tells(1, first, 1) && !status().contains("generation:2"));
        assert_eq!(answer(&mut held[1]), 1);
        eventually("none is left", || !status().contains("older="));
    }
}

#[test]
fn overlap_refused_while_the_grandparent_drains() {
    let dir = tempdir();
    let ctl = dir.path().join("ctl");
    let args = ["--probation", "20", "--overlap", "refuse", "--control-socket", ctl.to_str().unwrap()];
    let (server, _) = server(&dir, &args);
    let mut held = hold(&server.addr(), &ctl);
    upgrade(&ctl);
    server.wait_serving();
    let line = control(&ctl, "upgrade\n").unwrap();
    assert!(line.starts_with("failed: ") && line.contains("still drains"), "{line}");
    assert_eq!(answer(&mut held), 1);
    wait_exit(server.first_pid());
    upgrade(&ctl);
}

#[test]
fn overlap_bounded_the_oldest_ends_its_drain() {
    let dir = tempdir();
    let ctl = dir.path().join("ctl");
    let args = ["--probation", "20", "--overlap", "2", "--drain", "60", "--control-socket", ctl.to_str().unwrap()];
    let (server, _) = server(&dir, &args);
    let addr = server.addr();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(hold(&addr, &ctl));
        upgrade(&ctl);
        server.wait_serving();
    }
    // Generations 1 and 2 were asked to end their drain; 3 and 4 may drain.
    for generation in [1, 2] {
        let line = server.wait_any(&format!("ended gen={generation} "));
        assert_eq!(field::<u64>(&line, "left"), 1);
    }
    eventually("two generations drain", || control(&ctl, "status\n").unwrap().contains("draining=3,4 "));
    for (stream, generation) in held[2..].iter_mut().zip(3..) {
        assert_eq!(answer(stream), generation);
    }
}

fn upgrade(ctl: &Path) {
    let line = control(ctl, "upgrade\n").unwrap();
    assert!(line.starts_with("upgraded "), "{line}");
}

/// Opens a connection that the serving generation has accepted, but which has not sent its request yet.
fn hold(addr: &str, ctl: &Path) -> Box<dyn Conn> {
    let stream = connect(addr).unwrap();
    eventually("it is accepted", || field::<u64>(&control(ctl, "status\n").unwrap(), "connections") == 1);
    stream
}

/// Returns the generation that answers the request of a held connection.
fn answer(stream: &mut Box<dyn Conn>) -> u64 {
    stream.write_all(b"who\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    field(&answer, "gen")
}
