//! `hold` with real servers: it keeps one PID whatever happens to them, and its exit code says what happened. The tests
//! in `supervisors` run it under real supervisors.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
#[cfg(feature = "systemd")]
use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::net::{sendmsg_addr, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix};
use rustix::process::Signal;

use crate::support::*;

const SPEAKS: bool = cfg!(feature = "systemd");

/// Starts a server under `hold`. The server sends notifications if this build supports them.
fn held(options: &[&str], arguments: &[&str]) -> Server {
    let speaks: &[&str] = if SPEAKS { &["--systemd"] } else { &[] };
    silently_held(options, &[arguments, speaks].concat())
}

/// Starts a server that sends no notifications.
fn silently_held(options: &[&str], arguments: &[&str]) -> Server {
    let mut command = Command::new(example("hold"));
    command.args(options).arg("--").arg(example("whoami")).args(["--listen", "127.0.0.1:0", "--probation", "50"]);
    command.args(arguments).stdout(std::process::Stdio::null());
    Server::serving(command)
}

fn upgrade(server: &mut Server) -> u32 {
    send_signal(server.first_pid(), Signal::HUP);
    let line = server.wait("upgrade ");
    assert!(line.starts_with("upgrade ok"), "{line}");
    field(&line, "pid")
}

fn stop(server: &mut Server) -> Option<i32> {
    send_signal(server.first_pid(), Signal::TERM);
    server.wait_all_ended();
    server.exit_code()
}

fn ten_upgrades_and_a_stop(mut server: Server) {
    let (hold, addr) = (server.first_pid(), server.addr());
    let load = Load::on(&addr, 2);
    for expected in 2..=11 {
        let pid = upgrade(&mut server);
        eventually("the new one answers", || generation(&addr) == expected);
        assert!(Path::new(&format!("/proc/{pid}")).exists() && pid != hold);
    }
    load.stop().assert_none_failed();
    eventually("what was replaced is reaped", || children(hold).len() == 1);
    assert_eq!(threads(hold).len(), 1);
    let memory: u64 = status_field(hold, "VmRSS").split(' ').next().unwrap().parse().unwrap();
    println!("hold: {memory} KiB resident");
    assert!(memory <= 3 << 10, "{memory} KiB");

    // A stop drains connections.
    let mut open = connect(&addr).unwrap();
    ask(&addr).unwrap(); // An answer here means that the connection before it was accepted too.
    send_signal(hold, Signal::TERM);
    server.wait("hold: sent signal=15");
    open.write_all(b"who\n").unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).unwrap();
    assert_eq!(field::<u32>(&answer, "gen"), 11);
    server.wait_all_ended();
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn ten_upgrades_under_load_and_a_stop_that_drains() {
    ten_upgrades_and_a_stop(held(&[], &[]));
}

#[test]
fn a_server_that_never_says_ready_is_upgraded_and_stopped_too() {
    ten_upgrades_and_a_stop(silently_held(&[], &[]));
}

/// The program may be a script that executes the server, so the server has another name.
#[test]
fn a_silent_server_behind_a_script_is_followed() {
    let script = format!("sleep 0.3; exec {} --listen 127.0.0.1:0 --probation 50", whoami_in_shell());
    let mut command = Command::new(example("hold"));
    command.args(["--", "sh", "-c", &script]).stdout(std::process::Stdio::null());
    let mut server = Server::serving(command);
    upgrade(&mut server);
    upgrade(&mut server);
    assert_eq!(stop(&mut server), Some(0));
}

