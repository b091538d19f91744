//! A process that is not a child takes over: under load, from other namespaces, misbehaving, run by another user, or
//! dying.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::*;
use rustix::process::Signal;

/// Whether the end of a process that takes over can be noticed (SO_PEERPIDFD, Linux 6.5).
fn has_peer_pidfd() -> bool {
    const SO_PEERPIDFD: libc::c_int = 77;
    let (socket, _peer) = UnixStream::pair().unwrap();
    let (mut fd, mut size) = (-1_i32, 4);
    // SAFETY: the kernel writes four bytes to a number of four, and creates a descriptor that nothing else owns.
    unsafe {
        let place = (&raw mut fd).cast();
        let has = libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, place, &mut size) == 0;
        drop(has.then(|| OwnedFd::from_raw_fd(fd)));
        has && cfg!(not(ecdysis_unix))
    }
}

/// A directory with a takeover socket, and the servers that use it.
struct Meeting {
    dir: TempDir,
    socket: PathBuf,
    args: Vec<String>,
}

impl Meeting {
    fn new(args: &[&str]) -> Self {
        let dir = tempdir();
        let socket = dir.path().join("takeover");
        Self { dir, socket, args: args.iter().map(|arg| arg.to_string()).collect() }
    }

    /// The same command line for every generation.
    fn command(&self) -> Command {
        let mut command = Command::new(example("whoami"));
        self.arguments(&mut command);
        command
    }

    fn arguments(&self, command: &mut Command) {
        command.args(["--listen", "127.0.0.1:0", "--take-over"]).arg(&self.socket);
        command.arg("--takeover-socket").arg(&self.socket).args(&self.args);
    }

    fn serving(&self) -> Server {
        Server::serving(self.command())
    }

    /// Starts a server that misbehaves.
    fn misbehaving(&self, words: &str) -> Server {
        let file = self.dir.path().join("misbehave");
        fs::write(&file, words).unwrap();
        let mut command = self.command();
        command.arg("--misbehave").arg(&file);
        Server::start(command)
    }

    /// Starts a server that receives everything, and hangs before it is ready.
    fn standing(&self) -> Server {
        let server = self.misbehaving("stop-self");
        frozen(server.first_pid());
        server
    }

    /// Connects, and sends a takeover request.
    fn ask(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(b"takeover 1\n").unwrap();
        stream
    }

    /// The same, retried until the request is accepted.
    fn begin(&self) -> UnixStream {
        let mut stream = self.ask();
        let mut first = [0; 10];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"ecdysis 1\n");
        stream
    }

    /// Waits until a request has been accepted, so that any other is turned away.
    fn wait_busy(&self) {
        eventually("it is busy", || {
            let mut answer = [0; 4];
            self.ask().read_exact(&mut answer).unwrap();
            answer == *b"busy"
        });
    }

    fn connect(&self) -> UnixStream {
        unix(&self.socket).unwrap()
    }
}

fn goes_on(server: &Server) {
    send_signal(server.first_pid(), Signal::CONT);
}

