//! Traps about processes, tested with real processes.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::*;
use rustix::process::Signal;

const LISTEN: [&str; 2] = ["--listen", "127.0.0.1:0"];

/// Starts a server whose next generations misbehave as a file says.
fn misbehaving(dir: &TempDir, more: &[&str]) -> (Server, impl Fn(&str)) {
    let how = dir.path().join("how");
    let args = ["--listen", &own_address(), "--misbehave", how.to_str().unwrap()];
    let server = Server::whoami(args.iter().chain(more));
    (server, move |words: &str| fs::write(&how, words).unwrap())
}

#[test]
fn every_failure_is_told_apart_leaves_nothing_behind_and_the_next_upgrade_works() {
    const QUICK: &[(&str, &str)] = &[
        ("exit=3", "ended before it was ready: exit status: 3"),
        ("exit=0", "ended before it was ready: exit status: 0"),
        ("signal=11", "ended before it was ready: signal: 11"),
        ("panic", "ended before it was ready: exit status: 101"),
        ("refuse=config: line 3 is bad", "refused: config: line 3 is bad"),
        ("garbage", "sent an invalid message"),
        ("close-status", "without reporting"),
    ];
    // These use a separate server: on a busy machine, even an immediate failure may take longer than this timeout.
    const TOO_LATE: &[(&str, &str)] =
        &[("hang", "not ready, or did not serve, within 3s"), ("stop-self", "not ready, or did not serve, within 3s")];
    for (way, limit, failures) in [
        (&[][..], "60000", QUICK),
        (&["--fork"], "60000", QUICK),
        (&[], "3000", TOO_LATE),
        (&["--fork"], "3000", TOO_LATE),
    ] {
        let dir = tempdir();
        let (mut server, misbehave) =
            misbehaving(&dir, &[way, &["--ready-timeout", limit, "--probation", "20"]].concat());
        let (addr, pid) = (server.addr(), server.pid());
        eventually("the accept loop waits", || accept_loops_wait(pid, 1));
        let before = fds(pid);
        let load = Load::on(&addr, 1);
        for (words, error) in failures {
            misbehave(words);
            let line = server.fail_to_upgrade();
            assert!(line.contains(error), "{way:?} {words}: {line}");
            assert!(line.contains("child "), "no pid in: {line}");
            assert_eq!(children(pid), Default::default(), "{words}");
        }
        load.stop().assert_none_failed();
        eventually("the descriptors are unchanged", || fds(pid).keys().eq(before.keys()));
        misbehave("");
        server.upgrade();
        assert_eq!(generation(&addr), 2);
    }
}

#[test]
fn a_missing_program_a_text_and_a_deleted_directory_fail_and_the_next_upgrade_works() {
    let dir = tempdir();
    let program = dir.path().join("server");
    install("whoami", &program);
    let start = dir.path().join("start");
    fs::create_dir(&start).unwrap();
    let mut command = Command::new(&program);
    command.args(LISTEN).args(["--probation", "20"]).current_dir(&start);
    let mut server = Server::serving(command);

    fs::remove_file(&program).unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("execve") && line.contains("No such file") && line.contains("server"), "{line}");

    // execvp would run this as a shell script.
    fs::write(&program, "echo hello\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("Exec format error"), "{line}");

    fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("ermission denied"), "{line}");

    fs::remove_file(&program).unwrap();
    install("whoami", &program);
    fs::remove_dir(&start).unwrap();
    server.upgrade();
}