/// Later generations of a silent server are children of the earlier ones, which still drain.
#[test]
fn a_signal_goes_to_the_one_that_serves_while_others_drain() {
    let mut server = silently_held(&[], &["--hold", "--drain", "60"]);
    let addr = server.addr();
    let mut open = Vec::new();
    for generation in 1..=4 {
        let mut stream = connect(&addr).unwrap();
        stream.write_all(b"who\n").unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer[..], format!("gen={generation} ").as_bytes());
        // The connection is in use, because a line has begun.
        stream.write_all(b"w").unwrap();
        open.push(stream);
        if generation < 4 {
            upgrade(&mut server);
            server.wait_serving();
        }
    }
    send_signal(server.first_pid(), Signal::TERM);
    server.wait("hold: sent signal=15");
    for mut stream in open {
        stream.write_all(b"ho\n").unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("gen="), "{rest}");
    }
    server.wait_all_ended();
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_failed_upgrade_changes_nothing() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let mut server = held(&[], &["--misbehave", misbehave.to_str().unwrap()]);
    let (addr, pid) = (server.addr(), server.pid());
    let load = Load::on(&addr, 1);
    for wrong in ["exit=3", "refuse=config: line 3 is bad", "signal=11"] {
        fs::write(&misbehave, wrong).unwrap();
        send_signal(server.first_pid(), Signal::HUP);
        let line = server.wait("upgrade ");
        assert!(line.starts_with("upgrade failed"), "{line}");
        assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), pid);
    }
    fs::remove_file(&misbehave).unwrap();
    upgrade(&mut server);
    load.stop().assert_none_failed();
    assert_eq!(stop(&mut server), Some(0));
}

#[cfg(feature = "systemd")]
#[test]
fn a_crash_refuses_no_connection_and_too_many_end_the_service() {
    let mut server = held(&["--restarts", "2/600"], &[]);
    let addr = server.addr();
    upgrade(&mut server);
    for crash in 1..=2 {
        let load = Load::on(&addr, 2);
        let answered = load.answered();
        eventually("load", || load.answered() > answered + 100);
        // The next process serves the connection that waits in the queue.
        let pid = server.pid();
        freeze(pid);
        let mut waiting = connect(&addr).unwrap();
        send_signal(pid, Signal::KILL);
        waiting.write_all(b"who\n").unwrap();
        let mut answer = String::new();
        waiting.read_to_string(&mut answer).unwrap();
        let next: u32 = field(&answer, "pid");
        assert!(next != pid && answer.contains("gen=1 "), "{answer}");
        server.wait(&format!("hold: ready pid={next}"));
        // It sends the message first.
        server.wait_any(&format!("serving gen=1 pid={next}"));
        let counts = load.stop();
        println!("crash {crash}: {counts:?}");
        assert!(!counts.failures.keys().any(|kind| kind.starts_with("Refused")), "{counts:?}");
    }
    upgrade(&mut server);
    send_signal(server.pid(), Signal::KILL);
    server.wait("hold: stopping: the server crashes too often");
    server.wait_all_ended();
    assert_eq!(server.exit_code(), Some(123));
}

/// By the protocol the successor then serves, and `hold` must not start another server.
#[cfg(feature = "systemd")]
#[test]
fn a_crash_in_the_middle_of_an_upgrade_leaves_one_server() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let mut server = held(&[], &["--misbehave", misbehave.to_str().unwrap()]);
    let (hold, addr) = (server.first_pid(), server.addr());
    for (wrong, serves) in [("stop-self", 2), ("stop-self exit=1", 1)] {
        fs::write(&misbehave, wrong).unwrap();
        let pid = server.pid();
        send_signal(hold, Signal::HUP);
        eventually("the successor is there", || children(hold).len() == 2);
        let successor = children(hold).into_keys().find(|child| *child != pid).unwrap();
        frozen(successor);
        send_signal(pid, Signal::KILL);
        eventually("it is reaped", || children(hold).len() == 1);
        send_signal(successor, Signal::CONT);
        server.wait(if serves == 2 { "hold: serves" } else { "hold: crashed" });
        eventually("one serves", || ask(&addr).is_ok_and(|answer| field::<u64>(&answer, "gen") == serves));
        server.wait_any(&format!("serving gen={serves} pid={}", field::<u32>(&ask(&addr).unwrap(), "pid")));
        eventually("it is alone", || children(hold).len() == 1);
    }
    fs::remove_file(&misbehave).unwrap();
    upgrade(&mut server);
    assert_eq!(stop(&mut server), Some(0));
}

