//! The messages that a service manager receives from a server and its later generations, and their senders. Here the
//! test is the manager. The tests in `systemd` use a real one.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::support::{
    ask, can_unshare, children, connect, eventually, example, field, frozen, generation, interrupted, is_alone,
    send_signal, tempdir, unix, ChildLink, Load, Server, DEADLINE,
};
use ecdysis::systemd::NotifyError;
use rustix::net::{recvmsg, sockopt, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags, Signal};

/// The manager's end of the notification socket.
struct Manager {
    socket: UnixDatagram,
    address: String,
}

/// A message, its sender, and the descriptors that came with it.
#[derive(Debug)]
struct Message {
    text: String,
    from: u32,
    fds: Vec<OwnedFd>,
}

impl Manager {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::at(format!("@ecdysis-test-manager-{}-{number}", std::process::id()))
    }

    fn at(address: String) -> Self {
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&address[1..]).unwrap()).unwrap();
        sockopt::set_socket_passcred(&socket, true).unwrap();
        Self { socket, address }
    }

    /// Fills the queue, as if the manager hung.
    fn fill(&self) {
        let other = UnixDatagram::unbound().unwrap();
        other.set_nonblocking(true).unwrap();
        let address = SocketAddr::from_abstract_name(&self.address[1..]).unwrap();
        while other.send_to_addr(b"STATUS=x", &address).is_ok() {}
    }

    fn server(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Server {
        self.start("SYSTEMD_EXEC_PID=$$ exec \"$@\"", arguments, environment)
    }

    /// Starts the server with a line of shell, in which `"$@"` is its command.
    fn start(&self, shell: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Server {
        let mut command = Command::new("sh");
        command.args(["-c", shell, "sh"]).arg(example("whoami"));
        command.args(["--systemd", "--listen", "127.0.0.1:0"]).args(arguments);
        command.env("NOTIFY_SOCKET", &self.address).envs(environment.iter().copied());
        Server::serving(command)
    }

    /// Returns the next message that is not a watchdog message.
    fn next(&self) -> Message {
        self.within(DEADLINE, |message| message.text != "WATCHDOG=1\n")
            .unwrap_or_else(|| panic!("no message within {DEADLINE:?}"))
    }

    fn within(&self, time: Duration, wanted: impl Fn(&Message) -> bool) -> Option<Message> {
        let until = Instant::now() + time;
        loop {
            let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4), ScmCredentials(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut text = vec![0; 8192];
            let mut iov = [IoSliceMut::new(&mut text)];
            let Ok(received) = recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) else { continue };
            text.truncate(received.bytes);
            let mut message = Message { text: String::from_utf8(text).unwrap(), from: 0, fds: Vec::new() };
            for part in control.drain() {
                match part {
                    RecvAncillaryMessage::ScmRights(fds) => message.fds.extend(fds),
                    RecvAncillaryMessage::ScmCredentials(peer) => {
                        message.from = peer.pid.as_raw_nonzero().get() as u32;
                    }
                    _ => {}
                }
            }
            if wanted(&message) {
                return Some(message);
            }
        }
    }

    /// Returns the next message, which must come from this process and start with `beginning`.
    #[track_caller]
    fn expect(&self, from: u32, beginning: &str) -> Message {
        let message = self.next();
        assert!(
            message.from == from && message.text.starts_with(beginning),
            "{beginning:?} of {from}, not {message:?}"
        );
        message
    }
}

/// Returns the inode of a process's pidfd, if the kernel gives each process its own.
fn pidfd_id(pid: u32) -> Option<u64> {
    let inode = |pid| {
        let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        rustix::fs::fstat(pidfd).unwrap().st_ino
    };
    (cfg!(target_pointer_width = "64") && inode(pid) != inode(std::process::id())).then(|| inode(pid))
}