/// The new version gets exactly stdin, stdout, stderr and the handed-over descriptors, default signal dispositions, and
/// the mask of the first start.
#[test]
fn nothing_leaks_into_the_new_version() {
    let dir = tempdir();
    let stray = fs::File::create(dir.path().join("stray")).unwrap();
    for way in ["--probation=20", "--fork"] {
        let mut command = Command::new(example("whoami"));
        command.args(LISTEN).args([way, "--probation", "20"]);
        let stray = stray.try_clone().unwrap();
        // SAFETY: only calls that are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty())?;
                libc::signal(libc::SIGUSR1, libc::SIG_IGN);
                let mut set = std::mem::zeroed();
                libc::sigemptyset(&mut set);
                libc::sigaddset(&mut set, libc::SIGWINCH);
                libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
                Ok(())
            });
        }
        let mut server = Server::serving(command);
        let first = server.pid();
        let is_stray = |target: &String| target.ends_with("/stray");
        assert!(fds(first).values().any(is_stray), "the first has it");
        let mask = status_field(first, "SigBlk");
        assert_eq!(mask, format!("{:016x}", 1_u64 << (libc::SIGWINCH - 1)));
        assert_ne!(u64::from_str_radix(&status_field(first, "SigIgn"), 16).unwrap() & (1 << (libc::SIGUSR1 - 1)), 0);
        server.upgrade();
        server.wait("ended gen=1");
        let second = server.pid();
        assert_ne!(first, second);
        assert!(!fds(second).values().any(is_stray), "{:?}", fds(second));
        assert_eq!(status_field(second, "SigBlk"), mask);
        // It ignores only the signals that std itself ignores. (The C library does not let a program touch the two
        // signals that it uses itself.)
        let ignored = u64::from_str_radix(&status_field(second, "SigIgn"), 16).unwrap();
        let ignored = if cfg!(ecdysis_unix) { ignored & !(0b11 << 31) } else { ignored };
        assert_eq!(ignored, 1 << (libc::SIGPIPE - 1));
        let sockets = |pid| fds(pid).values().filter(|target| target.starts_with("socket:")).count();
        assert_eq!(sockets(first.min(second).max(second)), 2, "one listener, held twice: {:?}", fds(second));
    }
}

/// With F_DUPFD and the old number as the minimum, numbers would climb, and the service would die after some 20
/// generations.
#[test]
fn descriptor_numbers_do_not_climb() {
    let mut command = Command::new("sh");
    let script = "ulimit -n 32; exec \"$0\" --listen 127.0.0.1:0 --listen 127.0.0.1:0 --probation 0 --drain 5";
    command.args(["-c", script]).arg(example("whoami"));
    let mut server = Server::serving(command);
    let addr = server.addr();
    let mut numbers = Vec::new();
    for _ in 0..40 {
        let old = server.pid();
        server.upgrade();
        server.wait_serving();
        // While it lives, its successors keep a descriptor for sending to it.
        wait_exit(old);
        let pid = server.pid();
        let sockets = || fds(pid).values().filter(|target| target.starts_with("socket:")).count();
        // Both accept loops wait, and no connection is open.
        eventually("quiet", || accept_loops_wait(pid, 2) && sockets() == 4);
        let now = || {
            let open = fds(pid);
            (open.len(), *open.keys().last().unwrap())
        };
        // Every second generation has the same numbers, because each fills the gaps that its parent left. The first ones
        // have others: the first binds its sockets, and has descriptors that this test program inherited (make(1) and some
        // terminals leave some open).
        if let at @ 10.. = numbers.len() {
            let same = try_eventually("the numbers of the grandparent", || now() == numbers[at - 2]);
            same.unwrap_or_else(|e| panic!("{e}: {:?} after {numbers:?}", now()));
        }
        numbers.push(now());
    }
    assert_eq!(generation(&addr), 41);
}

#[test]
fn a_replaced_file_and_a_flipped_link_start_the_new_version() {
    let dir = tempdir();
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let exe = |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino();
    for release in ["1", "2"] {
        fs::create_dir(dir.path().join(release)).unwrap();
        install("whoami", dir.path().join(release).join("server"));
    }
    let link = dir.path().join("current");
    symlink("1", &link).unwrap();
    // As started by a shell: the directory's name contains the link, and argv[0] is relative.
    let mut command = Command::new("sh");
    let script = format!("cd '{}' && exec ./server --listen 127.0.0.1:0 --probation 20", link.display());
    command.args(["-c", &script]);
    let mut server = Server::serving(command);
    assert_eq!(exe(server.pid()), inode(&dir.path().join("1/server")));

    symlink("2", dir.path().join("new")).unwrap();
    fs::rename(dir.path().join("new"), &link).unwrap();
    server.upgrade();
    server.wait_serving();
    assert_eq!(exe(server.pid()), inode(&dir.path().join("2/server")));

    install("whoami", dir.path().join("replacement"));
    fs::rename(dir.path().join("replacement"), dir.path().join("2/server")).unwrap();
    server.upgrade();
    server.wait_serving();
    assert_eq!(exe(server.pid()), inode(&dir.path().join("2/server")));
}

