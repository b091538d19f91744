//! Features for operators: PID files, the log, rollback, and the choice of the next generation's program.

use std::fs::{self, Permissions};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::*;

fn can(program: &str, args: &[&str]) -> bool {
    let can = Command::new(program).args(args).output().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("not run: this machine does not allow {program} {args:?}");
    }
    can
}

fn names_the_server_through_an_upgrade(mut server: Server, pid_file: &Path) {
    let named = || fs::read_to_string(pid_file).unwrap();
    assert_eq!(named(), format!("{}\n", server.pid()));
    let line = server.upgrade();
    assert_eq!(named(), format!("{}\n", field::<u32>(&line, "pid")));
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert_eq!(named(), "", "it cannot be removed, so it is emptied");
}

const WHOAMI: [&str; 5] = ["--listen", "127.0.0.1:0", "--probation", "20", "--pid-file"];

#[test]
fn a_pid_file_that_is_a_mount_point_is_written_in_place() {
    let dir = tempdir();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::write(&source, "").unwrap();
    fs::write(&target, "").unwrap();
    if !can("unshare", &["--mount", "mount", "--bind", source.to_str().unwrap(), target.to_str().unwrap()]) {
        return;
    }
    install("whoami", dir.path().join("whoami"));
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#, "sh"]);
    command.args([&source, &target, &dir.path().join("whoami")]).args(WHOAMI).arg(&target);
    names_the_server_through_an_upgrade(Server::serving(command), &source);
}

#[test]
fn a_pid_file_in_a_directory_of_root_is_written_in_place() {
    const NOBODY: [&str; 5] = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    if !can("setpriv", &[&NOBODY[..], &["true"]].concat()) {
        return;
    }
    let dir = tempdir();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let pid_file = dir.path().join("pid");
    fs::write(&pid_file, "").unwrap();
    std::os::unix::fs::chown(&pid_file, Some(65534), None).unwrap();
    install("whoami", dir.path().join("whoami"));
    let mut command = Command::new("setpriv");
    command.args(NOBODY).arg(dir.path().join("whoami")).args(WHOAMI).arg(&pid_file);
    names_the_server_through_an_upgrade(Server::serving(command), &pid_file);
}

/// Such a child must not use its handover, and so cannot report why it ends.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "file capabilities")]
fn a_child_with_file_capabilities_is_named() {
    const NOBODY: [&str; 5] = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let dir = tempdir();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let (plain, privileged) = (dir.path().join("whoami"), dir.path().join("privileged"));
    install("whoami", &plain);
    install("whoami", &privileged);
    let capable = privileged.to_str().unwrap();
    if !can("setpriv", &[&NOBODY[..], &["true"]].concat()) || !can("setcap", &["cap_net_bind_service=ep", capable]) {
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(NOBODY).arg(&plain).args(&WHOAMI[..4]).args(["--exec", capable]);
    let mut server = Server::serving(command);
    let line = server.fail_to_upgrade();
    // On a file system that is mounted with nosuid, the capabilities have no effect, and the upgrade succeeds.
    assert!(line.contains("exit status: 1, probably because") && line.contains("AT_SECURE"), "{line}");
    // The child reports it in its own log.
    assert!(server.said().iter().any(|line| line.starts_with("whoami: ") && line.contains("AT_SECURE")));
}

#[test]
fn what_the_next_generation_runs_is_chosen_at_the_upgrade() {
    let dir = tempdir();
    let (next, other) = (dir.path().join("next"), dir.path().join("other"));
    install("whoami", &other);
    let mut server = Server::whoami([WHOAMI[..4].to_vec(), vec!["--next", next.to_str().unwrap()]].concat());
    let line = server.fail_to_upgrade();
    assert!(line.contains("cannot prepare the upgrade: before_upgrade: No such file"), "{line}");
    fs::write(&next, "exec=/nowhere/whoami\n").unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("cannot run /nowhere/whoami: execve: No such file"), "{line}");
    fs::write(&next, format!("exec={}\nCHOSEN=at the upgrade\n", other.display())).unwrap();
    let pid: u32 = field(&server.upgrade(), "pid");
    assert_eq!(fs::read_link(format!("/proc/{pid}/exe")).unwrap(), other);
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.split(|byte| *byte == 0).any(|variable| variable == b"CHOSEN=at the upgrade"));
}