#[test]
fn the_parent_announces_and_the_child_is_silent_until_then() {
    let manager = Manager::new();
    let mut server = manager.server(&["--probation", "100"], &[("WATCHDOG_USEC", "100000")]);
    let parent = server.first_pid();
    // Version 1.1.1 sends the PID with the first notification. In another PID namespace this number would mean nothing
    // to the manager.
    let pid = match std::fs::read_link("/proc/self/ns/pid").unwrap().to_str() {
        Some("pid:[4026531836]") => format!("MAINPID={parent}\n"),
        _ => String::new(),
    };
    let first = format!("READY=1\n{pid}STATUS=generation 1\n");
    assert_eq!(manager.expect(parent, "READY=1").text, first);
    let alive = |message: &Message| message.text == "WATCHDOG=1\n";
    assert_eq!(manager.within(DEADLINE, alive).unwrap().from, parent);

    server.signal(Signal::HUP);
    let reloading = manager.expect(parent, "RELOADING=1\nMONOTONIC_USEC=").text;
    assert!(reloading.contains("STATUS=generation 1, upgrading\n"), "{reloading}");
    let status = manager.expect(parent, "STATUS=generation 1, upgrading to pid ").text;
    let child: u32 = status.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    manager.expect(parent, &format!("STATUS=generation 1; generation 2, pid {child}, is on probation"));
    let announced = manager.expect(parent, &format!("MAINPID={child}\n")).text;
    let rest = format!("READY=1\nWATCHDOG=1\nERRNO=0\nSTATUS=generation 2, upgraded from pid {parent}\n");
    assert!(announced.ends_with(&rest), "{announced}");
    // Distinguishes the process from a later one with the same PID, if the kernel has such an id (Linux 6.9).
    let id = pidfd_id(child).map_or(String::new(), |id| format!("MAINPIDFDID={id}\n"));
    assert!(announced.contains(&id), "{announced} {id}");
    // The service manager must know this before the parent may end.
    let barrier = manager.expect(parent, "BARRIER=1");
    assert_eq!(barrier.fds.len(), 1);
    assert_eq!(manager.within(Duration::from_millis(300), |message| message.from == child).map(|m| m.text), None);
    assert!(!server.said().iter().any(|line| line.starts_with("upgrade ok") || line.starts_with("ended")));
    drop(barrier);
    server.wait("upgrade ok");
    server.wait("ended gen=1");

    let message = manager.within(DEADLINE, |message| message.from == child).unwrap();
    assert_eq!(message.text, "WATCHDOG=1\n");
    server.signal(Signal::TERM);
    let stopping = manager.expect(child, "STOPPING=1\n").text;
    assert!(stopping.contains("STATUS=generation 2, stopped by SIGTERM"), "{stopping}");
    server.wait_all_ended();
}

/// systemd learns of the new main process before that process learns of its announcement, and may stop it immediately.
#[test]
fn a_stop_that_overtakes_the_announcement_is_reported() {
    let manager = Manager::new();
    let server = manager.server(&["--probation", "0"], &[]);
    let parent = server.first_pid();
    server.signal(Signal::HUP);
    let barrier = manager.within(DEADLINE, |message| message.text == "BARRIER=1\n").unwrap();
    assert_eq!(barrier.from, parent);
    server.wait_any("serving gen=2");
    let child = server.pid();
    send_signal(child, Signal::TERM);
    assert!(manager.within(Duration::from_millis(300), |message| message.from == child).is_none());
    drop(barrier);
    manager.expect(child, "STOPPING=1\n");
    server.wait_all_ended();
}

#[test]
fn a_failed_upgrade_ends_in_ready_and_says_why() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let manager = Manager::new();
    let mut server = manager.server(&["--misbehave", misbehave.to_str().unwrap()], &[]);
    let pid = server.first_pid();
    manager.expect(pid, "READY=1");
    std::fs::write(&misbehave, "refuse=config: line 3 is bad").unwrap();
    for _ in 0..2 {
        server.fail_to_upgrade();
        manager.expect(pid, "RELOADING=1");
        manager.expect(pid, "STATUS=");
        let ready = manager.expect(pid, "READY=1\nERRNO=125\nSTATUS=generation 1, upgrade failed: ").text;
        assert!(ready.contains("config: line 3 is bad"), "{ready}");
    }
}

