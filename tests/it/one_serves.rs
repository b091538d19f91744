//! Exactly one version serves, despite wrappers, nested requests, helpers, debuggers, privileges, and values that a
//! program drops early.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use ecdysis::Ecdysis;
use rustix::process::Signal;

/// Starts a server whose next generations misbehave as the file says.
fn server(dir: &TempDir, more: &[&str]) -> (Server, impl Fn(&str)) {
    let how = dir.path().join("how");
    let args = ["--listen", &own_address(), "--misbehave", how.to_str().unwrap()];
    (Server::whoami(args.iter().chain(more)), move |words: &str| fs::write(&how, words).unwrap())
}

/// A script that starts the server as its own child. A kill hits the script and not the server.
fn wrapper(dir: &TempDir) -> String {
    let path = dir.path().join("wrapper");
    script(&path, &format!("{} \"$@\"\nexit $?", whoami_in_shell()));
    path.to_str().unwrap().to_owned()
}

fn refused(addr: &str) {
    assert_eq!(connect(addr).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn the_server_behind_a_wrapper_is_given_up_with_it() {
    let dir = tempdir();
    let pid_file = dir.path().join("pid");
    let more = ["--exec", &wrapper(&dir), "--ready-timeout", "2000", "--pid-file", pid_file.to_str().unwrap()];
    for carrier in ["pipes", "socket"] {
        let (mut server, misbehave) = server(&dir, &[&more[..], &["--transport", carrier]].concat());
        let (addr, pid) = (server.addr(), server.first_pid());
        misbehave("stop-self");
        server.signal(Signal::HUP);
        let child = field(&server.wait(" gen=2 "), "pid");
        frozen(child);
        let line = server.wait("upgrade ");
        assert!(line.contains("not ready, or did not serve, within 2s"), "{line}");
        send_signal(child, Signal::CONT);
        // Its link is still open, and it has received the reason.
        server.wait("the parent gave up on this upgrade");
        eventually("the old one is alone", || server.processes() == [pid]);
        assert_eq!(generation(&addr), 1);
        assert_eq!(fs::read_to_string(&pid_file).unwrap().trim(), pid.to_string());
        server.signal_first(Signal::TERM);
        server.wait_all_ended();
    }
}

#[test]
fn a_stop_during_the_upgrade_also_stops_the_server_behind_a_wrapper() {
    let dir = tempdir();
    let (mut server, misbehave) = server(&dir, &["--exec", &wrapper(&dir)]);
    let addr = server.addr();
    misbehave("stop-self");
    server.signal(Signal::HUP);
    let child = field(&server.wait(" gen=2 "), "pid");
    frozen(child);
    server.signal_first(Signal::TERM);
    server.wait("upgrade failed");
    send_signal(child, Signal::CONT);
    server.wait("the parent gave up on this upgrade");
    server.wait_all_ended();
    refused(&addr);
    assert!(!server.said().iter().any(|line| line.starts_with("serving gen=2")));
}

#[test]
fn a_version_on_probation_upgrades_after_its_verdict() {
    let dir = tempdir();
    let control_socket = dir.path().join("control");
    let more = ["--probation", "20000", "--control-socket", control_socket.to_str().unwrap()];
    let (mut server, _) = server(&dir, &more);
    let (addr, first) = (server.addr(), server.first_pid());
    server.signal(Signal::HUP);
    let second = field::<u32>(&server.wait("serving gen=2"), "pid");
    send_signal(second, Signal::HUP);
    // It answers this later request, so it has received the signal, and makes it wait.
    let status = control(&control_socket, "status\n").unwrap();
    assert!(status.contains(&format!("pid={second} ")) && status.contains("phase=probation"), "{status}");
    send_signal(second, Signal::KILL);
    server.wait("upgrade failed");
    assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), first);
    assert!(!server.said().iter().any(|line| line.contains("gen=3")), "{:?}", server.said());
}