/// Reads until the other end closes. A reset loses the rest.
fn rest(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn the_second_process_takes_over_from_the_first() {
    let meeting = Meeting::new(&["--probation", "50"]);
    let mut first = meeting.serving();
    let (addr, mode) = (first.addr(), fs::metadata(&meeting.socket).unwrap().permissions().mode());
    assert_eq!((generation(&addr), mode & 0o777), (1, 0o600));
    let second = meeting.serving();
    assert_eq!(second.addr(), addr);
    let line = first.wait("committed ");
    assert_eq!(field::<u32>(&line, "pid"), second.pid());
    let line = first.wait("upgrade ");
    assert!(line.starts_with("upgrade ok pid="), "{line}");
    first.wait("ended gen=1 ");
    first.wait_all_ended();
    assert_eq!(generation(&addr), 2);
    assert!(fs::metadata(&meeting.socket).unwrap().file_type().is_socket(), "the file is the second one's now");
    second.signal(Signal::TERM);
    wait_exit(second.pid());
    assert!(!meeting.socket.exists());
}

/// The socket gets its mode before its name, so other users can never connect, whatever the umask is.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "until the file has its mode, its path is different")]
fn the_socket_file_is_never_open_to_others() {
    if !has_strace() {
        return;
    }
    let meeting = Meeting::new(&[]);
    let trace = meeting.dir.path().join("trace");
    let mut command = Command::new("sh");
    command.args(["-c", r#"umask 0 && exec strace -f -e trace=/chmod,bind,listen -o "$0" "$@""#]).arg(&trace);
    meeting.arguments(command.arg(example("whoami")));
    let mut server = Server::start(command);
    server.wait("serving gen=1");
    let trace = fs::read_to_string(trace).unwrap();
    let calls: Vec<_> =
        trace.lines().filter_map(|line| line.split_once(' ')).map(|(_, call)| call.trim_start()).collect();
    let path = meeting.socket.to_str().unwrap();
    let bound = calls.iter().position(|call| call.starts_with("bind(") && call.contains(path)).expect("its bind");
    let (socket, _) = calls[bound]["bind(".len()..].split_once(',').unwrap();
    assert!(calls[bound - 1].starts_with(&format!("fchmod({socket}, 0600)")), "{trace}");
    assert!(calls[bound + 1..].iter().all(|call| !call.contains("chmod")), "{trace}");
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_stale_socket_means_a_first_generation() {
    let meeting = Meeting::new(&[]);
    drop(UnixListener::bind(&meeting.socket).unwrap());
    let server = meeting.serving();
    assert_eq!(generation(&server.addr()), 1);
}

#[test]
fn a_hundred_takeovers_in_a_row_under_load_lose_nothing() {
    let meeting = Meeting::new(&["--probation", "0"]);
    let mut server = meeting.serving();
    let addr = server.addr();
    let mut times = Vec::new();
    let mut replace = |server: &mut Server, generation| {
        let next = meeting.serving();
        let line = server.wait("committed ");
        assert_eq!(field::<u64>(&line, "gen"), generation);
        times.push(field::<f64>(&line, "ms"));
        server.wait("ended ");
        server.wait_all_ended();
        *server = next;
    };
    // The descriptors of the first process that took over, while it has no connection and its accept loop waits.
    replace(&mut server, 2);
    assert_eq!(generation(&addr), 2);
    eventually("the accept loop waits", || accept_loops_wait(server.pid(), 1));
    let idle = fds(server.pid()).len();
    let load = Load::on(&addr, 3);
    for generation in 3..=101 {
        replace(&mut server, generation);
    }
    let counts = load.stop();
    counts.assert_none_failed();
    assert_eq!(generation(&addr), 101);
    eventually("no descriptor is left over", || fds(server.pid()).len() <= idle);
    times.sort_by(f64::total_cmp);
    eprintln!(
        "100 takeovers, {} requests, 0 failed; to the commit ms: median {} worst {}",
        counts.requests, times[50], times[99]
    );
}

/// Children and other processes in one chain, with both carriers.
#[test]
fn a_child_after_a_stranger_after_a_child() {
    for transport in ["pipes", "socket"] {
        let meeting = Meeting::new(&["--probation", "20", "--transport", transport]);
        let mut first = meeting.serving();
        let addr = first.addr();
        let load = Load::on(&addr, 2);
        first.upgrade();
        first.wait_serving();
        let mut second = meeting.serving();
        assert_eq!(generation(&addr), 3);
        for generation_now in 4..8 {
            second.upgrade();
            second.wait_serving();
            assert_eq!(generation(&addr), generation_now, "{transport}");
        }
        first.wait_all_ended();
        load.stop().assert_none_failed();
    }
}

#[test]
fn a_child_can_be_fed_through_a_socket() {
    let dir = tempdir();
    let how = dir.path().join("how");
    let args = ["--listen", "127.0.0.1:0", "--transport", "socket", "--probation", "100", "--misbehave"];
    let mut server = Server::whoami(args.iter().copied().chain([how.to_str().unwrap()]));
    let addr = server.addr();
    let load = Load::on(&addr, 2);
    let before = fds(server.pid()).len();
    let cases = [
        ("exit=3", "ended before it was ready: exit status: 3"),
        ("signal=9", "ended before it was ready: signal: 9"),
        // The process closes its link first, and may end later.
        ("panic", "child "),
        ("refuse=bad config", "refused: bad config"),
        ("close-status", "without reporting and was killed"),
    ];
    for (words, expected) in cases {
        fs::write(&how, words).unwrap();
        let line = server.fail_to_upgrade();
        assert!(line.contains(expected), "{words}: {line}");
        assert_eq!(generation(&addr), 1);
        assert_eq!(children(server.pid()).len(), 0, "{words}: a child is left");
    }
    eventually("no descriptor is left behind", || fds(server.pid()).len() <= before + 4);
    load.stop().assert_none_failed();
    fs::write(&how, "").unwrap();
    server.upgrade();
    assert_eq!(generation(&addr), 2);

    // Connections that it has accepted die with it. Connections in the queue do not. On a busy machine it may live for
    // longer than that.
    let long = args.iter().copied().chain([how.to_str().unwrap(), "--probation", "60000"]);
    let mut server = Server::whoami(long);
    let addr = server.addr();
    fs::write(&how, "die-after-ready=20").unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("after it was ready: signal: 9"), "{line}");
    let load = Load::on(&addr, 2);
    assert_eq!(generation(&addr), 1);
    fs::write(&how, "").unwrap();
    send_signal(server.first_pid(), Signal::HUP);
    server.wait("committed ");
    assert_eq!(generation(&addr), 2);
    load.stop().assert_none_failed();

    // The remaining cases take the full timeout.
    let args = args.iter().copied().chain([how.to_str().unwrap(), "--ready-timeout", "500"]);
    let mut server = Server::whoami(args);
    for words in ["hang", "stop-self"] {
        fs::write(&how, words).unwrap();
        let line = server.fail_to_upgrade();
        assert!(line.contains("was not ready, or did not serve, within 500ms"), "{words}: {line}");
        assert_eq!(children(server.pid()).len(), 0, "{words}: a child is left");
    }
}

#[test]
fn a_missing_program_is_told_over_the_socket_too() {
    let dir = tempdir();
    let program = dir.path().join("none");
    let args = ["--listen", "127.0.0.1:0", "--transport", "socket", "--exec", program.to_str().unwrap()];
    let mut server = Server::whoami(args);
    let line = server.fail_to_upgrade();
    assert!(line.contains("cannot run") && line.contains("execve: No such file"), "{line}");
}

/// Whatever the new process does wrong, the old one keeps serving, and the next one can take over.
#[test]
fn a_bad_successor_costs_nothing() {
    let meeting = Meeting::new(&["--probation", "200"]);
    let mut server = meeting.serving();
    let addr = server.addr();
    let load = Load::on(&addr, 2);
    let before = fds(server.pid()).len();
    let cases = [
        ("exit=3", "ended before it was ready"),
        ("signal=9", "ended before it was ready"),
        ("panic", "child "),
        ("refuse=bad config", "refused: bad config"),
        (
            "close-status",
            if has_peer_pidfd() { "closed its link but did not end" } else { "ended before it was ready" },
        ),
    ];
    for (words, expected) in cases {
        let _bad = meeting.misbehaving(words);
        let line = server.wait("upgrade ");
        assert!(line.starts_with("upgrade failed") && line.contains(expected), "{words}: {line}");
        assert_eq!(generation(&addr), 1, "{words}");
    }
    // The load may have one open connection, with its epoll.
    eventually("no descriptor is left behind", || fds(server.pid()).len() <= before + 4);
    load.stop().assert_none_failed();

    let next = meeting.serving();
    server.wait("upgrade ok");
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), next.pid());

    // Connections that it has accepted die with it. Connections in the queue do not. On a busy machine it may live for
    // longer than that.
    let meeting = Meeting::new(&["--probation", "60000"]);
    let mut server = meeting.serving();
    let addr = server.addr();
    let _bad = meeting.misbehaving("die-after-ready=20");
    let line = server.wait("upgrade ");
    assert!(line.starts_with("upgrade failed") && line.contains("after it was ready"), "{line}");
    let load = Load::on(&addr, 2);
    assert_eq!(generation(&addr), 1);
    let next = meeting.serving();
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), next.pid());
    load.stop().assert_none_failed();

    // The remaining cases take the full timeout.
    let meeting = Meeting::new(&["--ready-timeout", "400"]);
    let mut server = meeting.serving();
    for words in ["hang", "stop-self"] {
        let _bad = meeting.misbehaving(words);
        let line = server.wait("upgrade ");
        assert!(
            line.starts_with("upgrade failed") && line.contains("was not ready, or did not serve, within 400ms"),
            "{words}: {line}"
        );
        assert_eq!(generation(&server.addr()), 1, "{words}");
    }
}

