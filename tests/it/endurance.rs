//! Many upgrades, many listeners, and very few free descriptors.
//!
//! `cargo test` makes 50 upgrades. `cargo test --release --test it endurance:: -- --ignored --nocapture` makes 2,000.

use std::io;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use crate::support::*;

const ARGS: [&str; 10] = [
    "--listen",
    "127.0.0.1:0",
    "--listen",
    "unix:DIR/sock",
    "--listen",
    "udp:127.0.0.1:0",
    "--pid-file",
    "DIR/pid",
    "--probation",
    "1",
];

/// The values that must not grow.
#[derive(Debug)]
struct Level {
    fds: usize,
    highest: i32,
    threads: usize,
    rss_kib: u64,
}

/// Returns the values of a process once the previous generation is gone and every accept loop has waited.
fn settled(server: &Server, pid: u32) -> Level {
    let addrs = server.stream_addrs();
    for addr in &addrs {
        ask(addr).unwrap();
    }
    let mut open = kinds(pid);
    let accepting = addrs.len();
    try_eventually("a settled server", || {
        open = kinds(pid);
        // One thread per listener, one for UDP, one in `run` and one for the observer; no connection is open.
        let sockets = open.values().filter(|to| *to == "socket").count();
        let epolls = open.values().filter(|to| *to == "anon_inode:[eventpoll]").count();
        sockets == 2 * (accepting + 1)
            && (cfg!(ecdysis_unix) || epolls == accepting)
            && threads(pid).len() == 3 + accepting
    })
    .unwrap_or_else(|e| panic!("{e}: {open:?}, {} threads", threads(pid).len()));
    Level {
        fds: open.len(),
        highest: *open.keys().max().unwrap(),
        threads: threads(pid).len(),
        rss_kib: status_field(pid, "VmRSS").trim_end_matches(" kB").parse().unwrap(),
    }
}

fn endure(upgrades: usize, args: &[&str]) {
    let server = Server::whoami([&ARGS, args].concat());
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(1));
    let began = Instant::now();
    let mut pid = server.first_pid();
    for at in 1..=upgrades {
        pid = upgrade(&server, pid);
        if at % 200 == 0 {
            println!("{at} upgrades in {:?}, {} requests", began.elapsed(), load.answered());
        }
    }
    let counts = load.stop();
    println!("{upgrades} upgrades {args:?} in {:?}, {} requests", began.elapsed(), counts.requests);
    counts.assert_none_failed();
    assert!(children(pid).is_empty());
    // The first generation differs, because it binds the sockets that later ones claim. All later ones are the same.
    let reference = Server::whoami([&ARGS, args].concat());
    let young_pid = (0..3).fold(reference.first_pid(), |pid, _| upgrade(&reference, pid));
    server.wait_serving();
    reference.wait_serving();
    let levels = || (settled(&server, pid), settled(&reference, young_pid));
    let equal = try_eventually("as many as after 3 upgrades", || {
        let (last, young) = levels();
        (last.fds, last.threads) == (young.fds, young.threads)
    });
    let (last, young) = levels();
    println!("  last {last:?}, after 3 upgrades {young:?}");
    equal.unwrap_or_else(|e| panic!("{e}: {:?}, {:?}", kinds(pid), kinds(young_pid)));
    // The numbers of the epoll descriptors depend on which thread is faster.
    assert!(last.highest < 32 && young.highest < 32);
    assert!(last.rss_kib < young.rss_kib + 2048, "{last:?}, after 3 upgrades {young:?}");
}

/// Upgrades, and returns the new process's PID once the old one has ended.
fn upgrade(server: &Server, pid: u32) -> u32 {
    let verdict = server.try_upgrade(pid).unwrap();
    assert!(verdict.starts_with("upgrade ok"), "{verdict}");
    eventually("the old process ends", || gone(pid));
    field(&verdict, "pid")
}

#[test]
fn fifty_upgrades_leave_nothing_behind() {
    endure(50, &[]);
}

#[test]
fn twenty_upgrades_with_fork_leave_nothing_behind() {
    endure(20, &["--fork"]);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test it endurance:: -- --ignored --nocapture"]
fn two_thousand_upgrades_leave_nothing_behind() {
    endure(2000, &[]);
}

/// Starts a server with this many listeners and this limit on descriptors.
fn crowded(listeners: usize, limit: libc::rlim_t) -> Server {
    let mut args = vec!["--probation", "10", "--pid-file", "DIR/pid"];
    for _ in 0..listeners {
        args.extend(["--listen", "127.0.0.1:0"]);
    }
    Server::whoami_with(&args, |command| {
        // SAFETY: a system call only.
        unsafe {
            command.pre_exec(move || {
                let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                match libc::setrlimit(libc::RLIMIT_NOFILE, &limit) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    })
}

/// Their manifest is larger than a new pipe. All have port 0, so only their order distinguishes them.
#[test]
fn a_thousand_listeners_are_handed_over_at_once() {
    let server = crowded(1000, 8192);
    let addrs = server.addrs();
    assert_eq!(addrs.len(), 1000);
    let load = Load::paced(&addrs[..2], Duration::from_millis(1));
    let mut pid = server.first_pid();
    for _ in 0..3 {
        let verdict = server.try_upgrade(pid).unwrap();
        assert!(verdict.starts_with("upgrade ok"), "{verdict}");
        pid = field(&verdict, "pid");
    }
    load.stop().assert_none_failed();
    let generations: Vec<u64> = addrs.iter().map(|addr| generation(addr)).collect();
    assert_eq!(generations, vec![4; 1000], "each port is served by the fourth generation");
}

/// With very few free descriptors an upgrade either works, or fails with an error that says so and the server keeps
/// serving. With more free descriptors the next upgrade works.
#[test]
fn with_hardly_a_descriptor_left_an_upgrade_fails_without_harm() {
    let server = crowded(4, 1024);
    let (addrs, pid) = (server.addrs(), server.first_pid());
    for addr in &addrs {
        ask(addr).unwrap();
    }
    let set_limit = |limit: libc::rlim_t| {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: 1024 };
        // SAFETY: `limit` is read, nothing is written.
        assert_eq!(unsafe { libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) }, 0);
    };
    let load = Load::paced(&addrs, Duration::from_millis(2));
    let mut open = fds(pid).len() as libc::rlim_t;
    eventually("a quiet moment", || {
        open = fds(pid).len() as libc::rlim_t;
        open == 3 + 4 * 3 + 4 || open == *fds(pid).keys().filter(|fd| **fd < 200).max().unwrap() as libc::rlim_t + 1
    });
    let mut failed = 0;
    let mut verdict = String::new();
    // The limit also applies to the child, which needs a few more descriptors while it starts.
    for room in 0..64 {
        set_limit(open + room);
        verdict = server.try_upgrade(pid).unwrap();
        if verdict.starts_with("upgrade ok") {
            break;
        }
        failed += 1;
        // The C library's message.
        let too_many = std::io::Error::from_raw_os_error(libc::EMFILE).to_string();
        assert!(verdict.contains(&too_many) || verdict.contains("child"), "{verdict}");
        assert!(children(pid).is_empty(), "a child was left behind: {verdict}");
    }
    assert!(failed > 0, "no limit was too low");
    assert!(verdict.starts_with("upgrade ok"), "with 64 descriptors of room: {verdict}");
    load.stop().assert_none_failed();
    println!("{failed} limits too low, each survived");
}