/// It reads `stop` although no thread leads its event loop.
#[test]
fn a_program_that_never_calls_run_can_be_given_up() {
    let dir = tempdir();
    let verify = dir.path().join("verify");
    let more = ["--probation", "20", "--verify", verify.to_str().unwrap()];
    for carrier in ["pipes", "socket"] {
        let (mut server, misbehave) = server(&dir, &[&more[..], &["--transport", carrier]].concat());
        let _ = fs::remove_file(&verify);
        misbehave("no-run");
        server.signal(Signal::HUP);
        server.wait("serving gen=2");
        fs::write(&verify, "not good").unwrap();
        // It has exited, and was not killed.
        server.wait_any("ended gen=2 ");
        server.wait("not verified: not good");
        assert_eq!(generation(&server.addr()), 1);
    }
    // Killing the shell does not kill the server behind it.
    let (mut server, misbehave) = server(&dir, &["--probation", "20000", "--exec", &wrapper(&dir)]);
    misbehave("no-run");
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    let (second, first) = (server.pid(), server.first_pid());
    let shell = server.processes().into_iter().find(|pid| ![first, second].contains(pid)).unwrap();
    send_signal(shell, Signal::KILL);
    server.wait_any("ended gen=2 ");
    assert_eq!(generation(&server.addr()), 1);
}

/// It also carries out a request that the parent forwards, although no one else leads its event loop during a delay.
#[test]
fn a_program_that_never_calls_run_stops_with_its_parent() {
    for delay in ["0", "200"] {
        let dir = tempdir();
        let (mut server, misbehave) = server(&dir, &["--probation", "20000", "--stop-delay", delay]);
        misbehave("no-run");
        server.signal(Signal::HUP);
        server.wait("serving gen=2");
        server.signal_first(Signal::TERM);
        server.wait_any("ended gen=2 ");
        server.wait_all_ended();
        refused(&server.addr());
    }
}

/// The parent gives the child up, is stopped, and has ended before the child continues, so the child sees both at the same time.
#[test]
fn a_stopped_service_does_not_come_back_with_a_frozen_child() {
    for carrier in ["pipes", "socket"] {
        let dir = tempdir();
        let more = ["--probation", "20000", "--exec", &wrapper(&dir), "--transport", carrier];
        let (mut server, _) = server(&dir, &more);
        server.signal(Signal::HUP);
        server.wait("serving gen=2");
        let (second, first) = (server.pid(), server.first_pid());
        let shell = server.processes().into_iter().find(|pid| ![first, second].contains(pid)).unwrap();
        send_signal(second, Signal::STOP);
        send_signal(shell, Signal::KILL);
        server.wait("upgrade failed");
        server.signal_first(Signal::TERM);
        server.wait("ended gen=1");
        wait_exit(first);
        send_signal(second, Signal::CONT);
        server.wait_any("ended gen=2");
        server.wait_all_ended();
        refused(&server.addr());
    }
}

/// A rolled back child waits until its parent serves again.
#[test]
fn a_rolled_back_child_goes_on_if_its_parent_has_died() {
    for carrier in ["pipes", "socket"] {
        let dir = tempdir();
        let socket = dir.path().join("control");
        let more =
            ["--probation", "20000", "--transport", carrier, "--control-socket", socket.to_str().unwrap(), "--log"];
        let (mut server, _) = server(&dir, &more);
        let (addr, first) = (server.addr(), server.first_pid());
        server.signal(Signal::HUP);
        let second = field::<u32>(&server.wait("serving gen=2"), "pid");
        send_signal(first, Signal::STOP);
        let load = Load::on(&addr, 2);
        eventually("it is under load", || load.answered() > 10);
        let rollback = thread::spawn(move || control(&socket, "rollback\n").unwrap());
        server.wait("rollback requested by socket");
        send_signal(first, Signal::KILL);
        assert_eq!(rollback.join().unwrap().trim(), "failed: the parent has ended");
        assert_eq!(field::<u32>(&ask(&addr).unwrap(), "pid"), second);
        load.stop().assert_none_failed();
    }
}