/// It must not be killed, so it must receive `stop`. Otherwise both would serve.
#[test]
fn a_successor_that_is_too_late_receives_stop() {
    let meeting = Meeting::new(&["--ready-timeout", "1000"]);
    let mut server = meeting.serving();
    for (words, wake) in [("sleep=3000", false), ("stop-self", true)] {
        let mut late = meeting.misbehaving(words);
        server.wait("upgrade failed");
        if wake {
            frozen(late.first_pid());
            goes_on(&late);
        }
        let line = late.wait("whoami: ");
        assert!(line.contains("the parent gave up on this upgrade"), "{line}");
        late.wait_all_ended();
        assert_eq!(generation(&server.addr()), 1);
    }
}

/// Returns two processes. The new one has sent `ready`, and is stopped before it has received the answer.
fn stopped_before_the_commit(meeting: &mut Meeting) -> (Server, Server) {
    let pid_file = meeting.dir.path().join("pid");
    meeting.args.extend(["--pid-file", pid_file.to_str().unwrap()].map(String::from));
    let mut old = meeting.serving();
    let new = meeting.standing();
    let new_pid = new.first_pid();
    freeze(old.pid());
    goes_on(&new);
    // No event shows that it waits. It sleeps that long at no other place.
    eventually("it waits for the answer", || {
        (0..20).all(|_| {
            thread::sleep(Duration::from_millis(2));
            state(new_pid) == Some('S')
        })
    });
    freeze(new_pid);
    goes_on(&old);
    // It really was ready.
    old.wait("committed ");
    (old, new)
}

