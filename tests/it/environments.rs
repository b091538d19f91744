//! Upgrades in unusual environments: each works, or fails with an error that names the cause.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::{example, fds, install, status_field, tempdir, Load, Server};

const ARGS: [&str; 4] = ["--listen", "127.0.0.1:0", "--probation", "20"];
const WAYS: [&[&str]; 4] = [&[], &["--fork"], &["--transport", "socket"], &["--fork", "--transport", "socket"]];

/// Starts a server. `prepare` runs in its process before execve.
fn prepared(args: &[&str], prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Server {
    Server::whoami_with([&ARGS, args].concat(), |command| {
        // SAFETY: each caller makes system calls only.
        unsafe { command.pre_exec(prepare) };
    })
}

fn ok(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Upgrades twice under load.
fn upgrades(server: &mut Server) {
    let load = Load::on(&server.addr(), 1);
    server.upgrade();
    server.upgrade();
    load.stop().assert_none_failed();
}

/// At the start of a program, std opens /dev/null for each closed standard stream. If the program closes them itself,
/// or has no std `main`, their numbers are the lowest free ones.
#[test]
fn no_descriptor_is_a_standard_stream() {
    for way in WAYS {
        let mut server = Server::whoami([&ARGS, way, &["--close-stdin"]].concat());
        for _ in 0..2 {
            let open = fds(server.pid());
            assert!(!open.contains_key(&0), "{way:?}: {:?}", open.get(&0));
            server.upgrade();
        }
    }
}

#[cfg(not(ecdysis_unix))]
#[test]
fn the_next_version_has_the_cpus_and_the_nice_value_of_the_first() {
    let allowed = |pid| status_field(pid, "Cpus_allowed");
    let nice = |pid| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().split(' ').nth(18).unwrap().to_owned();
    for way in ["", "--fork"] {
        let args: &[&str] = if way.is_empty() { &[] } else { &["--fork"] };
        let mut server = prepared(args, || ok(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 3) }));
        let first = server.pid();
        let (cpus, niceness) = (allowed(first), nice(first));
        // Another process pins and renices all threads of the server.
        for thread in fs::read_dir(format!("/proc/{first}/task")).unwrap() {
            let thread: i32 = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
            // SAFETY: the call only reads a local set and plain numbers.
            unsafe {
                let mut one: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET((0..1024).find(|&cpu| is_allowed(cpu)).unwrap(), &mut one);
                ok(libc::sched_setaffinity(thread, size_of_val(&one), &one)).unwrap();
                ok(libc::setpriority(libc::PRIO_PROCESS, thread as u32, 7)).unwrap();
            }
        }
        if !rustix::process::geteuid().is_root() {
            return; // Only root may lower a nice value.
        }
        server.upgrade();
        assert_eq!((allowed(server.pid()), nice(server.pid())), (cpus, niceness), "{way}");
    }
}

fn is_allowed(cpu: usize) -> bool {
    // SAFETY: the call only writes to a local set.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of_val(&all), &mut all) == 0 && libc::CPU_ISSET(cpu, &all)
    }
}

/// The program may have set them for the service, so they are kept, as execve keeps them.
#[test]
fn resource_limits_and_umask_are_inherited() {
    for way in WAYS {
        let mut server = prepared(way, || {
            let limit = libc::rlimit { rlim_cur: 500, rlim_max: 600 };
            // SAFETY: the call only reads a local limit and a plain number.
            unsafe {
                libc::umask(0o027);
                ok(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))
            }
        });
        server.upgrade();
        let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
        let files: Vec<&str> =
            limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split(' ').collect();
        assert!(files.contains(&"500") && files.contains(&"600"), "{files:?}");
        assert_eq!(status_field(server.pid(), "Umask"), "0027");
    }
}

#[test]
fn a_start_directory_that_cannot_be_entered_is_no_obstacle() {
    for way in [&[][..], &["--fork"]] {
        let dir = tempdir();
        let start = dir.path().join("start");
        fs::create_dir(&start).unwrap();
        let mut command = Command::new(example("whoami"));
        command.args(ARGS).args(way).current_dir(&start).env("PWD", &start);
        let mut server = Server::serving(command);
        // ENOENT, then ENOTDIR.
        fs::remove_dir(&start).unwrap();
        server.upgrade();
        fs::write(&start, "").unwrap();
        server.upgrade();
    }
}