/// The child carries out requests that reach the parent during the probation.
#[test]
fn the_parent_passes_on_what_it_is_asked_for() {
    let dir = tempdir();
    let verify = dir.path().join("verify");
    let (mut server, _) = server(&dir, &["--probation", "0", "--verify", verify.to_str().unwrap(), "--log"]);
    let addr = server.addr();
    server.signal(Signal::HUP);
    server.wait("serving gen=2");
    server.signal_first(Signal::HUP);
    server.wait("forwarded to pid");
    fs::write(&verify, "ok").unwrap();
    server.wait("serving gen=3");
    assert_eq!(generation(&addr), 3);

    for (signal, how) in [(Signal::USR2, "partially stopped"), (Signal::TERM, "stopped")] {
        let (mut server, _) = self::server(&dir, &["--probation", "20000"]);
        server.signal(Signal::HUP);
        server.wait("serving gen=2");
        server.signal_first(signal);
        let line = server.wait_any("ended gen=2");
        assert!(line.contains(&format!("left=0 {how}")) && line.contains("the parent"), "{line}");
        server.wait_all_ended();
        refused(&server.addr());
    }
}

/// If the child dies before it carries out a forwarded stop, the parent stops.
#[test]
fn a_stop_is_not_lost_with_the_child() {
    let dir = tempdir();
    let (mut server, _) = server(&dir, &["--probation", "20000", "--log"]);
    let addr = server.addr();
    server.signal(Signal::HUP);
    let second = field::<u32>(&server.wait("serving gen=2"), "pid");
    send_signal(second, Signal::STOP);
    server.signal_first(Signal::TERM);
    server.wait("forwarded to pid");
    send_signal(second, Signal::KILL);
    server.wait_all_ended();
    refused(&addr);
}

/// A process that the dead child has started keeps its links open.
#[test]
fn a_death_is_seen_although_a_helper_holds_the_links() {
    for way in [&[][..], &["--fork"], &["--transport", "socket"], &["--fork", "--transport", "socket"]] {
        let dir = tempdir();
        let (mut server, misbehave) = server(&dir, &[&["--probation", "60000"], way].concat());
        let addr = server.addr();
        for (words, line) in [("helper exit=3", "ended before"), ("helper die-after-ready=50", "after it was ready")] {
            misbehave(words);
            let failed = server.fail_to_upgrade();
            assert!(failed.contains(line), "{way:?}: {failed}");
            assert_eq!(generation(&addr), 1);
        }
    }
}

/// The kernel reports the end of a traced child first to its debugger. This debugger does not react.
#[test]
fn a_debugger_on_the_child_holds_up_nobody() {
    let dir = tempdir();
    let control_socket = dir.path().join("control");
    let more = ["--ready-timeout", "4000", "--control-socket", control_socket.to_str().unwrap()];
    let (mut server, misbehave) = server(&dir, &more);
    misbehave("hang");
    server.signal(Signal::HUP);
    let child = field::<u32>(&server.wait(" gen=2 "), "pid");
    let debugger = Debugger::of(child, None);
    let status = format!("/proc/{child}/status");
    let traced = || fs::read_to_string(&status).is_ok_and(|status| !status.contains("TracerPid:\t0\n"));
    eventually("it is traced", traced);
    let line = server.wait("upgrade failed");
    assert!(line.contains("not ready, or did not serve, within 4s"), "{line}");
    let status = control(&control_socket, "status\n").unwrap();
    assert!(status.contains("phase=serving"), "{status}");
    server.signal_first(Signal::TERM);
    server.wait("ended gen=1");
    drop(debugger);
    server.wait_all_ended();
}

/// A debugger that holds the child at its end, so that SIGKILL does not end it. This simulates a hang in the kernel.
#[test]
fn a_child_that_cannot_be_killed_holds_up_no_stop() {
    // Without a stop, the library waits for five seconds. A busy machine may be that slow too, but not each time.
    let mut took = (0..3).map(|_| stop_beside_a_child_that_cannot_be_killed());
    assert!(took.any(|took| took.as_secs() < 4));
}

