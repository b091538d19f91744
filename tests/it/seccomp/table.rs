//! The system calls that the library makes, and when: the source of the guide's table and of the tests' allow-lists.
#![allow(dead_code)] // No test binary uses all of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// When a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Creating sockets and triggers, accepting, waiting, draining, stopping.
    Serving,
    /// The parent, in an upgrade that succeeds.
    Parent,
    /// The new process, between fork and execve.
    Before,
    /// The new program of an upgrade, from its start to `ready`.
    Child,
    /// The old process in a takeover, also in one that fails.
    HandsOver,
    /// The new process in a takeover, from its start to `ready`.
    TakesOver,
    /// The parent, after an upgrade that failed; and the fallback when another call is refused.
    Failed,
    /// Not the library: calls of the loader, std and the allocator in any Rust program with threads.
    Program,
}
use When::*;

pub struct Row {
    pub name: &'static str,
    pub number: i64,
    pub when: &'static [When],
    pub what_for: &'static str,
}

const fn row(name: &'static str, number: i64, when: &'static [When], what_for: &'static str) -> Row {
    Row { name, number, when, what_for }
}

pub const TABLE: &[Row] = &[
    row("accept4", SYS_accept4, &[Serving, HandsOver], "accepts connections, also on control sockets"),
    row("access", SYS_access, &[Parent, Child, TakesOver, Program], "resolves `argv[0]`; lost rights; the loader"),
    row("arch_prctl", SYS_arch_prctl, &[Program], "thread-local storage"),
    row("bind", SYS_bind, &[Serving], "new sockets"),
    row("brk", SYS_brk, &[Program], "memory"),
    row("chdir", SYS_chdir, &[Before], "the start directory"),
    row("clock_nanosleep", SYS_clock_nanosleep, &[Failed], "waits when the kernel is short of memory"),
    row(
        "clone",
        SYS_clone,
        &[Parent, Program],
        "the fork, flags `CLONE_CHILD_SETTID \\| CLONE_CHILD_CLEARTID \\| SIGCHLD`; threads, flags with `CLONE_THREAD`",
    ),
    row("close", SYS_close, &[Serving, Parent, Child, HandsOver, TakesOver, Program], ""),
    row("close_range", SYS_close_range, &[Before, Child], "close-on-exec; may be refused with an error"),
    row(
        "connect",
        SYS_connect,
        &[Serving, TakesOver],
        "checks whether a Unix socket's file is stale; the takeover socket",
    ),
    row("epoll_create1", SYS_epoll_create1, &[Serving], "accept loops; may be refused with an error"),
    row("epoll_ctl", SYS_epoll_ctl, &[Serving], "accept loops; may be refused with an error"),
    row("epoll_pwait", SYS_epoll_pwait, &[Serving], "accept loops"),
    row("eventfd2", SYS_eventfd2, &[Child, TakesOver], "wake-ups and the shutdown handle"),
    row("execve", SYS_execve, &[Before], "the new program"),
    row("exit", SYS_exit, &[Program], "the end of a thread"),
    row("exit_group", SYS_exit_group, &[Failed, Program], "the exit, also of a child whose `execve` failed"),
    row("fchmod", SYS_fchmod, &[Serving, Parent, Child, HandsOver, TakesOver], "control sockets, PID file"),
    row(
        "fcntl",
        SYS_fcntl,
        &[Serving, Parent, Before, Child, HandsOver, TakesOver, Program],
        "`F_SETFD`, `F_DUPFD_CLOEXEC`; `F_SETPIPE_SZ` for thousands of sockets, may be refused with an error",
    ),
    row("flock", SYS_flock, &[Serving], "locks the replacement of a stale Unix socket file"),
    row("fstat", SYS_fstat, &[Serving, Parent, Child, HandsOver, TakesOver, Program], "inodes"),
    row("futex", SYS_futex, &[Serving, Program], "locks"),
    row("getcwd", SYS_getcwd, &[Child, TakesOver], "the start directory, if `PWD` does not name it"),
    row("getdents64", SYS_getdents64, &[Failed], "the sweep without close_range; may be refused with an error"),
    row("getegid", SYS_getegid, &[Parent], "checks whether the next program would get other privileges"),
    row(
        "geteuid",
        SYS_geteuid,
        &[Serving, Parent, HandsOver, TakesOver],
        "checks who may use a control or takeover socket",
    ),
    row("getgid", SYS_getgid, &[Parent], "checks whether the next program would get other privileges"),
    row("getpid", SYS_getpid, &[Parent, Child, HandsOver, TakesOver], "PID file"),
    row("getpriority", SYS_getpriority, &[Parent, Child, TakesOver], "the nice value that the next generation gets"),
    row("getrandom", SYS_getrandom, &[Program], "the keys of hash tables"),
    row("getsockname", SYS_getsockname, &[Program], "`local_addr`, if the program asks"),
    row(
        "getsockopt",
        SYS_getsockopt,
        &[Serving, Child, HandsOver, TakesOver],
        "the kind of a received socket; the peer of a control or takeover socket",
    ),
    row("gettid", SYS_gettid, &[Program], "threads"),
    row("getuid", SYS_getuid, &[Parent], "checks whether the next program would get other privileges"),
    row("getxattr", SYS_getxattr, &[Failed], "checks why a child has ended; may be refused with an error"),
    row("ioctl", SYS_ioctl, &[Serving], "`FIONBIO` on new sockets"),
    row("kill", SYS_kill, &[Failed], "kills a failed child if `pidfd_send_signal` is refused"),
    row("listen", SYS_listen, &[Serving], "new sockets"),
    row("lseek", SYS_lseek, &[Program], "files"),
    row("madvise", SYS_madvise, &[Program], "memory"),
    row("memfd_create", SYS_memfd_create, &[Parent, Child, HandsOver, TakesOver], "state; the status of a drain"),
    row("mmap", SYS_mmap, &[Program], "memory"),
    row("mprotect", SYS_mprotect, &[Program], "memory"),
    row("mremap", SYS_mremap, &[Program], "memory"),
    row("munmap", SYS_munmap, &[Program], "memory"),
    row("nanosleep", SYS_nanosleep, &[Failed], "waits before `execve` while the program's file is open for writing"),
    row("newfstatat", SYS_newfstatat, &[Program], "the loader"),
    row(
        "openat",
        SYS_openat,
        &[Parent, Child, HandsOver, TakesOver, Failed, Program],
        "PID file; `/proc/self/fd` for the sweep without close_range; the loader",
    ),
    row(
        "pidfd_open",
        SYS_pidfd_open,
        &[Parent],
        "notices the end of a child made by `Spawn::Fork`; may be refused with an error",
    ),
    row("pidfd_send_signal", SYS_pidfd_send_signal, &[Failed], "kills a failed child; may be refused with an error"),
    row("pipe2", SYS_pipe2, &[Parent], "the two pipes"),
    row("poll", SYS_poll, &[Program], "std checks stdin, stdout and stderr"),
    row("ppoll", SYS_ppoll, &[Serving, Parent, Child, HandsOver, TakesOver, Failed], "every wait"),
    row("prctl", SYS_prctl, &[Program], "names memory areas"),
    row("pread64", SYS_pread64, &[Child, TakesOver, Program], "state, if any was passed; the loader"),
    row("prlimit64", SYS_prlimit64, &[Failed, Program], "the sweep without close_range and `/proc`; stacks"),
    row("pwrite64", SYS_pwrite64, &[Parent, HandsOver, Program], "the status of a drain; may be refused with an error"),
    row("read", SYS_read, &[Serving, Parent, Child, HandsOver, TakesOver, Program], ""),
    row("readlink", SYS_readlink, &[Child, TakesOver], "`/proc/self/exe`, if `argv[0]` cannot be resolved"),
    row(
        "recvfrom",
        SYS_recvfrom,
        &[Serving, HandsOver, Program],
        "control and takeover sockets, UDP; reading from sockets",
    ),
    row(
        "recvmsg",
        SYS_recvmsg,
        &[Child, TakesOver],
        "receives a handover over a socket: a takeover, `Transport::Socket`",
    ),
    row("rename", SYS_rename, &[Parent, Child, HandsOver, TakesOver], "PID file"),
    row("restart_syscall", SYS_restart_syscall, &[Serving], "after SIGSTOP and SIGCONT"),
    row("rseq", SYS_rseq, &[Program], "threads"),
    row(
        "rt_sigaction",
        SYS_rt_sigaction,
        &[Serving, Before, Child, TakesOver, Program],
        "resets signals to their defaults; installs handlers",
    ),
    row(
        "rt_sigprocmask",
        SYS_rt_sigprocmask,
        &[Serving, Parent, Before, Child, HandsOver, TakesOver, Program],
        "signal masks",
    ),
    row("rt_sigreturn", SYS_rt_sigreturn, &[Serving, Parent], "the end of a signal handler"),
    row(
        "rt_sigtimedwait",
        SYS_rt_sigtimedwait,
        &[Serving, HandsOver, TakesOver],
        "clears the SIGPIPE of a pipe whose reader is gone",
    ),
    row(
        "sched_getaffinity",
        SYS_sched_getaffinity,
        &[Parent, Child, TakesOver, Program],
        "the CPUs that the next generation gets; std's check of the main thread's stack",
    ),
    row(
        "sched_setaffinity",
        SYS_sched_setaffinity,
        &[Failed],
        "before `execve`, if the thread that upgrades was pinned",
    ),
    row("sendmsg", SYS_sendmsg, &[Parent, HandsOver], "sends a handover over a socket"),
    row(
        "sendto",
        SYS_sendto,
        &[Serving, TakesOver, Program],
        "answers on control sockets; takeover requests; writing to sockets",
    ),
    row("set_robust_list", SYS_set_robust_list, &[Before, Program], "fork and threads of the C library"),
    row("set_tid_address", SYS_set_tid_address, &[Program], "threads"),
    row(
        "setpriority",
        SYS_setpriority,
        &[Failed],
        "before `execve`, if the thread that upgrades has another nice value",
    ),
    row("setsockopt", SYS_setsockopt, &[Serving], "new sockets"),
    row(
        "shutdown",
        SYS_shutdown,
        &[Serving, HandsOver],
        "a paused accept loop passes on a wakeup; the parent takes a commit back",
    ),
    row("sigaltstack", SYS_sigaltstack, &[Program], "std's stack for SIGSEGV"),
    row("socket", SYS_socket, &[Serving, TakesOver], "new sockets"),
    row("socketpair", SYS_socketpair, &[Parent], "`Transport::Socket`"),
    row("statx", SYS_statx, &[Serving, Child, TakesOver, Program], "files"),
    row(
        "unlink",
        SYS_unlink,
        &[Serving, Parent, Child, HandsOver, TakesOver],
        "PID file; removes the files of Unix sockets at a stop",
    ),
    row("wait4", SYS_wait4, &[Failed], "reaps a failed child"),
    row("waitid", SYS_waitid, &[Failed], "reaps a failed child"),
    row("write", SYS_write, &[Serving, Parent, Child, HandsOver, TakesOver, Failed, Program], ""),
];