/// A manager that requests a reload during an upgrade waits for a reload that begins after its request. An upgrade that
/// is refused before it begins must be answered as well.
#[test]
fn a_second_request_gets_an_answer() {
    let dir = tempdir();
    let misbehave = dir.path().join("misbehave");
    let manager = Manager::new();
    let arguments = ["--misbehave", misbehave.to_str().unwrap(), "--overlap", "refuse", "--probation", "0"];
    let mut server = manager.server(&arguments, &[]);
    let pid = server.first_pid();
    manager.expect(pid, "READY=1");
    std::fs::write(&misbehave, "stop-self").unwrap();
    server.signal(Signal::HUP);
    let first = manager.expect(pid, "RELOADING=1").text;
    let status = manager.expect(pid, "STATUS=generation 1, upgrading to pid ").text;
    let child: u32 = status.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    frozen(child);
    server.signal(Signal::HUP);
    std::fs::remove_file(&misbehave).unwrap();
    let open = connect(&server.addr()).unwrap();
    send_signal(child, Signal::KILL);
    manager.expect(pid, "READY=1\nERRNO=125\nSTATUS=generation 1, upgrade failed");
    server.wait("upgrade failed");

    // The second upgrade is done now.
    let second = manager.expect(pid, "RELOADING=1").text;
    let time = |text: &str| field::<u64>(&text.replace('\n', " "), "MONOTONIC_USEC");
    assert!(time(&second) > time(&first), "{first} {second}");
    manager.expect(pid, "STATUS=");
    manager.expect(pid, "STATUS=");
    manager.expect(pid, "MAINPID=");
    drop(manager.expect(pid, "BARRIER=1"));
    let new = field(&server.wait("upgrade ok"), "pid");
    // The first generation still drains, so the second one may not be replaced.
    send_signal(new, Signal::HUP);
    manager.expect(new, "RELOADING=1");
    let ready = manager.expect(new, "READY=1\nERRNO=125\nSTATUS=generation 2, upgrade failed").text;
    assert!(ready.contains("drains"), "{ready}");
    drop(open);
}

#[test]
fn what_is_for_one_process_does_not_reach_the_next() {
    let manager = Manager::new();
    let environment = [
        ("LISTEN_PID", "1"),
        ("LISTEN_FDS", "1"),
        ("LISTEN_FDNAMES", "http"),
        ("LISTEN_PIDFDID", "1"),
        ("WATCHDOG_PID", "1"),
        ("WATCHDOG_USEC", "100000"),
    ];
    let mut server = manager.server(&["--probation", "0"], &environment);
    manager.expect(server.first_pid(), "READY=1");
    // Here the watchdog is meant for process 1.
    assert!(manager.within(Duration::from_millis(300), |_| true).is_none());
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    let environment = std::fs::read(format!("/proc/{}/environ", server.pid())).unwrap();
    let environment = String::from_utf8(environment).unwrap();
    for absent in ["LISTEN_", "WATCHDOG_PID="] {
        assert!(!environment.contains(absent), "{environment}");
    }
    for present in [format!("NOTIFY_SOCKET={}", manager.address), "WATCHDOG_USEC=100000".into()] {
        assert!(environment.contains(&present), "{environment}");
    }
}

#[test]
fn listeners_go_into_the_store_by_name() {
    let dir = tempdir();
    let path = dir.path().join("a:b");
    let manager = Manager::new();
    let listen = format!("unix:{}", path.display());
    let mut server = manager.server(&["--listen", &listen, "--probation", "0"], &[("FDSTORE", "8")]);
    let mut pid = server.first_pid();
    for generation in [1, 2] {
        let tcp = manager.expect(pid, "FDSTORE=1\nFDNAME=ecdysis tcp 127.0.0.1%3A0\nFDPOLL=0\n");
        let unix = manager.expect(pid, "FDSTORE=1\nFDNAME=ecdysis unix /");
        assert!(unix.text.contains("/a%3Ab "), "{}", unix.text);
        assert_eq!((tcp.fds.len(), unix.fds.len()), (1, 1));
        if generation == 1 {
            // The sockets must be stored before the start is complete.
            manager.expect(pid, "READY=1");
            server.signal(Signal::HUP);
            manager.expect(pid, "RELOADING=1");
            manager.expect(pid, "STATUS=");
            manager.expect(pid, "STATUS=");
            manager.expect(pid, "MAINPID=");
            drop(manager.expect(pid, "BARRIER=1"));
            pid = field(&server.wait("upgrade ok"), "pid");
        } else {
            // The sockets survive a stop, so the file must too.
            send_signal(pid, Signal::TERM);
            server.wait_all_ended();
            assert!(path.exists());
        }
    }
}