/// Returns how long the stop took.
fn stop_beside_a_child_that_cannot_be_killed() -> Duration {
    let dir = tempdir();
    let (mut server, misbehave) = server(&dir, &["--ready-timeout", "5000", "--log"]);
    misbehave("hang");
    server.signal(Signal::HUP);
    let child = field::<u32>(&server.wait(" gen=2 "), "pid");
    let running = dir.path().join("running");
    let debugger = Debugger::of(child, Some(&running));
    // Before that, the child is stopped because the debugger attaches.
    eventually("the debugger lets it run", || running.exists());
    // The child was killed, but is not dead.
    eventually("it is stopped at its end", || {
        try_status_field(child, "State").is_some_and(|state| state.starts_with('t'))
    });
    let begun = Instant::now();
    server.signal_first(Signal::TERM);
    server.wait("cannot be reaped yet");
    server.wait("ended gen=1");
    let took = begun.elapsed();
    drop(debugger);
    server.wait_all_ended();
    took
}

/// Ends before the server of its test, even if that fails, because only then can the server's child be killed.
struct Debugger(Child);

impl Debugger {
    fn of(child: u32, hold: Option<&Path>) -> Self {
        let mut command = this_program("one_serves::debugger");
        command.env("TRACEE", child.to_string()).envs(hold.map(|running| ("HOLD", running)));
        Self(guard::mark(&mut command, 0).spawn().unwrap())
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The debugger of the tests above, in a separate process.
#[test]
fn debugger() {
    let Some(child) = std::env::var("TRACEE").ok().and_then(|child| child.parse::<i32>().ok()) else { return };
    let hold = std::env::var_os("HOLD");
    // SAFETY: the calls touch no memory of this process (ptrace(2), waitpid(2)).
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_ATTACH, child, 0, 0), 0);
        libc::waitpid(child, std::ptr::null_mut(), libc::__WALL);
        if hold.is_some() {
            assert_eq!(libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, libc::PTRACE_O_TRACEEXIT), 0);
        }
        libc::ptrace(libc::PTRACE_CONT, child, 0, 0);
    }
    if let Some(running) = hold {
        fs::write(running, "").unwrap();
    }
    loop {
        thread::park();
    }
}

/// A caller with fewer privileges chooses argv[0], PATH and the directory.
#[test]
fn a_privileged_program_starts_nothing_that_its_caller_names() {
    let dir = tempdir();
    let program = dir.path().join("server");
    install("whoami", &program);
    if !is_root() {
        return;
    }
    std::os::unix::fs::chown(&program, None, Some(65534)).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o2755)).unwrap();
    let evil = dir.path().join("evil");
    fs::write(&evil, "#!/bin/sh\necho evil: $* >&2\n").unwrap();
    fs::set_permissions(&evil, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    std::os::unix::process::CommandExt::arg0(&mut command, "./evil");
    command.args(["--listen", "127.0.0.1:0"]).current_dir(dir.path()).env("PWD", dir.path()).env("PATH", dir.path());
    let mut server = Server::serving(command);
    server.signal(Signal::HUP);
    let line = server.wait("upgrade ");
    assert!(!server.said().iter().any(|line| line.starts_with("evil")), "{line}");
    assert!(line.contains("AT_SECURE") || !is_privileged(server.first_pid()), "{line}");
}

/// Returns false on a file system that ignores the set-group-ID bit.
fn is_privileged(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let gids = status.lines().find(|line| line.starts_with("Gid:")).unwrap().split_whitespace();
    gids.clone().nth(1) != gids.clone().nth(2)
}

/// A handover that is meant for this process but cannot be used is an error. One that is meant for another process is
/// ignored.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "the inode of a pipe does not identify it there")]
fn a_handover_that_cannot_be_used_is_an_error() {
    use std::os::fd::AsRawFd;
    let (pipe, other) = rustix::pipe::pipe().unwrap();
    let named = |fd: &std::os::fd::OwnedFd| format!("{}@{}", fd.as_raw_fd(), rustix::fs::fstat(fd).unwrap().st_ino);
    let (pipe, gone) = (named(&pipe), format!("{}@1", other.as_raw_fd()));
    for (value, refused) in [
        (format!("v1:manifest={pipe},status={gone}"), true),
        (format!("v1:manifest=1@1,status={pipe}"), true),
        ("v9:anything".to_owned(), true),
        (format!("v1:manifest={gone},status={gone}"), false),
        ("yes".to_owned(), false),
    ] {
        let mut command = Command::new(example("whoami"));
        command.args(["--listen", "127.0.0.1:0"]).env("ECDYSIS_HANDOVER", &value);
        let mut server = Server::start(command);
        let line = if refused { server.wait("whoami: ") } else { server.wait("serving gen=1") };
        assert_eq!(line.contains("ECDYSIS_HANDOVER"), refused, "{value}: {line}");
    }
}