#[test]
fn a_relative_program_is_found_after_a_chdir_and_arguments_need_not_be_utf8() {
    let dir = tempdir();
    install("whoami", dir.path().join("server"));
    let pid_file = OsString::from_vec(b"pid-\xff\xfe".to_vec());
    let mut command = Command::new("./server");
    command.args(LISTEN).args(["--probation", "20", "--chdir", "/"]).arg("--pid-file").arg(dir.path().join(&pid_file));
    command.current_dir(dir.path()).env_remove("PWD").env("ODD", OsString::from_vec(b"\xff".to_vec()));
    let mut server = Server::serving(command);
    server.upgrade();
    server.wait_serving();
    let pid = server.pid();
    assert_eq!(fs::read(dir.path().join(&pid_file)).unwrap(), format!("{pid}\n").as_bytes());
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.split(|b| *b == 0).any(|variable| variable == b"ODD=\xff"));
    // It started in the directory of the first generation, and then changed to the same directory.
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
}

#[test]
fn a_wrapper_script_does_no_harm_and_a_stale_variable_means_nothing() {
    let dir = tempdir();
    let wrapper = dir.path().join("wrapper");
    script(&wrapper, &format!("true\nexec {} \"$@\"", whoami_in_shell()));
    let mut command = Command::new(example("whoami"));
    command.args(LISTEN).args(["--probation", "20", "--exec"]).arg(&wrapper);
    // As in a process that a server started long ago: the variable is set, and its numbers are pipes of other code.
    command.env("ECDYSIS_HANDOVER", "v1:manifest=100@1,status=101@2");
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    // SAFETY: only calls that are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            for (end, number) in [(reader.as_raw_fd(), 100), (writer.as_raw_fd(), 101)] {
                if libc::dup2(end, number) != number {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut server = Server::serving(command);
    let addr = server.addr();
    assert_eq!(generation(&addr), 1);
    assert!(fds(server.pid()).contains_key(&100), "it has the descriptors that the variable named");
    server.upgrade();
    assert_eq!(generation(&addr), 2);
}

/// A process with more privileges than its caller does not adopt descriptors that the caller chooses.
#[test]
#[cfg_attr(ecdysis_unix, ignore = "file capabilities")]
fn a_program_with_more_privileges_than_its_caller_gets_no_handover() {
    let dir = tempdir();
    // A group other than the current one: root may choose any, other users one of their groups.
    let ours = rustix::process::getegid();
    let groups = rustix::process::getgroups().unwrap();
    let other = groups.iter().find(|group| **group != ours).map(|group| group.as_raw());
    let other = if rustix::process::geteuid().is_root() { Some(65534) } else { other };
    let set_group_id = |program: &Path, to: &str| {
        let path = dir.path().join(to);
        assert!(Command::new("cp").arg(program).arg(&path).status().unwrap().success());
        std::os::unix::fs::chown(&path, None, other).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).unwrap();
        path
    };
    let took = other.is_some() && {
        let id = Command::new(set_group_id(Path::new("/usr/bin/id"), "id")).arg("-g").output().unwrap();
        other.map(|group| format!("{group}\n").into_bytes()) == Some(id.stdout)
    };
    if !took {
        eprintln!("not run: the set-group-id bit has no effect here (no-new-privs, nosuid, or no second group)");
        return;
    }
    let program = set_group_id(&example("whoami"), "whoami");
    let mut server =
        Server::whoami(LISTEN.iter().copied().chain(["--ready-timeout", "2000", "--exec", program.to_str().unwrap()]));
    server.wait("serving gen=1 ");
    server.signal(Signal::HUP);
    // It cannot trust its environment, and must not become a first generation on another port.
    let line = server.wait("upgrade ");
    assert!(line.contains("AT_SECURE") && line.contains("ambient capabilities"), "{line}");
    assert_eq!(generation(&server.addr()), 1);

    // If the parent cannot know this in advance, the child detects it, because the handover is meant for it.
    let (manifest, status) = rustix::pipe::pipe().unwrap();
    let named = |fd: &std::os::fd::OwnedFd| format!("{}@{}", fd.as_raw_fd(), rustix::fs::fstat(fd).unwrap().st_ino);
    let handover = format!("v1:manifest={},status={}", named(&manifest), named(&status));
    let output = output(Command::new(&program).args(LISTEN).env("ECDYSIS_HANDOVER", handover));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("AT_SECURE") && !said.contains("serving"), "{said}");
    assert!(!output.status.success());
}

