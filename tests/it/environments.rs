//! Upgrades in unusual environments: each works, or fails with an error that names the cause.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::*;

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
    server.wait_serving();
    server.upgrade();
    load.stop().assert_none_failed();
}

/// A new descriptor has a low number for an instant, until the library has moved it.
fn keeps_above(last: i32, pid: u32) {
    eventually(&format!("no descriptor up to {last}"), || fds(pid).keys().all(|fd| *fd > last));
}

/// At the start of a program, std opens /dev/null for each closed standard stream. If the program closes them itself,
/// or has no std `main`, their numbers are the lowest free ones.
#[test]
fn no_descriptor_is_a_standard_stream() {
    for way in WAYS {
        let mut server = Server::whoami([&ARGS, way, &["--close", "0"]].concat());
        for _ in 0..2 {
            keeps_above(0, server.pid());
            server.upgrade();
        }
    }
}

/// With all three closed, the server cannot print anything, so the clients ask.
#[test]
fn a_takeover_needs_no_standard_streams() {
    let dir = tempdir();
    let [socket, takeover] = ["socket", "takeover"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let addr = format!("unix:{socket}");
    let start = || {
        let mut command = Command::new(example("whoami"));
        command.args(["--close", "0", "--close", "1", "--close", "2", "--listen", &addr, "--probation", "20"]);
        command.args(["--take-over", &takeover, "--takeover-socket", &takeover]);
        Server::start(command)
    };
    let serves = |generation: u64| -> u32 {
        let answers = || ask(&addr).is_ok_and(|answer| try_field(&answer, "gen") == Some(generation));
        eventually("the next generation answers", answers);
        let pid = field(&ask(&addr).unwrap(), "pid");
        keeps_above(2, pid);
        pid
    };
    let _first = start();
    send_signal(serves(1), Signal::HUP);
    serves(2);
    let _second = start();
    let third = serves(3);
    // It upgrades after its own verdict.
    send_signal(third, Signal::HUP);
    serves(4);
}

/// Otherwise what it prints, for example the line of an event, would become part of the handover.
#[test]
fn a_server_that_closed_its_stderr_hands_over_and_keeps_that_number_free() {
    let dir = tempdir();
    let [socket, takeover] = ["socket", "takeover"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let addr = format!("unix:{socket}");
    let mut command = Command::new(example("whoami"));
    command.args(["--close", "2", "--log", "--listen", &addr, "--probation", "3600000"]);
    command.args(["--takeover-socket", &takeover]);
    let _first = Server::start(command);
    let generation = || ask(&addr).ok().and_then(|answer| try_field::<u64>(&answer, "gen"));
    eventually("the first process answers", || generation() == Some(1));
    let first = field(&ask(&addr).unwrap(), "pid");
    let mut command = Command::new(example("whoami"));
    command.args(["--listen", &addr, "--take-over", &takeover]);
    let mut second = Server::start(command);
    second.wait("serving gen=2");
    eventually("the number is free", || !fds(first).contains_key(&2));
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
        const CAP_SYS_NICE: u32 = 23;
        if !has_capability(CAP_SYS_NICE) {
            return; // It may not lower a nice value.
        }
        server.upgrade();
        assert_eq!((allowed(server.pid()), nice(server.pid())), (cpus, niceness), "{way}");
    }
}

#[cfg(not(ecdysis_unix))]
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
            // No event shows that the child has met the open file and retries.
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

/// Without a guard, the first write beyond the limit ends the process by SIGXFSZ. It counts for memory files too.
#[test]
fn a_limit_on_the_size_of_files_ends_no_server() {
    let dir = tempdir();
    let pid_file = dir.path().join("pid");
    for way in WAYS {
        let mut server = Server::whoami([&ARGS, way].concat());
        limit_files(&server);
        upgrades(&mut server);
    }
    let mut server = Server::whoami(ARGS.iter().copied().chain(["--pid-file", pid_file.to_str().unwrap()]));
    limit_files(&server);
    let line = server.fail_to_upgrade();
    assert!(line.contains("PID file") && line.contains("File too large"), "{line}");
    assert_eq!(fs::read_to_string(&pid_file).unwrap().trim(), server.pid().to_string());
    assert_eq!(generation(&server.addr()), 1);
}

/// The limit does not apply to root, so the server runs as another user.
#[test]
fn a_limit_on_processes_is_named() {
    if !is_root() {
        return;
    }
    // A user that no other test run has at the same time.
    let user = 20_000 + process::id() % 40_000;
    for way in ["", "--fork"] {
        let dir = tempdir();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        let program = dir.path().join("whoami");
        install("whoami", &program);
        let server = |limit: libc::rlim_t| {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            let mut command = Command::new(&program);
            command.args(ARGS).args((!way.is_empty()).then_some(way)).uid(user).gid(user);
            // SAFETY: a system call only.
            unsafe { command.pre_exec(move || ok(libc::setrlimit(libc::RLIMIT_NPROC, &limit))) };
            Server::serving(command)
        };
        let unlimited = server(100);
        let has = threads(unlimited.pid()).len();
        drop(unlimited);
        let line = server(has as libc::rlim_t).fail_to_upgrade();
        assert!(line.contains("RLIMIT_NPROC"), "{way}: {line}");
    }
}

/// A cgroup with one controller. Dropping it removes it, after the server in it.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Of version 2, or of version 1, where each controller has its own tree.
    fn new(controller: &str, limits: &[&'static str]) -> Option<(Self, &'static str)> {
        let root = Path::new("/sys/fs/cgroup");
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
        for tree in [root.to_owned(), root.join(controller)] {
            let cgroup = Self(tree.join(format!("ecdysis-test-{}-{controller}", process::id())));
            let made = fs::create_dir(&cgroup.0).is_ok();
            if let Some(limit) = limits.iter().find(|limit| made && cgroup.0.join(limit).exists()) {
                return Some((cgroup, limit));
            }
        }
        eprintln!("not run: needs root and the cgroup controller {controller}");
        None
    }

    fn set(&self, name: &str, value: impl ToString) {
        fs::write(self.0.join(name), value.to_string()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = try_eventually("the cgroup is empty", || fs::remove_dir(&self.0).is_ok() || !self.0.exists());
    }
}

#[test]
fn a_limit_on_processes_of_the_cgroup_is_named() {
    let Some((cgroup, _)) = Cgroup::new("pids", &["pids.max"]) else { return };
    for way in WAYS {
        let mut server = Server::whoami([&ARGS, way].concat());
        cgroup.set("cgroup.procs", server.pid());
        cgroup.set("pids.max", 1);
        let line = server.fail_to_upgrade();
        assert!(line.contains("pids.max"), "{way:?}: {line}");
        // Check this before it answers, because its threads count as well.
        cgroup.set("pids.max", "max");
        assert_eq!(generation(&server.addr()), 1);
        upgrades(&mut server);
    }
}

/// It runs in a separate cgroup, because in a common one the kernel could also kill the old version, or both.
#[test]
fn a_new_version_for_which_there_is_no_memory_does_no_harm() {
    let Some((cgroup, limit)) = Cgroup::new("memory", &["memory.max", "memory.limit_in_bytes"]) else { return };
    cgroup.set(limit, 64 << 20);
    // One of these files exists, if the machine swaps.
    let _ = fs::write(cgroup.0.join("memory.swap.max"), "0");
    let _ = fs::write(cgroup.0.join("memory.memsw.limit_in_bytes"), (64 << 20).to_string());
    for way in WAYS {
        let dir = tempdir();
        let [misbehave, wrapper] = ["misbehave", "wrapper"].map(|name| dir.path().join(name));
        let moved = format!("echo $$ >{}/cgroup.procs", cgroup.0.display());
        script(&wrapper, &format!("{moved}\nexec {} \"$@\"", whoami_in_shell()));
        let more = ["--exec", wrapper.to_str().unwrap(), "--misbehave", misbehave.to_str().unwrap()];
        let mut server = Server::whoami([&ARGS, way, &more].concat());
        let load = Load::on(&server.addr(), 1);
        fs::write(&misbehave, "memory=200").unwrap();
        let line = server.fail_to_upgrade();
        assert!(line.contains("memory.max"), "{way:?}: {line}");
        fs::write(&misbehave, "").unwrap();
        server.upgrade();
        load.stop().assert_none_failed();
    }
}

/// A fork must reserve as much memory as the parent has, whereas the clone reserves nothing. The setting applies to the
/// whole machine, so this runs only where it is already set, as in `tests/platforms/aarch64`.
#[test]
fn strict_overcommit_is_named() {
    let field = |name: &str| {
        let memory = fs::read_to_string("/proc/meminfo").unwrap();
        let line = memory.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    };
    if fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap().trim() != "2" {
        eprintln!("not run: vm.overcommit_memory is not 2");
        return;
    }
    const HEAP: usize = 150;
    let heap = HEAP.to_string();
    let [mut cloning, mut forking] =
        [&[][..], &["--fork"]].map(|way| Server::whoami([&ARGS, way, &["--heap", &heap]].concat()));
    let rest = field("CommitLimit:").saturating_sub(field("Committed_AS:") + (HEAP << 19));
    let reserved = Vec::<u8>::with_capacity(rest);
    let line = forking.fail_to_upgrade();
    assert!(line.contains("overcommit"), "{line}");
    assert_eq!(generation(&forking.addr()), 1);
    cloning.upgrade();
    drop(reserved);
    forking.upgrade();
}

/// A program that traces the server receives each signal and each new process first.
#[test]
fn a_traced_server_is_upgraded() {
    let tracers: [&[&str]; 3] = [
        &["strace", "-o", "/dev/null", "-p"],
        &["strace", "-f", "-o", "/dev/null", "-p"],
        &["gdb", "--batch", "-ex", "handle SIGHUP nostop noprint pass", "-ex", "continue", "-p"],
    ];
    for tracer in tracers {
        if Command::new(tracer[0]).arg("--version").stdout(Stdio::null()).status().is_err() || !has_strace() {
            eprintln!("not run: needs {}", tracer[0]);
            continue;
        }
        for way in [&[][..], &["--fork"]] {
            let mut server = Server::whoami([&ARGS, way].concat());
            let pid = server.pid();
            let mut command = Command::new(tracer[0]);
            command.args(&tracer[1..]).arg(pid.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
            let mut tracer = guard::mark(&mut command, 0).stderr(Stdio::null()).spawn().unwrap();
            eventually("it is traced", || status_field(pid, "TracerPid") != "0");
            upgrades(&mut server);
            drop(server);
            let _ = tracer.kill();
            tracer.wait().unwrap();
        }
    }
}

/// Valgrind supports only the C library's clone calls, so a server under it must choose fork.
#[test]
fn a_server_under_valgrind_is_upgraded() {
    let valgrind = || {
        let mut command = Command::new("valgrind");
        command.args(["-q", "--error-exitcode=9"]);
        // Valgrind does not replace the allocator of a static program, and takes musl's headers for uninitialized memory.
        if cfg!(target_env = "musl") {
            command.arg("--undef-value-errors=no");
        }
        command.arg(example("whoami"));
        command
    };
    if !valgrind().arg("--help").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        eprintln!("not run: needs a valgrind that works for this processor");
        return;
    }
    let mut command = valgrind();
    command.args(ARGS).arg("--fork");
    let mut server = Server::serving(command);
    upgrades(&mut server);
    server.signal(Signal::TERM);
    server.wait_all_ended();
    assert_eq!(server.exit_code(), Some(0), "a memory error");
}

/// mlockall applies only to the calling process, and is not inherited.
#[test]
fn a_server_that_locks_its_memory_is_upgraded() {
    let most = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    const CAP_IPC_LOCK: u32 = 14;
    if !has_capability(CAP_IPC_LOCK) && most.is_some_and(|most| most < 256 << 20) {
        eprintln!("not run: this user may not lock the memory of a server with threads");
        return;
    }
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
    if !is_root() || !can_unshare(&["--mount"]) {
        return;
    }
    let root = tempdir();
    for dir in ["bin", "usr", "lib", "lib32", "lib64", "proc", "dev", "tmp"] {
        fs::create_dir(root.path().join(dir)).unwrap();
    }
    install("whoami", root.path().join("bin/whoami"));
    let script =
        "for dir in usr lib lib32 lib64 dev; do [ ! -d /$dir ] || mount --rbind /$dir \"$0/$dir\" || exit; done; \
                  exec chroot \"$0\" /bin/whoami \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(root.path()).args(ARGS).env("TMPDIR", "/tmp");
    upgrades(&mut Server::serving(command));
}