/// The new version stops accepting and finishes its connections. The old one accepts again. No connection is cut.
#[test]
fn an_upgrade_is_rolled_back_by_a_check_or_by_an_operator() {
    let dir = tempdir();
    let (verify, socket) = (dir.path().join("verify"), dir.path().join("control"));
    let mut server = Server::whoami(
        [
            &["--listen", "127.0.0.1:0", "--probation", "20", "--verify", verify.to_str().unwrap()][..],
            &["--control-socket", socket.to_str().unwrap()],
        ]
        .concat(),
    );
    let (addr, first) = (server.addr(), server.pid());
    let load = Load::on(&addr, 2);
    for by_operator in [false, true] {
        send_signal(first, Signal::HUP);
        server.wait("serving gen=2 ");
        // The new version has accepted it and waits for its line. If it was slow, the connection is still queued.
        let mut open = connect(&addr).unwrap();
        assert_eq!(generation(&addr), 2);
        if by_operator {
            assert_eq!(control(&socket, "rollback\n").unwrap().trim(), "rolled back");
        } else {
            fs::write(&verify, "it serves nonsense\n").unwrap();
        }
        let line = server.wait("upgrade ");
        let why = if by_operator { "rolled back by socket" } else { "refused: not verified: it serves nonsense" };
        assert!(line.starts_with("upgrade failed") && line.contains(why), "{line}");
        // The old version accepts, and the new one still answers the connection that it has accepted.
        assert_eq!(generation(&addr), 1);
        open.write_all(b"who\n").unwrap();
        let mut answer = String::new();
        open.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("gen=2 ") || answer.starts_with("gen=1 "), "{answer:?}");
        server.wait_any("ended gen=2 ");
        let _ = fs::remove_file(&verify);
    }
    assert!(control(&socket, "rollback\n").unwrap().starts_with("failed: not on probation"));
    fs::write(&verify, "ok").unwrap();
    send_signal(first, Signal::HUP);
    let line = server.wait("upgrade ");
    assert!(line.starts_with("upgrade ok"), "{line}");
    load.stop().assert_none_failed();
}

/// After any number of signals during an upgrade, exactly one more upgrade follows, so that a version installed in the
/// meantime is started. The new version performs it if the upgrade succeeds, the old one if it fails.
#[test]
fn a_burst_of_reloads_is_followed_by_one_more() {
    for (during_start, fails) in [(true, false), (true, true), (false, false), (false, true)] {
        let dir = tempdir();
        let [how, verify, socket] = ["how", "verify", "control"].map(|name| dir.path().join(name));
        // The new version waits for the test: before it is ready, or on probation.
        match (during_start, fails) {
            (true, false) => fs::write(&how, "stop-self").unwrap(),
            (true, true) => fs::write(&how, "stop-self exit=3").unwrap(),
            (false, _) => {}
        }
        let arguments = ["--listen", "127.0.0.1:0", "--probation", "20", "--misbehave", how.to_str().unwrap()];
        let more = ["--verify", verify.to_str().unwrap(), "--control-socket", socket.to_str().unwrap(), "--log"];
        let mut server = Server::whoami(arguments.iter().chain(&more));
        server.signal(Signal::HUP);
        let child = field(&server.wait(if during_start { " gen=2 pid=" } else { "serving gen=2" }), "pid");
        if during_start {
            frozen(child);
        }
        let load = Load::on(&server.addr(), 1);
        for _ in 0..5 {
            server.signal_first(Signal::HUP);
        }
        if during_start {
            // This request is sent after the signals, so its answer means that they were read.
            assert_eq!(control(&socket, "upgrade\n").unwrap(), "busy\n");
        } else {
            server.wait("forwarded to pid");
        }
        fs::write(&how, "").unwrap();
        match (during_start, fails) {
            (true, _) => send_signal(child, Signal::CONT),
            (false, true) => {
                send_signal(child, Signal::KILL);
                wait_exit(child);
            }
            (false, false) => {}
        }
        fs::write(&verify, "ok").unwrap();
        server.wait(if fails { "upgrade failed" } else { "upgrade ok" });
        server.wait("upgrade ok");
        let last = if fails { 2 } else { 3 };
        assert_eq!(generation(&server.addr()), last);
        eventually("it is free to upgrade", || control(&socket, "status\n").unwrap().contains("phase=serving"));
        let upgrades = server.said().iter().filter(|line| line.starts_with("log info upgrading")).count();
        assert_eq!(upgrades, 2, "during start: {during_start}, fails: {fails}");
        if !during_start && fails {
            drop(load);
        } else {
            load.stop().assert_none_failed();
        }
    }
}