/// With SIGCHLD ignored the child cannot be reaped, and waiting for it returns ECHILD.
#[test]
fn an_ignored_sigchld_is_not_a_crash() {
    for way in ["--probation=20", "--fork"] {
        let dir = tempdir();
        let how = dir.path().join("how");
        let mut command = Command::new(example("whoami"));
        command.args(LISTEN).args([way, "--probation", "20", "--misbehave"]).arg(&how);
        // Not set by a shell, because some shells restore the default SIGCHLD before exec. SAFETY: only a call that is
        // async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGCHLD, libc::SIG_IGN);
                Ok(())
            });
        }
        let mut server = Server::serving(command);
        let ignored = u64::from_str_radix(&status_field(server.pid(), "SigIgn"), 16).unwrap();
        assert_ne!(ignored & (1 << (libc::SIGCHLD - 1)), 0);
        fs::write(&how, "exit=3").unwrap();
        assert!(server.fail_to_upgrade().contains("ended before it was ready"));
        fs::write(&how, "").unwrap();
        server.upgrade();
    }
}

#[test]
fn a_stop_during_an_upgrade_stops_the_service() {
    let dir = tempdir();
    let (mut server, misbehave) = misbehaving(&dir, &[]);
    let addr = server.addr();
    misbehave("hang");
    server.signal(Signal::HUP);
    eventually("there is a child", || !children(server.first_pid()).is_empty());
    server.signal(Signal::TERM);
    let line = server.wait("upgrade failed");
    assert!(line.contains("stop was requested"), "{line}");
    server.wait_all_ended();
    assert_eq!(connect(&addr).map(drop).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_stop_under_load_ends_accepting_soon() {
    let server = Server::whoami(LISTEN.iter().chain(&["--drain", "600"]));
    stops_soon_under_load(server);
}

#[test]
fn a_burst_of_signals_upgrades_and_harms_nothing() {
    let mut server = Server::whoami(LISTEN.iter().chain(&["--probation", "100"]));
    let (addr, first) = (server.addr(), server.pid());
    let load = Load::on(&addr, 2);
    for _ in 0..100 {
        send_signal(first, Signal::HUP);
    }
    server.wait("upgrade ok");
    server.wait("ended gen=1");
    load.stop().assert_none_failed();
    assert!(generation(&addr) >= 2);
}

/// With another library, a second of SIGHUPs to every generation left 202 generations running.
#[test]
fn signals_to_every_generation_leave_one() {
    let server = Server::whoami(LISTEN.iter().chain(&["--probation", "50"]));
    let addr = server.addr();
    let load = Load::on(&addr, 1);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        server.signal_all(Signal::HUP);
        std::thread::yield_now();
    }
    load.stop().assert_none_failed();
    // A last signal may still lead to one more upgrade.
    eventually("one process is left, and serves", || {
        let left = server.processes();
        left.len() == 1 && field::<u32>(&ask(&addr).unwrap(), "pid") == left[0]
    });
}

#[test]
fn a_late_signal_does_not_end_the_drain() {
    let mut server = Server::whoami(LISTEN.iter().chain(&["--hold", "--probation", "20"]));
    let (addr, old) = (server.addr(), server.pid());
    let answer = format!("gen=1 pid={old}\n");
    let [mut begun, mut idle] = [(); 2].map(|()| {
        let mut held = connect(&addr).unwrap();
        held.write_all(b"who\n").unwrap();
        held.read_exact(&mut vec![0; answer.len()]).unwrap();
        held
    });
    begun.write_all(b"w").unwrap();
    server.upgrade();
    // The old process closes it when accepting is over.
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    send_signal(old, Signal::HUP);
    begun.write_all(b"ho\n").unwrap();
    let mut rest = String::new();
    begun.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, answer);
}