/// A stop may be requested just after `run` has returned.
#[test]
fn stop_returns_beside_run() {
    if !is_alone("one_serves::stop_returns_beside_run") {
        return;
    }
    for _ in 0..300 {
        let server = Ecdysis::builder().start().unwrap().ready().unwrap();
        let (done, returned) = mpsc::channel();
        for stops in [false, true, true] {
            let (server, done) = (server.clone(), done.clone());
            thread::spawn(move || {
                if stops {
                    server.stop();
                } else {
                    server.run().unwrap();
                }
                // The receiver is gone only after a failed test.
                let _ = done.send(());
            });
        }
        for _ in 0..3 {
            returned.recv_timeout(DEADLINE).expect("stop and run return");
        }
        assert!(server.shutdown().is_over());
        drop(server);
        // The threads may briefly keep their handles.
        eventually("another start is possible", || match Ecdysis::builder().start() {
            Ok(starting) => {
                drop(starting);
                true
            }
            Err(_) => false,
        });
    }
}

/// Programs may choose any duration, however long.
#[test]
fn every_time_may_be_the_longest() {
    for (setting, end) in [("--probation", "serving gen=2"), ("--ready-timeout", "upgrade ok")] {
        let dir = tempdir();
        let (mut server, _) = server(&dir, &[setting, "max"]);
        server.signal(Signal::HUP);
        server.wait(end);
        assert_eq!(generation(&server.addr()), 2);
        server.signal_all(Signal::TERM);
        server.wait_all_ended();
    }
}

/// Behavior that lasts until the process ends does not depend on a value that the program may drop.
#[test]
fn dropping_ecdysis_early_changes_nothing() {
    let dir = tempdir();
    let (mut server, _) = server(&dir, &["--hold", "--drop-early", "--wait-for-parent", "--probation", "20"]);
    let mut connection = connect(&server.addr()).unwrap();
    connection.write_all(b"who\nhalf a line").unwrap();
    connection.read_exact(&mut [0; 6]).unwrap();
    server.signal(Signal::HUP);
    server.wait("dropped gen=1");
    server.signal_first(Signal::HUP);
    drop(connection);
    // The late signal did not end the drain, and the new process waited for the end of the old one.
    server.wait("ended gen=1");
    server.wait("parent ended gen=2");
}

/// A logger may block forever, for example on a pipe that no process reads.
#[test]
fn a_log_that_blocks_holds_up_nobody() {
    struct Blocked;
    impl log::Log for Blocked {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, _: &log::Record<'_>) {
            loop {
                thread::park();
            }
        }
        fn flush(&self) {}
    }
    if !is_alone("one_serves::a_log_that_blocks_holds_up_nobody") {
        return;
    }
    log::set_logger(&Blocked).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let (done, returned) = mpsc::channel();
    thread::spawn(move || {
        let server = Ecdysis::builder().start().unwrap().ready().unwrap();
        server.stop();
        let _ = done.send(server.run().is_ok());
    });
    assert!(returned.recv_timeout(DEADLINE).expect("run returns"));
}

/// The same for an observer, which the trigger loop calls in the middle of an upgrade.
#[test]
fn an_observer_that_blocks_holds_up_nobody() {
    if !is_alone("one_serves::an_observer_that_blocks_holds_up_nobody") {
        return;
    }
    let (done, returned) = mpsc::channel();
    thread::spawn(move || {
        let observer = |_: &ecdysis::Event<'_>| loop {
            thread::park();
        };
        let server = Ecdysis::builder().exec("/bin/false").on_event(observer).start().unwrap().ready().unwrap();
        let failed = server.upgrade().unwrap_err();
        server.stop();
        let _ = done.send((failed.to_string(), server.run().is_ok()));
    });
    let (failed, stopped) = returned.recv_timeout(DEADLINE).expect("upgrade, stop and run return");
    assert!(failed.contains("ended before it was ready: exit status: 1") && stopped, "{failed}");
}