#[test]
fn a_successor_that_hangs_too_long_before_it_receives_the_commit_never_serves() {
    // As long as the answer may take, so that the ready timeout does not end the upgrade first.
    let mut meeting = Meeting::new(&["--probation", "5000"]);
    let (mut old, mut new) = stopped_before_the_commit(&mut meeting);
    let addr = old.addr();
    let load = Load::on(&addr, 2);
    let line = old.wait("upgrade ");
    assert!(
        line.starts_with("upgrade failed") && line.contains("was not ready, or did not serve, within 5s"),
        "{line}"
    );
    assert_eq!(generation(&addr), 1);
    goes_on(&new);
    let line = new.wait("whoami: ");
    assert!(line.contains("the parent gave up on this upgrade"), "{line}");
    new.wait_all_ended();
    assert!(!new.said().iter().any(|line| line.starts_with("serving ")), "{:?}", new.said());
    let pid = fs::read_to_string(meeting.dir.path().join("pid")).unwrap();
    assert_eq!(pid.trim(), old.pid().to_string());
    fs::write(meeting.dir.path().join("misbehave"), "").unwrap();
    let _next = meeting.serving();
    old.wait("upgrade ok");
    load.stop().assert_none_failed();
    assert_eq!(generation(&addr), 2);
}

#[test]
fn a_successor_that_hangs_briefly_serves() {
    let mut meeting = Meeting::new(&["--probation", "100"]);
    let (mut old, mut new) = stopped_before_the_commit(&mut meeting);
    let addr = old.addr();
    let load = Load::on(&addr, 2);
    goes_on(&new);
    new.wait("serving gen=2");
    old.wait("upgrade ok");
    old.wait_all_ended();
    load.stop().assert_none_failed();
    assert_eq!(generation(&addr), 2);
}

/// From the link alone, the old process cannot distinguish it from a dead process, and it cannot end it. So it keeps
/// serving and reports it.
#[test]
fn a_successor_that_closes_its_link_and_lives_on_is_named() {
    if !has_peer_pidfd() {
        eprintln!("not run: needs SO_PEERPIDFD, to see that another process is alive");
        return;
    }
    let meeting = Meeting::new(&["--probation", "5000"]);
    let mut server = meeting.serving();
    let addr = server.addr();
    let load = Load::on(&addr, 1);
    for words in [&[][..], &["ready\n"], &["ready\n", "serving\n"]] {
        let mut stream = BufReader::new(meeting.begin());
        let mut heard = String::new();
        while heard != "end\n" {
            heard.clear();
            stream.read_line(&mut heard).unwrap();
        }
        for (at, word) in words.iter().enumerate() {
            if at > 0 {
                heard.clear();
                stream.read_line(&mut heard).unwrap();
                assert_eq!(heard, "commit\n");
            }
            stream.get_mut().write_all(word.as_bytes()).unwrap();
        }
        drop(stream);
        let line = server.wait("upgrade ");
        let expected = format!("upgrade failed: child {} closed its link but did not end", std::process::id());
        assert!(line.starts_with(&expected), "{words:?}: {line}");
        assert_eq!(generation(&addr), 1, "{words:?}");
    }
    load.stop().assert_none_failed();
}

/// The new process receives a stop at the moment at which the old one takes the service back. So the old one stops.
#[test]
fn a_stop_that_crosses_a_rollback_stops_the_service() {
    for words in ["stopping\nrefused taken%20back\n", "stopping\n"] {
        let mut meeting = Meeting::new(&["--probation", "20", "--verify"]);
        let verify = meeting.dir.path().join("verify");
        meeting.args.push(verify.to_str().unwrap().to_owned());
        let mut server = meeting.serving();
        let mut stream = BufReader::new(meeting.begin());
        for (last, answer) in [("end\n", "ready\n"), ("commit\n", "serving\n"), ("stop\n", words)] {
            let mut line = String::new();
            while line != last {
                line.clear();
                assert!(stream.read_line(&mut line).unwrap() > 0, "no {last:?}");
            }
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            if answer == "serving\n" {
                fs::write(&verify, "bad").unwrap();
            }
        }
        drop(stream);
        server.wait("not verified: bad");
        server.wait("ended gen=1");
        server.wait_all_ended();
    }
}