/// A load balancer notices a stop late: readiness fails immediately, but connections are accepted during the delay.
#[test]
fn a_stop_is_delayed_until_the_second() {
    let mut server = Server::whoami([&WHOAMI[..4], &["--stop-delay", "3600000", "--log"]].concat());
    let addr = server.addr();
    server.signal(Signal::TERM);
    server.wait("accepting for 3600s more");
    assert_eq!(generation(&addr), 1);
    server.signal(Signal::HUP);
    assert_eq!(generation(&addr), 1, "it no longer upgrades, and still accepts");
    server.signal(Signal::TERM);
    server.wait("ended gen=1 ");
    server.wait_all_ended();

    let service = ecdysis::Ecdysis::builder().standalone().stop_delay(Duration::from_millis(50)).start().unwrap();
    let service = service.ready().unwrap();
    let shutdown = service.shutdown();
    assert!(shutdown.is_ready());
    let stopping = thread::spawn(move || service.stop());
    eventually("readiness fails", || !shutdown.is_ready());
    stopping.join().unwrap();
    assert!(shutdown.is_over());
}

#[test]
fn a_path_that_names_a_version_causes_a_warning() {
    let dir = tempdir();
    let real = dir.path().canonicalize().unwrap().join("app-1.2");
    fs::create_dir(&real).unwrap();
    install("whoami", real.join("whoami"));
    symlink(&real, dir.path().join("current")).unwrap();
    let warned = |program: &Path| {
        let mut command = Command::new(program);
        command.args(&WHOAMI[..4]).arg("--log");
        Server::serving(command).said().iter().any(|line| line.starts_with("log warn") && line.contains("app-1.2"))
    };
    assert!(warned(&real.join("whoami")));
    assert!(!warned(&dir.path().join("current/whoami")));
}

/// Files that root created in its own directory.
#[test]
fn files_that_are_out_of_reach_after_privileges_were_dropped_cause_a_warning() {
    if !is_root() {
        return;
    }
    let start = |drop_rights: &[&str]| {
        let args = ["--listen", "unix:DIR/sock", "--control-socket", "DIR/control", "--ready-timeout", "2000", "--log"];
        Server::whoami([&args, drop_rights].concat())
    };
    let warnings = |server: &Server| -> Vec<String> {
        let warns = |line: &String| line.starts_with("log warn this process can no longer replace or remove");
        server.said().into_iter().filter(warns).collect()
    };
    let of_sockets = |server: &Server| {
        let warnings = warnings(server);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("/sock\"") && warnings[0].contains("/control\""), "{warnings:?}");
    };
    let mut keeps_them = start(&["--pid-file", "DIR/pid"]);
    keeps_them.upgrade();
    assert_eq!(warnings(&keeps_them), [""; 0]);

    of_sockets(&start(&["--drop-rights", "before-ready"]));

    let mut later = start(&["--drop-rights", "after-ready", "--pid-file", "DIR/pid"]);
    assert_eq!(warnings(&later), [""; 0]);
    // The directory, and so the program, is out of reach as well.
    later.signal(Signal::HUP);
    later.wait("upgrade failed");
    of_sockets(&later);
    assert!(warnings(&later)[0].contains("/pid\""));
}

#[test]
fn each_line_of_the_log_names_its_process_and_generation() {
    let mut server = Server::whoami([&WHOAMI[..4], &["--log"]].concat());
    let first = server.pid();
    server.upgrade();
    let second = server.pid();
    let ended = server.wait_any("log info ended");
    assert!(ended.ends_with(&format!(" pid={first} generation=1")), "{ended}");
    let serving = server.wait_any(&format!("log info serving pid={second} generation=2"));
    let logged: Vec<_> = server.said().into_iter().filter(|line| line.starts_with("log ")).collect();
    assert!(logged.contains(&serving));
    for line in logged {
        assert!(line.contains(" pid=") && line.contains(" generation="), "{line}");
    }
}