/// The child learns of the stop and of its announcement at the same time, and then stores its listeners.
#[cfg(feature = "systemd")]
#[test]
fn a_stop_during_the_probation_leaves_no_listener() {
    let mut server = held(&[], &["--probation", "2000", "--drain", "600"]);
    let (hold, addr) = (server.first_pid(), server.addr());
    send_signal(hold, Signal::HUP);
    server.wait("serving gen=2 ");
    let mut open = connect(&addr).unwrap();
    assert_eq!(generation(&addr), 2);
    send_signal(hold, Signal::TERM);
    eventually("no process listens", || connect(&addr).is_err());
    open.write_all(b"who\n").unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("gen=2 "), "the drain is not over: {answer}");
    server.wait_all_ended();
}

#[cfg(feature = "systemd")]
#[test]
fn requests_in_quick_succession_are_all_answered() {
    let mut server = held(&[], &["--probation", "300"]);
    let addr = server.addr();
    for _ in 0..3 {
        send_signal(server.first_pid(), Signal::HUP);
    }
    server.wait("upgrade ok");
    eventually("it can be upgraded", || generation(&addr) >= 2);
    let before = generation(&addr);
    upgrade(&mut server);
    eventually("again", || generation(&addr) > before);
    assert_eq!(stop(&mut server), Some(0));
}

#[cfg(feature = "systemd")]
#[test]
fn a_server_that_hangs_is_started_again() {
    let mut server = held(&["--watchdog", "2"], &[]);
    upgrade(&mut server);
    let (addr, pid) = (server.addr(), server.pid());
    send_signal(pid, Signal::STOP);
    server.wait("hold: watchdog timeout");
    server.wait("hold: ready");
    assert_eq!(generation(&addr), 1);
    assert_eq!(stop(&mut server), Some(0));
}

#[test]
fn the_check_of_the_new_program_decides() {
    let dir = tempdir();
    let (program, verdict) = (dir.path().join("server"), dir.path().join("verdict"));
    let text = format!(
        "[ \"$1\" = --check ] && exit $(cat '{}')\nexec {} --probation 50 \"$@\"",
        verdict.display(),
        whoami_in_shell()
    );
    script(&program, &text);
    fs::write(&verdict, "1").unwrap();
    let mut command = Command::new(example("hold"));
    command.args(["--check", "--check all", "--"]).arg(&program).args(["--listen", "127.0.0.1:0"]);
    command.args(SPEAKS.then_some("--systemd")).stdout(std::process::Stdio::null());
    let mut server = Server::serving(command);
    send_signal(server.first_pid(), Signal::HUP);
    server.wait("hold: no upgrade: the check failed: status=\"exit status: 1\"");
    fs::write(&verdict, "0").unwrap();
    upgrade(&mut server);
    assert!(!server.said().iter().any(|line| line.contains("upgrade failed")));
    assert_eq!(stop(&mut server), Some(0));
}

#[test]
fn the_exit_code_tells_what_happened() {
    let code = |options: &[&str], command: &[&str]| {
        let mut hold = Command::new(example("hold"));
        let mut server = Server::start({
            // With a directory in PATH that it may not search, the error would be another.
            hold.args(options).arg("--").args(command).env("PATH", "/usr/bin:/bin");
            hold
        });
        server.wait_all_ended();
        (server.exit_code(), server.said().join("\n"))
    };
    assert_eq!(code(&[], &["true"]).0, Some(0));
    assert_eq!(code(&[], &["sh", "-c", "exit 7"]).0, Some(7));
    assert_eq!(code(&[], &["sh", "-c", "kill -9 $$"]).0, Some(128 + 9));
    for (options, command, expected, said) in [
        (&[][..], &["no-such-program"][..], 127, "cannot execute no-such-program: No such file"),
        (&[], &["/dev/null"], 126, "cannot execute /dev/null: Permission denied"),
        (&[], &[], 125, "no program to run; see hold --help"),
        (&["--restarts", "5"], &["true"], 125, "N/SECS, as in 5/60"),
        (&["--store", "1000000000"], &["true"], 125, "ulimit -n"),
    ] {
        let (code, all) = code(options, command);
        assert!(code == Some(expected) && all.contains(said), "{code:?} {all}");
    }
    // A helper that keeps running is not a generation.
    assert_eq!(code(&[], &["sh", "-c", "sleep 600 & exit 3"]).0, Some(3));
}