/// The new process has not carried out a stop when the old one takes the service back. The old one must learn of it.
#[test]
fn a_stop_that_is_queued_at_a_rollback_reaches_the_old_process() {
    for delayed in [false, true] {
        let meeting = Meeting::new(&["--stop-delay", if delayed { "600000" } else { "0" }, "--log"]);
        let (takeover, commands) = (UnixListener::bind(&meeting.socket).unwrap(), meeting.dir.path().join("control"));
        let mut command = Command::new(example("whoami"));
        command.args(["--listen", "127.0.0.1:0", "--take-over"]).arg(&meeting.socket).args(&meeting.args);
        command.arg("--control-socket").arg(&commands);
        let mut server = Server::start(command);
        let mut link = ChildLink::accept(&takeover);
        server.wait_any("serving gen=2");
        if delayed {
            server.signal_first(Signal::TERM);
            server.wait("accepting for 600s more");
            link.send("stop\n");
        } else {
            let mut client = unix(&commands).unwrap();
            client.write_all(b"sto").unwrap();
            // After this answer, the earlier connection is accepted too.
            control(&commands, "status\n").unwrap();
            freeze(server.first_pid());
            client.write_all(b"p\n").unwrap();
            link.send("stop\n");
            goes_on(&server);
            assert!(rest(client).starts_with("failed: "));
        }
        link.expect("stopping\n");
        link.expect("refused ");
        server.wait("ended gen=2");
        server.wait_all_ended();
    }
}

/// The new process gives the service back itself, and is then asked to stop.
#[test]
fn a_stop_during_a_rollback_reaches_the_old_process() {
    let meeting = Meeting::new(&[]);
    let control = meeting.dir.path().join("control");
    let takeover = UnixListener::bind(&meeting.socket).unwrap();
    let mut command = Command::new(example("whoami"));
    command.args(["--listen", "127.0.0.1:0", "--take-over"]).arg(&meeting.socket);
    command.arg("--control-socket").arg(&control);
    let mut server = Server::start(command);
    let mut link = ChildLink::accept(&takeover);
    server.wait("serving gen=2");
    let mut client = unix(&control).unwrap();
    client.write_all(b"rollback\n").unwrap();
    link.expect("refused ");
    server.signal_first(Signal::TERM);
    link.send("stop\n");
    link.expect("stopping\n");
    assert_eq!(rest(client), "rolled back\n");
    server.wait_all_ended();
}

#[test]
fn when_the_old_process_is_killed_the_new_one_serves() {
    let meeting = Meeting::new(&[]);
    let first = meeting.serving();
    let addr = first.addr();
    let mut second = meeting.standing();
    send_signal(first.pid(), Signal::KILL);
    goes_on(&second);
    assert_eq!(generation(&addr), 2);
    second.wait("serving gen=2");
}

#[test]
fn when_the_old_process_is_stopped_the_new_one_serves_and_the_old_one_then_accepts_that() {
    let meeting = Meeting::new(&["--probation", "50"]);
    let mut first = meeting.serving();
    let addr = first.addr();
    let mut second = meeting.standing();
    freeze(first.pid());
    goes_on(&second);
    second.wait("serving gen=2");
    goes_on(&first);
    first.wait("upgrade ok");
    first.wait("ended gen=1");
    assert_eq!(generation(&addr), 2);
}

/// The old process is killed while the new one waits for its answer. No process listens any more, so the new one is a
/// first generation.
#[test]
fn when_the_old_process_dies_before_it_hands_over_the_new_one_begins() {
    let meeting = Meeting::new(&[]);
    let first = meeting.serving();
    freeze(first.pid());
    let mut second = Server::start(meeting.command());
    eventually("it has connected", || fds(second.first_pid()).values().any(|what| what.starts_with("socket:")));
    send_signal(first.pid(), Signal::KILL);
    second.wait("serving gen=1");
    assert_eq!(generation(&second.addr()), 1);
}

#[test]
fn a_stop_during_a_takeover_stops_the_old_and_tells_the_new() {
    let meeting = Meeting::new(&[]);
    let mut first = meeting.serving();
    let mut second = meeting.standing();
    first.signal(Signal::TERM);
    let line = first.wait("upgrade failed");
    assert!(line.contains("stop was requested"), "{line}");
    first.wait("ended gen=1");
    goes_on(&second);
    let line = second.wait("whoami: ");
    assert!(line.contains("gave up on this upgrade"), "{line}");
}

