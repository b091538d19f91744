//! Upgrades under a seccomp profile that is exactly the guide's table, and under filters that refuse the optional
//! calls.

pub mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use seccompiler::{apply_filter, BpfProgram, SeccompAction, SeccompCmpOp};
use table::{allow_list, argument, filter, markdown, Rules, When, TABLE};

use crate::faults::trace::{self, Role};
use crate::support::*;

const ARGS: [&str; 12] = [
    "--listen",
    "127.0.0.1:0",
    "--listen",
    "unix:DIR/sock",
    "--listen",
    "udp:127.0.0.1:0",
    "--pid-file",
    "DIR/pid",
    "--probation",
    "20",
    "--misbehave",
    "DIR/misbehave",
];

fn refusing(rules: Rules, errno: i32) -> Vec<BpfProgram> {
    vec![filter(rules, SeccompAction::Errno(errno as u32), SeccompAction::Allow)]
}

/// The columns that a successful upgrade needs.
const UPGRADE: [When; 5] = [When::Serving, When::Parent, When::Before, When::Child, When::Program];

/// A descriptor that the first generation inherits without close-on-exec. No later generation may have it.
const STRAY: i32 = 77;

fn start(args: &[&str], filters: Vec<BpfProgram>) -> Server {
    Server::whoami_with([&ARGS, args].concat(), |command: &mut Command| {
        // SAFETY: only system calls, on memory that was allocated before the fork.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(0, STRAY) != STRAY {
                    return Err(io::Error::last_os_error());
                }
                filters.iter().try_for_each(|filter| apply_filter(filter)).map_err(|_| io::ErrorKind::Other.into())
            });
        }
    })
}

/// Upgrades several times under load. Checks that nothing fails and that the stray descriptor is not inherited.
fn upgrades(server: &Server, times: usize) -> Result<(), String> {
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(1));
    assert!(fds(server.first_pid()).contains_key(&STRAY));
    let mut pid = server.first_pid();
    for _ in 0..times {
        let verdict = server.try_upgrade(pid)?;
        if !verdict.starts_with("upgrade ok") {
            return Err(verdict);
        }
        let old = std::mem::replace(&mut pid, try_field(&verdict, "pid").ok_or("no pid")?);
        try_eventually("the old process ends", || gone(old))?;
        let open = fds(pid);
        if open.contains_key(&STRAY) {
            return Err("the stray descriptor was inherited".into());
        }
        let mut sockets = open.iter().filter(|(_, target)| target.starts_with("socket:"));
        if let Some((fd, _)) =
            sockets.find(|(fd, _)| fd_flags(pid, **fd).is_some_and(|flags| flags & libc::O_CLOEXEC == 0))
        {
            return Err(format!("descriptor {fd} is without close-on-exec"));
        }
    }
    let counts = load.stop();
    if counts.requests == 0 || !counts.failures.is_empty() {
        return Err(format!("{counts:?}"));
    }
    Ok(())
}

#[test]
fn the_guide_shows_the_table() {
    let chapter = include_str!("../../../src/guide/seccomp.md");
    assert!(chapter.contains(&markdown()), "src/guide/seccomp.md should hold this table:\n\n{}", markdown());
    let names: Vec<_> = TABLE.iter().map(|row| row.name).collect();
    assert!(names.is_sorted() && names.len() == names.iter().collect::<BTreeSet<_>>().len());
}

#[test]
fn the_table_alone_is_enough_for_an_upgrade() {
    for row in TABLE.iter().filter(|row| row.when.iter().any(|when| UPGRADE.contains(when))) {
        assert!(!["kill", "wait4", "waitid", "pidfd_send_signal", "clone3"].contains(&row.name));
    }
    for transport in ["pipes", "socket"] {
        let server = start(&["--fork", "--transport", transport], allow_list(&UPGRADE));
        upgrades(&server, 5).unwrap_or_else(|e| panic!("{transport}: {e}"));
    }
}

#[test]
fn the_whole_table_is_enough_for_a_failed_upgrade() {
    for how in ["exit=3", "refuse=not today", "hang", "signal=9", "close-status"] {
        let whole = [&UPGRADE[..], &[When::Failed]].concat();
        let server = start(&["--fork", "--ready-timeout", "3000"], allow_list(&whole));
        std::fs::write(server.dir().join("misbehave"), how).unwrap();
        let verdict = server.try_upgrade(server.first_pid()).unwrap();
        assert!(verdict.starts_with("upgrade failed: child "), "{how}: {verdict}");
        std::fs::write(server.dir().join("misbehave"), "").unwrap();
        upgrades(&server, 1).unwrap_or_else(|e| panic!("after {how}: {e}"));
    }
}