#[test]
fn a_stop_has_a_deadline() {
    let mut server = held(&["--stop-timeout", "1"], &["--drain", "600"]);
    let addr = server.addr();
    upgrade(&mut server);
    eventually("the old one has ended", || children(server.first_pid()).len() == 1);
    let _new = connect(&addr).unwrap();
    ask(&addr).unwrap();
    assert_eq!(stop(&mut server), Some(124));
    assert!(server.said().iter().any(|line| line.contains("killing all remaining processes")));
}

// ---- messages --------------------------------------------------------------------------------------------------------

const SENDS_NONSENSE: &str = "ECDYSIS_TEST_SENDS_NONSENSE";

fn send(text: &[u8], fds: &[BorrowedFd<'_>]) {
    let address = std::env::var("NOTIFY_SOCKET").unwrap();
    let address = SocketAddrUnix::new_abstract_name(&address.as_bytes()[1..]).unwrap();
    let socket = UnixDatagram::unbound().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg_addr(&socket, &address, &[IoSlice::new(text)], &mut control, SendFlags::empty()).unwrap();
}

/// Waits until `hold` has read all messages of this process.
fn wait_until_read() {
    let (end, theirs) = rustix::pipe::pipe().unwrap();
    send(b"BARRIER=1\n", &[theirs.as_fd()]);
    drop(theirs);
    assert_eq!(rustix::io::read(&end, &mut [0; 1]), Ok(0));
}

/// Not a test: a server that sends invalid messages, then READY, and crashes. After the restart it prints the
/// descriptors that it got.
#[test]
fn a_server_that_sends_nonsense() {
    if std::env::var_os(SENDS_NONSENSE).is_none() {
        return;
    }
    let pid = std::process::id();
    if let Ok(names) = std::env::var("LISTEN_FDNAMES") {
        assert_eq!(std::env::var("LISTEN_PID").unwrap(), pid.to_string());
        // One write, because hold writes to the same stderr.
        std::io::stderr().write_all(format!("got {names}\n").as_bytes()).unwrap();
        loop {
            thread::park();
        }
    }
    let files = [(); 3].map(|()| tempfile::tempfile().unwrap());
    let [first, second, third] = files.each_ref().map(AsFd::as_fd);
    send(b"FDSTORE=1\nFDNAME=first", &[first]);
    send(b"FDSTORE=1\nFDNAME=first", &[first]);
    let nonsense: [(&[u8], &[BorrowedFd<'_>]); 8] = [
        (b"FDSTORE=1", &[second]),
        (b"FDSTORE=1\nFDNAME=a:b", &[second]),
        (b"STATUS=with a descriptor", &[second]),
        (b"nonsense", &[]),
        (b"\xff\xfe=1", &[]),
        (b"", &[]),
        (&[b'x'; 5000], &[]),
        (b"MAINPID=1", &[]),
    ];
    for (text, fds) in &nonsense {
        send(text, fds);
    }
    send(b"FDSTORE=1\nFDNAME=second", &[second]);
    // The store has room for two.
    send(b"FDSTORE=1\nFDNAME=third", &[third]);
    send(b"FDSTOREREMOVE=1\nFDNAME=fourth", &[]);
    send(b"READY=1\n", &[]);
    std::process::exit(1);
}

const TAKES_BACK: &str = "ECDYSIS_TEST_TAKES_BACK";

/// Not a test: a server that announces its child, which then dies, and serves again.
#[test]
fn a_server_that_takes_the_service_back() {
    let Some(role) = std::env::var_os(TAKES_BACK) else { return };
    let late = role == "late";
    if late || role == "early" {
        send(b"READY=1\n", &[]);
        let mut child = this_program("hold::a_server_that_takes_the_service_back");
        let mut child = child.env(TAKES_BACK, "child").spawn().unwrap();
        send(format!("MAINPID={}\nREADY=1\n", child.id()).as_bytes(), &[]);
        wait_until_read();
        child.kill().unwrap();
        child.wait().unwrap();
        if late {
            // Longer than `hold` needs to see the end. No event shows that it has.
            thread::sleep(std::time::Duration::from_millis(200));
        }
        send(format!("MAINPID={}\nREADY=1\n", std::process::id()).as_bytes(), &[]);
    }
    loop {
        thread::park();
    }
}

#[test]
fn a_parent_that_takes_the_service_back_is_not_started_twice() {
    takes_the_service_back("late");
}

#[test]
fn a_parent_may_see_the_death_of_its_child_first() {
    takes_the_service_back("early");
}

fn takes_the_service_back(when: &str) {
    let program = this_program("hold::a_server_that_takes_the_service_back");
    let mut command = Command::new(example("hold"));
    command.arg("--").arg(program.get_program()).args(program.get_args());
    command.env(TAKES_BACK, when).stdout(std::process::Stdio::null());
    let mut server = Server::start(command);
    let first: u32 = field(&server.wait("hold: started"), "pid");
    assert_ne!(field::<u32>(&server.wait("hold: serves"), "pid"), first);
    assert_eq!(field::<u32>(&server.wait("hold: serves"), "pid"), first);
    assert_eq!(stop(&mut server), Some(128 + 15));
    assert_eq!(server.said().iter().filter(|line| line.starts_with("hold: started")).count(), 1);
}

#[test]
fn nonsense_is_refused_and_counted_and_nothing_is_lost() {
    let program = this_program("hold::a_server_that_sends_nonsense");
    let mut command = Command::new(example("hold"));
    command.args(["--store", "2", "--restarts", "1/600", "--"]).arg(program.get_program()).args(program.get_args());
    command.env(SENDS_NONSENSE, "").stdout(std::process::Stdio::null());
    let mut server = Server::start(command);
    assert_eq!(server.wait("got "), "got first:second");
    // One line immediately, and one for all that follow within a second.
    let refused = |lines: &[String]| -> u64 {
        let one = lines.iter().filter(|line| line.starts_with("hold: refused a message from")).count() as u64;
        let more = lines.iter().filter_map(|line| line.strip_prefix("hold: refused ")?.strip_suffix(" more messages"));
        one + more.map(|count| count.parse::<u64>().unwrap()).sum::<u64>()
    };
    eventually("all are counted", || refused(&server.said()) == 9);
    assert_eq!(stop(&mut server), Some(128 + 15));
}

/// The kernel reports the sender of each message. Any process can send, so any process can fill the queue.
#[cfg(feature = "systemd")]
#[test]
fn a_flood_of_another_user_changes_nothing() {
    if !is_root() {
        return;
    }
    let mut server = held(&[], &[]);
    let addr = server.addr();
    let environment = fs::read(format!("/proc/{}/environ", server.pid())).unwrap();
    let variable = environment.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(b"NOTIFY_SOCKET=@"));
    let name = variable.unwrap().to_vec();
    let (done, stop_flood) = std::sync::mpsc::channel::<()>();
    let flood = thread::spawn(move || {
        // SAFETY: no memory is involved. The bare system call changes the user of only this thread.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        let mut sent = 0_u64;
        while stop_flood.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            socket.send_to_addr(b"MAINPID=1\nREADY=1\nSTOPPING=1\n", &address).unwrap();
            sent += 1;
        }
        sent
    });
    server.wait("hold: refused a message from pid=");
    let load = Load::on(&addr, 1);
    for expected in 2..=6 {
        upgrade(&mut server);
        eventually("the new one answers", || generation(&addr) == expected);
    }
    load.stop().assert_none_failed();
    drop(done);
    println!("{} messages refused", flood.join().unwrap());
    assert!(server.said().iter().any(|line| line.contains("uid=65534")));
    assert_eq!(stop(&mut server), Some(0));
}