#[test]
fn a_third_process_is_answered_busy() {
    let meeting = Meeting::new(&[]);
    let mut server = meeting.serving();
    let mut slow = meeting.standing();
    let mut third = Server::start(meeting.command());
    let line = third.wait("whoami: ");
    assert!(line.ends_with("does not hand over: busy"), "{line}");
    // A request for an upgrade is refused in the same way.
    server.signal(Signal::HUP);
    goes_on(&slow);
    slow.wait("serving gen=2");
    server.wait("upgrade ok");
}

#[test]
#[cfg_attr(ecdysis_unix, ignore = "abstract names")]
fn peers_that_stall_or_talk_garbage_change_nothing_and_block_nobody() {
    // A manifest of this size does not fit into the socket.
    let mut args = vec!["--probation".to_owned(), "20".into(), "--ready-timeout".into(), "3000".into()];
    let dir = tempdir();
    let long = "x".repeat(104_usize.saturating_sub(dir.path().as_os_str().len()));
    for n in 0..50 {
        args.extend(["--listen".into(), format!("unix:@{}{n}{long}", dir.path().display())]);
    }
    let mut meeting = Meeting::new(&[]);
    meeting.args = args;
    let mut server = meeting.serving();
    let addr = server.addr();
    let load = Load::on(&addr, 1);
    let verdict = |server: &mut Server, expected: &str| {
        let line = server.wait("upgrade ");
        assert!(line.starts_with("upgrade failed") && line.contains(expected), "{expected}: {line}");
        assert_eq!(generation(&addr), 1);
    };

    // These peers request nothing.
    let _mute: Vec<_> = (0..40).map(|_| meeting.connect()).collect();
    let mut half = meeting.connect();
    half.write_all(b"take").unwrap();
    for hello in [&b"garbage\n"[..], b"takeover 2\n", b"\n", &[0xff; 4000]] {
        let mut stream = meeting.connect();
        let _ = stream.write_all(hello);
        let answer = rest(stream);
        assert!(answer.is_empty() || answer == "failed: this is a takeover socket\nend\n", "{answer:?}");
    }
    drop(meeting.connect());

    // These requests are accepted.
    drop(meeting.ask());
    verdict(&mut server, "child ");
    drop(meeting.begin());
    verdict(&mut server, "child ");
    for garbage in [&b"garbage\n"[..], &[b'x'; 10_000], b"commit\n", b"serving\n", b"\xff\n", b"ready\nnonsense\n"] {
        let mut stream = meeting.begin();
        stream.write_all(garbage).unwrap();
        verdict(&mut server, "sent an invalid message");
    }
    // A peer that is ready, and gone at the commit or soon after.
    let mut stream = meeting.begin();
    stream.write_all(b"ready\n").unwrap();
    drop(stream);
    verdict(&mut server, "child ");
    // A peer that reads nothing.
    let stalled = meeting.ask();
    verdict(&mut server, "was not ready, or did not serve, within 3s");
    drop(stalled);
    load.stop().assert_none_failed();
}

#[test]
fn a_stop_is_served_though_a_peer_stalls() {
    let meeting = Meeting::new(&[]);
    let mut server = meeting.serving();
    let _stalled = meeting.ask();
    meeting.wait_busy();
    server.signal(Signal::TERM);
    let line = server.wait("upgrade failed");
    assert!(line.contains("stop was requested"), "{line}");
    server.wait("ended gen=1");
}

/// A peer that reads nothing, while there is more to send than the socket can buffer.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "abstract names")]
fn a_stalled_peer_and_a_manifest_larger_than_the_socket() {
    let dir = tempdir();
    let mut args: Vec<String> = ["--probation", "20", "--threads", "0"].map(String::from).into();
    // 3,000 characters per line once escaped, and more descriptors than the 253 of one message.
    for n in 0..900 {
        args.extend(["--listen".into(), format!("unix:@{}-{n:04}{}", dir.path().display(), "\u{1}".repeat(60))]);
    }
    let mut meeting = Meeting::new(&[]);
    meeting.args = args;
    let mut server = meeting.serving();
    let stalled = meeting.ask();
    meeting.wait_busy();
    drop(stalled);
    server.wait("upgrade failed");
    let next = meeting.serving();
    server.wait("upgrade ok");
    let sockets = fds(next.pid()).values().filter(|what| what.starts_with("socket:")).count();
    assert!(sockets > 900, "{sockets}");
}

const NOBODY: u32 = 65534;