/// With the libraries compared in the guide, `ready` then fails with EPIPE, and the service is gone.
#[test]
fn when_the_parent_is_killed_the_child_serves() {
    let dir = tempdir();
    let (mut server, misbehave) = misbehaving(&dir, &[]);
    let addr = server.addr();
    misbehave("stop-self");
    server.signal(Signal::HUP);
    let child = field(&server.wait(" gen=2 "), "pid");
    frozen(child);
    send_signal(server.first_pid(), Signal::KILL);
    wait_exit(server.first_pid());
    send_signal(child, Signal::CONT);
    // Until then its connections wait in the queue.
    assert_eq!(generation(&addr), 2);
    server.wait("serving gen=2");
}

#[test]
fn when_the_parent_is_stopped_the_child_serves_and_the_parent_then_accepts_that() {
    let dir = tempdir();
    let (mut server, misbehave) = misbehaving(&dir, &["--probation", "50", "--ready-timeout", "4000"]);
    let addr = server.addr();
    misbehave("stop-self");
    server.signal(Signal::HUP);
    let child = field(&server.wait(" gen=2 "), "pid");
    frozen(child);
    freeze(server.first_pid());
    send_signal(child, Signal::CONT);
    assert_eq!(generation(&addr), 2);
    // The deadline has passed, but the child's message still counts.
    send_signal(server.first_pid(), Signal::CONT);
    server.wait("upgrade ok");
    server.wait("ended gen=1");
    assert_eq!(generation(&addr), 2);
}

#[test]
fn the_pid_file_names_who_serves() {
    let dir = tempdir();
    let path = dir.path().join("pid");
    let (mut server, misbehave) = misbehaving(&dir, &["--pid-file", path.to_str().unwrap(), "--probation", "20"]);
    let named = || fs::read_to_string(&path).unwrap().trim().parse::<u32>().unwrap();
    assert_eq!(named(), server.pid());
    misbehave("exit=1");
    server.fail_to_upgrade();
    assert_eq!(named(), server.pid());
    misbehave("");
    server.upgrade();
    server.wait_serving();
    assert_eq!(named(), server.pid());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert!(!path.exists());
}

/// The child reports that the file cannot be written. The parent keeps serving.
#[test]
fn a_pid_file_that_cannot_be_written_fails_the_upgrade() {
    let dir = tempdir();
    let sub = dir.path().join("sub");
    fs::create_dir(&sub).unwrap();
    let path = sub.join("pid");
    let mut server = Server::whoami(LISTEN.iter().copied().chain(["--pid-file", path.to_str().unwrap()]));
    fs::remove_dir_all(&sub).unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("refused: cannot write PID file"), "{line}");
    fs::create_dir(&sub).unwrap();
    server.upgrade();
}

#[test]
fn control_sockets_answer_with_the_outcome() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (up, stop, ctl) = (path("up"), path("stop"), path("ctl"));
    let args = ["--upgrade-socket", &up, "--stop-socket", &stop, "--control-socket", &ctl, "--probation", "20"];
    let (server, misbehave) = misbehaving(&dir, &args);
    for socket in [&up, &stop, &ctl] {
        assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let line = control(Path::new(&up), "").unwrap();
    assert!(line.starts_with("upgraded pid="), "{line}");
    assert_eq!((field::<u64>(&line, "generation"), field::<f64>(&line, "ms") > 0.0), (2, true));
    server.wait_serving();

    misbehave("refuse=not today");
    let line = control(Path::new(&up), "").unwrap();
    assert!(line.starts_with("failed: ") && line.contains("not today"), "{line}");

    let line = control(Path::new(&ctl), "status\n").unwrap();
    assert_eq!(field::<u64>(&line, "generation"), 2);
    assert!(line.contains("phase=serving") && line.contains("socket=tcp%20127."), "{line}");
    assert!(control(Path::new(&ctl), "dance\n").unwrap().starts_with("failed: unknown command"));

    misbehave("hang");
    let mut first = unix(Path::new(&up)).unwrap();
    eventually("there is a child", || !children(server.pid()).is_empty());
    assert_eq!(control(Path::new(&up), "").unwrap(), "busy\n");
    assert_eq!(control(Path::new(&ctl), "upgrade\n").unwrap(), "busy\n");
    assert!(control(Path::new(&ctl), "status\n").unwrap().contains("phase=upgrading"));
    assert_eq!(control(Path::new(&stop), "").unwrap(), "stopping\n");
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "stopping\n");
    server.wait_all_ended();
    for socket in [up, stop, ctl] {
        assert!(!Path::new(&socket).exists(), "{socket}");
    }
}