/// The table is also right about the phases: every call that the tracer sees in a phase is in the column of that phase.
#[test]
fn every_call_is_in_its_column() {
    let server = start(&["--fork"], vec![]);
    let load = Load::paced(&server.stream_addrs(), Duration::from_millis(2));
    let log = server.log.clone();
    let done = move || log.since(0).iter().any(|line| line.starts_with("upgrade "));
    let pid = server.first_pid();
    let seen =
        trace::upgrade(pid as i32, None, || send_signal(pid, Signal::HUP), |_| {}, done, Instant::now() + DEADLINE)
            .unwrap();
    drop(load);
    let (mut missing, mut before) = (BTreeSet::new(), BTreeSet::new());
    for call in &seen.calls {
        let columns = match call.role {
            Role::Parent => &[When::Parent, When::Serving, When::Program][..],
            Role::Forked => &[When::Before],
            // clone3 creates the program's threads. Its fallback is in the table.
            Role::Child if call.number == libc::SYS_clone3 => continue,
            Role::Child => &[When::Child, When::Program],
        };
        if call.role == Role::Forked {
            before.insert(call.number);
        }
        let row = TABLE.iter().find(|row| row.number == call.number);
        if !row.is_some_and(|row| row.when.iter().any(|when| columns.contains(when))) {
            missing.insert((call.role, call.number, row.map(|row| row.name)));
        }
    }
    assert!(missing.is_empty(), "not in their columns: {missing:?}");
    let table: BTreeSet<_> =
        TABLE.iter().filter(|row| row.when.contains(&When::Before)).map(|row| row.number).collect();
    assert_eq!(before, table, "between fork and execve: exactly these");
}

#[test]
fn what_is_optional_may_be_refused() {
    let all = |numbers: &[i64]| -> Rules { numbers.iter().map(|number| (*number, vec![])).collect() };
    let clone_vm = {
        let (vm, thread) = (libc::CLONE_VM as u64, libc::CLONE_THREAD as u64);
        move || BTreeMap::from([(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(vm | thread), vm)])])
    };
    let set_pipe_size = || {
        let command = SeccompCmpOp::Eq;
        BTreeMap::from([(libc::SYS_fcntl, vec![argument(1, command, libc::F_SETPIPE_SZ as u64)])])
    };
    // All calls of the table that are newer than Linux 4.5, and newer calls that std and the C library prefer.
    let newer = || {
        let mut rules = all(&[libc::SYS_close_range, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal]);
        rules.extend(all(&[
            libc::SYS_statx,
            libc::SYS_clone3,
            libc::SYS_rseq,
            libc::SYS_openat2,
            libc::SYS_faccessat2,
        ]));
        rules.extend(clone_vm());
        rules
    };
    let server = start(&[], refusing(newer(), libc::ENOSYS));
    upgrades(&server, 2).unwrap_or_else(|e| panic!("an old kernel: {e}"));
    for errno in [libc::ENOSYS, libc::EPERM] {
        for (what, rules) in [
            ("close_range", all(&[libc::SYS_close_range])),
            // As on a system where /proc is not mounted.
            ("close_range, getdents64", all(&[libc::SYS_close_range, libc::SYS_getdents64])),
            ("clone with CLONE_VM", clone_vm()),
            ("epoll_create1", all(&[libc::SYS_epoll_create1])),
            ("epoll_ctl", all(&[libc::SYS_epoll_ctl])),
            ("pidfd_open", all(&[libc::SYS_pidfd_open])),
            ("pidfd_send_signal", all(&[libc::SYS_pidfd_send_signal])),
            ("pidfd_open, pidfd_send_signal, clone with CLONE_VM", {
                let mut rules = all(&[libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal]);
                rules.extend(clone_vm());
                rules
            }),
            ("F_SETPIPE_SZ", set_pipe_size()),
        ] {
            let server = start(&[], refusing(rules, errno));
            // First an upgrade that fails, because the child must be killed with the remaining calls.
            std::fs::write(server.dir().join("misbehave"), "close-status").unwrap();
            let verdict = server.try_upgrade(server.first_pid()).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(verdict.contains("closed its status pipe"), "{what}, errno {errno}: {verdict}");
            std::fs::write(server.dir().join("misbehave"), "").unwrap();
            upgrades(&server, 1).unwrap_or_else(|e| panic!("{what}, errno {errno}: {e}"));
        }
    }
}