/// Opens a directory and the socket in it to all users, as an administrator might by mistake.
fn open_to_all(meeting: &Meeting) {
    fs::set_permissions(meeting.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(&meeting.socket, fs::Permissions::from_mode(0o777)).unwrap();
}

/// A copy of the program that other users can run.
fn public_whoami(dir: &Path) -> PathBuf {
    let path = dir.join("whoami");
    install("whoami", &path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_foreign_user_is_refused() {
    if !is_root() {
        return;
    }
    let meeting = Meeting::new(&[]);
    let server = meeting.serving();
    let program = public_whoami(meeting.dir.path());
    let foreign = || {
        let mut command = Command::new(&program);
        command.args(["--listen", "127.0.0.1:0", "--take-over"]).arg(&meeting.socket).uid(NOBODY);
        Server::start(command).wait("whoami: ")
    };
    // The file's mode keeps that user out.
    fs::set_permissions(meeting.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let line = foreign();
    assert!(line.contains("cannot connect to takeover socket") && line.contains("Permission denied"), "{line}");
    // So does the check of the user that the kernel reports.
    open_to_all(&meeting);
    let line = foreign();
    assert!(line.ends_with("does not hand over: denied"), "{line}");
    assert_eq!(generation(&server.addr()), 1);
}

/// Descriptors and state are not taken from another user.
#[test]
fn a_foreign_user_is_not_taken_over_from() {
    if !is_root() {
        return;
    }
    let meeting = Meeting::new(&[]);
    fs::set_permissions(meeting.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = public_whoami(meeting.dir.path());
    let mut command = Command::new(&program);
    meeting.arguments(command.uid(NOBODY).gid(NOBODY));
    let _theirs = Server::serving(command);
    // A server of root would be trusted, but this one belongs to another user.
    let mut command = Command::new(&program);
    meeting.arguments(command.uid(54_321));
    open_to_all(&meeting);
    let line = Server::start(command).wait("whoami: ");
    assert!(line.contains("user 65534 listens at") && line.contains("not trusted"), "{line}");
}

#[test]
fn root_may_ask_a_user_but_does_not_believe_one() {
    if !is_root() {
        return;
    }
    let meeting = Meeting::new(&["--probation", "20"]);
    fs::set_permissions(meeting.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = public_whoami(meeting.dir.path());
    let mut command = Command::new(&program);
    meeting.arguments(command.uid(NOBODY).gid(NOBODY));
    let mut theirs = Server::serving(command);
    drop(meeting.ask());
    theirs.wait("upgrade failed: ");
    let line = Server::start(meeting.command()).wait("whoami: ");
    assert!(line.contains("not trusted"), "{line}");
}

/// Like containers on one host network: PIDs of one mean nothing in the other, each has its own view of the files, and
/// the user has another number.
#[test]
fn across_pid_mount_and_user_namespaces() {
    let container =
        ["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--ipc", "--uts"];
    if !can_unshare(&container) {
        return;
    }
    let meeting = Meeting::new(&["--probation", "50"]);
    let contained = || {
        let mut command = Command::new("unshare");
        command.args(container).arg(example("whoami"));
        meeting.arguments(&mut command);
        command
    };
    let mut first = meeting.serving();
    let addr = first.addr();
    let load = Load::on(&addr, 2);

    // Into the container: there the process is number 1; from outside it has another number.
    let mut second = Server::serving(contained());
    let line = first.wait("upgrade ok");
    assert_eq!(field::<u64>(&line, "gen"), 2);
    assert_ne!(field::<u32>(&line, "pid"), 1);
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), 1);

    // From one container into another, neither of which can see the other's processes.
    let mut third = Server::serving(contained());
    let line = second.wait("upgrade ok");
    assert_eq!((field::<u32>(&line, "pid"), field::<u64>(&line, "gen")), (0, 3));

    // A process that fails there has no PID that the error could name.
    let file = meeting.dir.path().join("misbehave");
    let closed = if has_peer_pidfd() { "closed its link but did not end" } else { "ended before it was ready" };
    for (words, expected) in [("refuse=not here", "refused: not here"), ("close-status", closed)] {
        fs::write(&file, words).unwrap();
        let mut command = contained();
        command.arg("--misbehave").arg(&file);
        let _bad = Server::start(command);
        let line = third.wait("upgrade failed");
        assert!(line.contains(&format!("child of another PID namespace {expected}")), "{line}");
    }

    // And out of it.
    let fourth = meeting.serving();
    let line = third.wait("upgrade ok");
    assert_eq!(field::<u64>(&line, "gen"), 4);
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), fourth.pid());
    load.stop().assert_none_failed();
}

/// An ordinary user, too, whose containers map him to root inside.
#[test]
fn across_user_namespaces_of_an_ordinary_user() {
    if !is_root() {
        return;
    }
    let meeting = Meeting::new(&["--probation", "20"]);
    fs::set_permissions(meeting.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = public_whoami(meeting.dir.path());
    let as_user = |program: &dyn AsRef<OsStr>| {
        let mut command = Command::new(program.as_ref());
        command.uid(54_321).gid(54_321).current_dir("/");
        command
    };
    let probe = as_user(&"unshare").args(["--user", "--map-root-user", "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("not run: this machine allows no user namespaces to users");
        return;
    }
    let mut command = as_user(&program);
    meeting.arguments(&mut command);
    let mut first = Server::serving(command);
    let mut command = as_user(&"unshare");
    command.args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child"]).arg(&program);
    meeting.arguments(&mut command);
    let _second = Server::serving(command);
    first.wait("upgrade ok");
    assert_eq!(generation(&first.addr()), 2);
}

/// Returns an address that no other server has, so that every generation can listen on the same one.
fn own_address() -> String {
    static NUMBER: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    format!("127.{}.{high}.{low}:7002", 100 + NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Runs the commands of the guide's two terminals.
#[test]
fn the_example_does_what_it_says() {
    let dir = tempdir();
    let socket = dir.path().join("socket");
    let addr = own_address();
    let start = |more: &[&str]| {
        let mut command = Command::new(example("takeover"));
        command.args(["--listen", &addr, "--socket"]).arg(&socket).args(more);
        Server::start(command)
    };
    let mut first = start(&["--linger"]);
    first.wait("serving: generation 1, ");
    let mut held = BufReader::new(connect(&addr).unwrap());
    for count in 1..=3 {
        held.get_mut().write_all(b"hello\n").unwrap();
        let mut answer = String::new();
        held.read_line(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("answer {count} from generation 1, ")), "{answer}");
    }
    let pid_file = dir.path().join("pid");
    let mut second = start(&["--pid-file", pid_file.to_str().unwrap()]);
    let line = second.wait("serving: generation 2, ");
    assert!(line.ends_with(" 3 answers so far"), "{line}");
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), format!("{}\n", second.first_pid()));

    // The old process lingers. Its supervisor may stop it as soon as the new one is ready, which must not stop the new
    // one.
    send_signal(first.first_pid(), Signal::TERM);
    first.wait("handed over to pid ");
    assert_eq!(held.read_line(&mut String::new()).unwrap(), 0, "an idle connection ends");
    first.wait("ended: generation 1, ");
    first.wait_all_ended();
    let mut stream = BufReader::new(connect(&addr).unwrap());
    stream.get_mut().write_all(b"hello\n").unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).unwrap();
    assert!(answer.starts_with("answer 4 from generation 2, "), "{answer}");
    drop(stream);

    let mut third = start(&["--linger"]);
    third.wait("serving: generation 3, ");
    second.wait("ended: generation 2, ");
    let mut fourth = start(&[]);
    third.wait("handed over to pid ");
    // It has not been asked to end yet.
    fourth.wait("serving: generation 4, ");
    assert_ne!(state(third.first_pid()), Some('Z'));
    send_signal(third.first_pid(), Signal::TERM);
    third.wait_all_ended();
}

/// Runs two pods of the manifest on one node, with its arguments: the new one takes over, its probe succeeds, and the
/// kubelet then ends the old one.
#[test]
fn the_manifest_runs_the_example() {
    let node = tempdir();
    let addr = own_address();
    let manifest = include_str!("../../examples/takeover.yaml");
    let args: Vec<_> = manifest.lines().filter_map(|line| line.trim().strip_prefix("- ")).collect();
    let args: Vec<_> = args.into_iter().filter(|arg| arg.starts_with("--")).collect();
    let pod = |name: &str| {
        let tmp = node.path().join(name);
        fs::create_dir(&tmp).unwrap();
        let mut command = Command::new(example("takeover"));
        for arg in &args {
            let arg = arg.replace("/tmp", tmp.to_str().unwrap()).replace("0.0.0.0:8080", &addr);
            command.arg(arg.replace("/run/takeover", node.path().to_str().unwrap()));
        }
        (Server::start(command), tmp.join("pid"))
    };
    let (mut old, _) = pod("old");
    old.wait("serving: generation 1, ");
    let (mut new, probed) = pod("new");
    eventually("the new pod is ready", || probed.exists());
    new.wait("serving: generation 2, ");
    old.wait("handed over to pid ");
    send_signal(old.first_pid(), Signal::TERM);
    old.wait_all_ended();
    assert!(probed.exists() && state(new.first_pid()) != Some('Z'));
}