#[test]
#[cfg(feature = "tokio_ecdysis")]
fn the_tokio_builder_can_store_what_is_passed() {
    for keep in [true, false] {
        let manager = Manager::new();
        let mut command = Command::new(example("tokio_whoami"));
        command.args(["--systemd", "--listen", "127.0.0.1:0"]).args(keep.then_some("--keep-passed"));
        command.env("NOTIFY_SOCKET", &manager.address).env("FDSTORE", "8");
        let server = Server::serving(command);
        let pid = server.first_pid();
        manager.expect(pid, "FDSTORE=1\nFDNAME=ecdysis tcp ");
        manager.expect(pid, "READY=1");
        server.signal(Signal::TERM);
        // The text of the manifest, and one end of a pair of sockets.
        for _ in 0..if keep { 2 } else { 0 } {
            manager.expect(pid, "FDSTORE=1\nFDNAME=ecdysis-passed ");
        }
        manager.expect(pid, "STOPPING=1");
        server.wait_all_ended();
    }
}

/// It no longer reads, and its queue is full.
#[test]
fn a_manager_that_hangs_costs_no_request() {
    let manager = Manager::new();
    let mut server = manager.server(&["--probation", "0"], &[("WATCHDOG_USEC", "1000000")]);
    manager.expect(server.first_pid(), "READY=1");
    manager.fill();
    let load = Load::on(&server.addr(), 2);
    server.upgrade();
    load.stop().assert_none_failed();
    let (mut open, load) = (connect(&server.addr()).unwrap(), Load::on(&server.addr(), 1));
    open.write_all(b"w").unwrap();
    let answered = load.answered();
    eventually("load", || load.answered() > answered + 10);
    server.signal(Signal::TERM);
    eventually("it stops", || ask(&server.addr()).is_err());
    open.write_all(b"ho\n").unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("gen=2 "), "{answer}");
    server.wait_all_ended();
    let counts = load.stop();
    // A client that connects in the instant between the last accept and the close is reset. The guide says so at
    // "Stopping". This client connects all the time.
    let others: u64 = counts.failures.iter().filter(|(kind, _)| !kind.starts_with("Refused")).map(|(_, n)| n).sum();
    assert!(others <= 1, "{counts:?}");
}

/// The manager restarts, say, while the parent announces its child. Until its end the parent is the main process.
#[test]
fn a_child_that_could_not_be_announced_announces_itself() {
    let manager = Manager::new();
    let mut server = manager.server(&["--probation", "0"], &[]);
    let parent = server.first_pid();
    manager.expect(parent, "READY=1");
    let mut open = connect(&server.addr()).unwrap();
    open.write_all(b"w").unwrap();
    ask(&server.addr()).unwrap();
    let Manager { socket, address } = manager;
    drop(socket);
    server.upgrade();
    server.wait_serving();
    let (child, manager) = (server.pid(), Manager::at(address));
    open.write_all(b"ho\n").unwrap();
    server.wait("ended gen=1");
    let announced = manager.within(DEADLINE, |message| message.from == child).unwrap().text;
    assert!(announced.starts_with(&format!("MAINPID={child}\n")) && announced.contains("\nREADY=1\n"), "{announced}");
    server.signal(Signal::TERM);
    manager.expect(child, "STOPPING=1\n");
    server.wait_all_ended();
}