#[test]
fn a_program_file_that_is_written_for_a_moment_is_waited_for() {
    for way in [&[][..], &["--fork"]] {
        let dir = tempdir();
        let next = dir.path().join("next");
        install("whoami", &next);
        let exec = ["--exec", next.to_str().unwrap()];
        let mut server = Server::whoami([&ARGS, way, &exec].concat());
        let writer = OpenOptions::new().write(true).open(&next).unwrap();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(writer);
        });
        server.upgrade();
        writer.join().unwrap();

        let next = dir.path().join("longer");
        install("whoami", &next);
        let exec = ["--exec", next.to_str().unwrap()];
        let mut server = Server::whoami([&ARGS, way, &exec].concat());
        let writer = OpenOptions::new().write(true).open(&next).unwrap();
        let line = server.fail_to_upgrade();
        assert!(line.contains("open for writing"), "{line}");
        drop(writer);
        server.upgrade();
    }
}

#[test]
fn an_environment_that_is_too_large_is_named() {
    let dir = tempdir();
    let mut command = Command::new(example("whoami"));
    command.args(ARGS);
    // The kernel allows a quarter of the stack limit, and this limit is lowered after the start.
    for n in 0..10 {
        command.env(format!("LARGE_{n}"), "x".repeat(100_000));
    }
    let mut server = Server::serving(command);
    upgrades(&mut server);
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is read, nothing is written.
    ok(unsafe { libc::prlimit(server.pid() as i32, libc::RLIMIT_STACK, &limit, std::ptr::null_mut()) }).unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("arguments and environment"), "{line}");
    drop(dir);
}

/// The limit does not apply to root, so the server runs as another user.
#[test]
fn a_limit_on_processes_is_named() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: it needs root, to become a user without processes");
        return;
    }
    for way in ["", "--fork"] {
        let dir = tempdir();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        let program = dir.path().join("whoami");
        install("whoami", &program);
        let mut command = Command::new(&program);
        command.args(ARGS).args((!way.is_empty()).then_some(way)).uid(60_017).gid(60_017);
        // Exactly the number of its threads.
        let limit = libc::rlimit { rlim_cur: 2, rlim_max: 2 };
        // SAFETY: a system call only.
        unsafe { command.pre_exec(move || ok(libc::setrlimit(libc::RLIMIT_NPROC, &limit))) };
        let line = Server::serving(command).fail_to_upgrade();
        assert!(line.contains("RLIMIT_NPROC"), "{way}: {line}");
    }
}

/// mlockall applies only to the calling process, and is not inherited.
#[test]
fn a_server_that_locks_its_memory_is_upgraded() {
    for way in [&["--mlockall"][..], &["--mlockall", "--fork"]] {
        upgrades(&mut Server::whoami([&ARGS, way].concat()));
    }
}

/// A child does not inherit PR_SET_PDEATHSIG, the signal that the first generation gets when its parent dies
/// (prctl(2)).
#[test]
fn a_signal_at_the_death_of_the_parent_does_not_end_the_next_version() {
    for way in WAYS {
        let mut server = prepared(way, || {
            // SAFETY: plain numbers.
            ok(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, Signal::KILL.as_raw()) })
        });
        upgrades(&mut server);
    }
}

/// Without /proc the sweep uses a fallback, and the program is found by its `argv[0]`.
#[test]
fn a_server_without_proc_is_upgraded() {
    for hide in ["mount -t tmpfs none /proc", "mount -t proc -o hidepid=2 proc /proc"] {
        let can = Command::new("unshare").args(["--mount", "sh", "-c", hide]).status().is_ok_and(|s| s.success());
        if !can {
            eprintln!("not run: this machine does not allow {hide}");
            continue;
        }
        for way in WAYS {
            let mut command = Command::new("unshare");
            let script = format!("{hide}; exec \"$0\" \"$@\"");
            command.args(["--mount", "sh", "-c", &script]).arg(example("whoami")).args(ARGS).args(way);
            upgrades(&mut Server::serving(command));
        }
    }
}

#[test]
fn a_server_in_a_changed_root_is_upgraded() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: chroot needs root");
        return;
    }
    let root = tempdir();
    for dir in ["bin", "usr", "lib", "lib64", "proc", "dev", "tmp"] {
        fs::create_dir(root.path().join(dir)).unwrap();
    }
    install("whoami", root.path().join("bin/whoami"));
    let script = "for dir in usr lib lib64 dev; do [ ! -d /$dir ] || mount --rbind /$dir $0/$dir || exit; done; \
                  root=$0; exec chroot $root /bin/whoami \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(root.path()).args(ARGS).env("TMPDIR", "/tmp");
    upgrades(&mut Server::serving(command));
}