/// The table as the guide shows it.
pub fn markdown() -> String {
    let mut text = String::from(
        "| call | serving | parent | before `execve` | new program to `ready` | hands over | takes over | failure, fallback | any program | purpose |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for Row { name, when, what_for, .. } in TABLE {
        let _ = write!(text, "| `{name}` |");
        for column in [Serving, Parent, Before, Child, HandsOver, TakesOver, Failed, Program] {
            text.push_str(if when.contains(&column) { " × |" } else { " |" });
        }
        let _ = writeln!(text, " {what_for} |");
    }
    text
}

pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A filter: `matching` for the calls in the rules, `otherwise` for all others.
pub fn filter(rules: Rules, matching: SeccompAction, otherwise: SeccompAction) -> BpfProgram {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64).unwrap().try_into().unwrap()
}

pub fn argument(index: u8, op: SeccompCmpOp, value: u64) -> SeccompRule {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Qword, op, value).unwrap()]).unwrap()
}

/// The rows with one of these columns as an allow-list that kills, and ENOSYS for clone3.
pub fn allow_list(columns: &[When]) -> Vec<BpfProgram> {
    let rows = TABLE.iter().filter(|row| row.when.iter().any(|when| columns.contains(when)));
    let mut rules: Rules = rows.map(|row| (row.number, vec![])).collect();
    let (fork, thread) = ((CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD) as u64, CLONE_THREAD as u64);
    let mut clones = vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)];
    if columns.contains(&Parent) {
        clones.push(argument(0, SeccompCmpOp::Eq, fork));
    }
    rules.insert(SYS_clone, clones);
    // The kernel applies the stricter of two filters, and ENOSYS is stricter than "allow".
    rules.insert(SYS_clone3, vec![]);
    let no_clone3 = BTreeMap::from([(SYS_clone3, vec![])]);
    vec![
        filter(no_clone3, SeccompAction::Errno(ENOSYS as u32), SeccompAction::Allow),
        filter(rules, SeccompAction::Allow, SeccompAction::KillProcess),
    ]
}