#[test]
fn signals_do_not_prolong_a_wait_for_the_manager() {
    if !is_alone("notify::signals_do_not_prolong_a_wait_for_the_manager") {
        return;
    }
    let manager = Manager::new();
    manager.fill();
    let notifier = ecdysis::systemd::Notifier::at(&manager.address).unwrap();
    let error = interrupted(|| notifier.alive()).unwrap_err();
    let NotifyError::Send { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn a_stop_that_finds_no_store_says_so() {
    let manager = Manager::new();
    let mut server = manager.server(&["--keep-passed", "--log"], &[]);
    server.signal(Signal::TERM);
    server.wait("log warn cannot store the passed state for the next start");
    server.wait_all_ended();

    let mut command = Command::new(example("whoami"));
    command.args(["--listen", "127.0.0.1:0", "--systemd", "--keep-passed", "--log"]).env_remove("NOTIFY_SOCKET");
    let in_terminal = Server::serving(command);
    in_terminal.signal(Signal::TERM);
    in_terminal.wait_all_ended();
    assert_eq!(in_terminal.said().iter().find(|line| line.starts_with("log warn")), None);
}

/// Here the test is the parent, which gives up on the child after that has read the command.
#[test]
fn a_client_whose_stop_was_taken_back_learns_that() {
    let (manager, dir) = (Manager::new(), tempdir());
    let [takeover, control] = ["takeover", "control"].map(|name| dir.path().join(name));
    let parent = UnixListener::bind(&takeover).unwrap();
    let mut command = Command::new(example("whoami"));
    command.args(["--systemd", "--listen", "127.0.0.1:0", "--take-over"]).arg(&takeover);
    command.arg("--control-socket").arg(&control).env("NOTIFY_SOCKET", &manager.address);
    let mut server = Server::start(command);
    let mut link = ChildLink::accept(&parent);
    server.wait("serving gen=2");
    let mut client = unix(&control).unwrap();
    client.write_all(b"stop\n").unwrap();
    // It waits until its parent has announced it.
    link.expect("stopping\n");
    link.send("stop\n");
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("failed: "), "{answer:?}");
    link.expect("refused ");
    server.wait("ended gen=2");
    server.wait_all_ended();
}

#[test]
fn without_a_manager_nothing_is_different() {
    let mut command = Command::new(example("whoami"));
    command.args(["--systemd", "--listen", "127.0.0.1:0", "--probation", "0"]).env_remove("NOTIFY_SOCKET");
    let mut server = Server::serving(command);
    server.upgrade();
    let mut command = Command::new(example("whoami"));
    command.args(["--systemd", "--listen", "127.0.0.1:0"]).env("NOTIFY_SOCKET", "vsock:2:1");
    let mut server = Server::start(command);
    server.wait("cannot use what the service manager passed: NOTIFY_SOCKET=vsock:2:1");
}

/// Here the main process of the unit is a shell, and the server is its helper.
#[test]
fn a_helper_of_the_main_process_stays_one_over_its_upgrades() {
    let manager = Manager::new();
    let shell = "export SYSTEMD_EXEC_PID=$$; \"$@\" & wait";
    let mut server = manager.start(shell, &["--probation", "0"], &[]);
    let mut pid = server.pid();
    manager.expect(pid, "READY=1");
    for generation in 2..=3 {
        server.signal(Signal::HUP);
        let message = manager.within(DEADLINE, |message| message.text.contains(", upgraded\n")).unwrap();
        assert_eq!(
            (message.from, message.text),
            (pid, format!("READY=1\nERRNO=0\nSTATUS=generation {generation}, upgraded\n"))
        );
        // The manager would ignore a message of a process that has ended.
        let barrier = manager.expect(pid, "BARRIER=1");
        assert!(!server.said().iter().any(|line| line.starts_with(&format!("ended gen={}", generation - 1))));
        drop(barrier);
        let next: u32 = field(&server.wait("upgrade ok"), "pid");
        // It is the child of the previous generation, and is then reparented. The main process never created it.
        server.wait(&format!("ended gen={}", generation - 1));
        server.wait_serving();
        assert!(!children(server.first_pid()).contains_key(&next));
        pid = next;
    }
    server.signal(Signal::TERM);
    server.wait("ended gen=3");
    assert_eq!(manager.within(Duration::ZERO, |message| message.text.contains("MAINPID")).map(|m| m.text), None);
}

/// A unit of Type=simple ends with its main process, and systemd kills all other processes of the unit.
#[test]
fn a_unit_that_would_end_is_not_upgraded() {
    let mut command = Command::new("sh");
    command.args(["-c", "SYSTEMD_EXEC_PID=$$ exec \"$@\"", "sh"]).arg(example("whoami"));
    command.args(["--systemd", "--listen", "127.0.0.1:0"]).env_remove("NOTIFY_SOCKET");
    let mut server = Server::serving(command);
    let failed = server.fail_to_upgrade();
    assert!(failed.contains("use Type=notify-reload"), "{failed}");
    assert_eq!(generation(&server.addr()), 1);
}

/// The kernel kills every other process of a PID namespace when the first one ends.
#[test]
fn process_1_is_not_upgraded() {
    let container = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !can_unshare(&container) {
        return;
    }
    let manager = Manager::new();
    let mut command = Command::new("unshare");
    // As under PrivatePIDs=yes.
    command.args(container).arg(example("whoami")).env("SYSTEMD_EXEC_PID", "1");
    command.args(["--systemd", "--listen", "127.0.0.1:0"]).env("NOTIFY_SOCKET", &manager.address);
    let mut server = Server::start(command);
    server.wait("serving");
    // The manager has another process 1.
    assert_eq!(manager.next().text, "READY=1\nSTATUS=generation 1\n");
    let inside = children(server.first_pid()).into_keys().next().unwrap();
    send_signal(inside, Signal::HUP);
    let failed = server.wait("upgrade failed");
    assert!(failed.contains("this is process 1"), "{failed}");
    assert_eq!(generation(&server.addr()), 1);
}

/// The manager considers the service stopped when the newest generation has ended, and would kill the older ones.
#[test]
fn a_stop_ends_the_drains_of_older_generations_and_waits_for_them() {
    let manager = Manager::new();
    let mut server = manager.server(&["--probation", "0", "--drain", "600"], &[]);
    let addr = server.addr();
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = connect(&addr).unwrap();
        stream.write_all(b"w").unwrap();
        ask(&addr).unwrap();
        open.push(stream);
        server.signal(Signal::HUP);
        drop(manager.within(DEADLINE, |message| message.text.starts_with("BARRIER=1")).unwrap());
        server.wait("upgrade ok");
        server.wait_serving();
    }
    let newest = server.pid();
    server.signal(Signal::TERM);
    manager.within(DEADLINE, |message| message.from == newest && message.text.starts_with("STOPPING=1")).unwrap();
    manager
        .within(DEADLINE, |message| message.from == newest && message.text.starts_with("EXTEND_TIMEOUT_USEC="))
        .unwrap();
    for mut stream in open {
        assert!(!server.said().iter().any(|line| line.starts_with("ended gen=3")));
        stream.write_all(b"ho\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("gen="), "{answer}");
    }
    server.wait("ended gen=3");
    server.wait_all_ended();
}

/// After a crash of the newest generation, systemd asks the others to stop, and waits for them before it restarts the
/// service. No client is served during that time.
#[test]
fn a_stop_ends_the_drain_of_a_generation_whose_successor_has_crashed() {
    for crashes_first in [true, false] {
        let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--probation", "0", "--drain", "600"]);
        let addr = server.addr();
        let _open = connect(&addr).unwrap();
        ask(&addr).unwrap();
        server.upgrade();
        server.wait_serving();
        let [old, new] = [server.first_pid(), server.pid()];
        let steps = [(new, Signal::KILL), (old, Signal::TERM)];
        let [first, second] = if crashes_first { steps } else { [steps[1], steps[0]] };
        send_signal(first.0, first.1);
        // No event shows that nothing happens. A drain that this signal ended would log that within this time.
        std::thread::sleep(Duration::from_millis(100));
        assert!(!server.said().iter().any(|line| line.starts_with("ended")), "either alone ends no drain");
        send_signal(second.0, second.1);
        let ended = server.wait_any("ended gen=1");
        assert_eq!(field::<usize>(&ended, "left"), 1);
        server.wait_all_ended();
    }
}

/// The deadline of the stop also applies to the older drains, even if theirs was longer.
#[test]
fn older_generations_end_within_the_deadline_of_a_stop() {
    let mut server =
        Server::whoami(["--listen", "127.0.0.1:0", "--probation", "0", "--drain", "600", "--stop-drain", "1"]);
    let addr = server.addr();
    let _open = connect(&addr).unwrap();
    ask(&addr).unwrap();
    server.upgrade();
    server.wait_serving();
    server.signal(Signal::TERM);
    let ended = server.wait_any("ended gen=1");
    assert_eq!(field::<usize>(&ended, "left"), 1);
    server.wait_all_ended();
}