/// Between bind and a later chmod, any user could connect.
#[test]
fn a_control_socket_is_private_from_the_first_moment() {
    if !has_strace() {
        return;
    }
    let dir = tempdir();
    let stop = dir.path().join("stop");
    let mut command = Command::new("sh");
    let calls = "?chmod,fchmod,fchmodat";
    let script = format!(
        "umask 0; exec strace -f -o /dev/null -e trace={calls} -e inject={calls}:delay_enter=300000 \"$0\" \"$@\""
    );
    command.args(["-c", &script]).arg(example("whoami")).args(LISTEN).arg("--stop-socket").arg(&stop);
    let mut server = Server::start(command);
    let mut mode = None;
    eventually("it is there", || {
        mode = fs::metadata(&stop).ok().map(|file| file.permissions().mode() & 0o777);
        mode.is_some()
    });
    assert_eq!(mode, Some(0o600));
    server.wait("serving ");
}

#[test]
fn a_foreign_user_triggers_nothing() {
    if !is_root() {
        return;
    }
    let dir = tempdir();
    let stop = dir.path().join("stop");
    let server = Server::whoami(LISTEN.iter().copied().chain(["--stop-socket", stop.to_str().unwrap()]));
    // As if an administrator had opened it to all users.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(&stop, fs::Permissions::from_mode(0o777)).unwrap();
    // In the kernel each thread has its own user; only libc's function changes all threads.
    let somebody_else = std::thread::spawn(move || {
        // SAFETY: plain numbers (setresuid(2)).
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        control(&stop, "").unwrap()
    });
    assert_eq!(somebody_else.join().unwrap(), "");
    assert_eq!(generation(&server.addr()), 1);
}

/// The server hangs, and its queue is full.
#[test]
fn signals_do_not_prolong_a_control_request() {
    if !is_alone("process::signals_do_not_prolong_a_control_request") {
        return;
    }
    let dir = tempdir();
    let path = dir.path().join("control");
    let server = std::os::unix::net::UnixListener::bind(&path).unwrap();
    rustix::net::listen(&server, 0).unwrap();
    let request = || ecdysis::control::request(&path, "status", Duration::from_millis(300)).unwrap_err();
    // The first connection is queued, and there is no room for a second one.
    let queued = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let error = interrupted(request);
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    drop((queued, server));
}

/// Peers of the control socket that send nothing, or too much, block no other peer.
#[test]
fn a_peer_that_says_nothing_blocks_nobody() {
    let dir = tempdir();
    let ctl = dir.path().join("ctl");
    let mut server =
        Server::whoami(LISTEN.iter().copied().chain(["--probation", "20", "--control-socket", ctl.to_str().unwrap()]));
    let _mute: Vec<_> = (0..10).map(|_| unix(&ctl).unwrap()).collect();
    let mut chatty = unix(&ctl).unwrap();
    chatty.write_all(&[b'x'; 4000]).unwrap();
    let mut answer = String::new();
    let _ = chatty.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.starts_with("failed: "), "{answer}");
    assert!(control(&ctl, "upgrade\n").unwrap().starts_with("upgraded "));
    server.wait("ended gen=1");
}

#[test]
fn exclusive_state_waits_for_the_end_of_the_parent() {
    let mut server = Server::whoami(LISTEN.iter().copied().chain(["--hold", "--probation", "20", "--wait-for-parent"]));
    let addr = server.addr();
    let mut held = connect(&addr).unwrap();
    held.write_all(b"who\n").unwrap();
    held.read_exact(&mut [0; 6]).unwrap();
    // The drain waits for a connection with a partial line. An idle connection would end at the shutdown, and the
    // parent with it.
    held.write_all(b"w").unwrap();
    server.upgrade();
    assert!(!server.said().iter().any(|line| line.starts_with("parent ended")), "it drains");
    drop(held);
    server.wait("parent ended gen=2");
}
