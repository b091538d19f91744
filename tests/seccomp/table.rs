//! Which system calls the library makes, and when: the source of the guide's chapter and of the test's allow-list.

use libc::*;
use std::fmt::Write as _;

/// When a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Making sockets and triggers, accepting, waiting, draining, stopping.
    Serving,
    /// The parent, in an upgrade that succeeds.
    Parent,
    /// The new process, between fork and execve.
    Before,
    /// The new program, from its start to `ready`.
    Child,
    /// The parent, after an upgrade that failed; and what is tried where another call was refused.
    Failed,
    /// Not the library: what the loader, std and the allocator do in any Rust program with threads.
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
    row("accept4", SYS_accept4, &[Serving], "connections, and control connections"),
    row("access", SYS_access, &[Child, Program], "`argv[0]` resolved; the loader"),
    row("arch_prctl", SYS_arch_prctl, &[Program], "thread-local storage"),
    row("bind", SYS_bind, &[Serving], "new sockets"),
    row("brk", SYS_brk, &[Program], "memory"),
    row("chdir", SYS_chdir, &[Before], "the start directory"),
    row("clock_nanosleep", SYS_clock_nanosleep, &[Failed], "a pause when the kernel is short of memory"),
    row(
        "clone",
        SYS_clone,
        &[Parent, Program],
        "the fork, flags `CLONE_CHILD_SETTID \\| CLONE_CHILD_CLEARTID \\| SIGCHLD`; threads, flags with `CLONE_THREAD`",
    ),
    row("close", SYS_close, &[Serving, Parent, Child, Program], ""),
    row("close_range", SYS_close_range, &[Before], "the sweep; may be refused with an error"),
    row("connect", SYS_connect, &[Serving], "whether a Unix socket's file is stale"),
    row("epoll_create1", SYS_epoll_create1, &[Serving], "accept loops; may be refused with an error"),
    row("epoll_ctl", SYS_epoll_ctl, &[Serving], "accept loops; may be refused with an error"),
    row("epoll_pwait", SYS_epoll_pwait, &[Serving], "accept loops"),
    row("eventfd2", SYS_eventfd2, &[Child], "wake-ups and the shutdown handle"),
    row("execve", SYS_execve, &[Before], "the new program"),
    row("exit", SYS_exit, &[Program], "the end of a thread"),
    row("exit_group", SYS_exit_group, &[Failed, Program], "the end; of a child that could not execute"),
    row("fchmod", SYS_fchmod, &[Serving, Parent, Child], "control sockets, PID file"),
    row(
        "fcntl",
        SYS_fcntl,
        &[Serving, Parent, Before, Child, Program],
        "`F_SETFD`, `F_DUPFD_CLOEXEC`; `F_SETPIPE_SZ` for thousands of sockets, may be refused with an error",
    ),
    row("fstat", SYS_fstat, &[Serving, Parent, Child, Program], "inodes"),
    row("futex", SYS_futex, &[Serving, Program], "locks"),
    row("getcwd", SYS_getcwd, &[Child], "the start directory, where `PWD` does not name it"),
    row("getdents64", SYS_getdents64, &[Failed], "the sweep without close_range; may be refused with an error"),
    row("geteuid", SYS_geteuid, &[Serving], "who may use a control socket"),
    row("getpid", SYS_getpid, &[Child, Parent], "PID file"),
    row("getrandom", SYS_getrandom, &[Program], "the keys of hash tables"),
    row("getsockname", SYS_getsockname, &[Program], "`local_addr`, if the program asks"),
    row("getsockopt", SYS_getsockopt, &[Serving, Child], "the kind of an inherited socket; peers of control sockets"),
    row("gettid", SYS_gettid, &[Program], "threads"),
    row("ioctl", SYS_ioctl, &[Serving], "`FIONBIO` on new sockets"),
    row("kill", SYS_kill, &[Failed], "the end of a failed child, by `Spawn::Fork`"),
    row("listen", SYS_listen, &[Serving], "new sockets"),
    row("lseek", SYS_lseek, &[Program], "files"),
    row("madvise", SYS_madvise, &[Program], "memory"),
    row("mmap", SYS_mmap, &[Program], "memory"),
    row("mprotect", SYS_mprotect, &[Program], "memory"),
    row("mremap", SYS_mremap, &[Program], "memory"),
    row("munmap", SYS_munmap, &[Program], "memory"),
    row("newfstatat", SYS_newfstatat, &[Program], "the loader"),
    row(
        "openat",
        SYS_openat,
        &[Parent, Before, Child, Failed, Program],
        "`/proc/self/status`, which signals to reset, may be refused with an error; PID file; `/proc/self/fd` for the sweep without close_range; the loader",
    ),
    row(
        "pidfd_send_signal",
        SYS_pidfd_send_signal,
        &[Failed],
        "the end of a failed child; may be refused with an error",
    ),
    row("pipe2", SYS_pipe2, &[Parent], "the two pipes"),
    row("poll", SYS_poll, &[Program], "std's look at stdin, stdout and stderr"),
    row("ppoll", SYS_ppoll, &[Serving, Parent, Child, Failed], "every wait"),
    row("prctl", SYS_prctl, &[Program], "names of memory"),
    row("pread64", SYS_pread64, &[Program], "the loader"),
    row("prlimit64", SYS_prlimit64, &[Failed, Program], "the sweep without close_range and `/proc`; stacks"),
    row("read", SYS_read, &[Serving, Parent, Before, Child, Program], ""),
    row("readlink", SYS_readlink, &[Child], "`/proc/self/exe`, where `argv[0]` leads nowhere"),
    row("recvfrom", SYS_recvfrom, &[Serving, Program], "control sockets, UDP; reading from sockets"),
    row("rename", SYS_rename, &[Child, Parent], "PID file"),
    row("restart_syscall", SYS_restart_syscall, &[Serving], "after SIGSTOP and SIGCONT"),
    row("rseq", SYS_rseq, &[Program], "threads"),
    row("rt_sigaction", SYS_rt_sigaction, &[Serving, Before, Child, Program], "signals to their defaults; handlers"),
    row("rt_sigprocmask", SYS_rt_sigprocmask, &[Serving, Parent, Before, Child, Program], "signal masks"),
    row("rt_sigreturn", SYS_rt_sigreturn, &[Serving, Parent], "the end of a signal handler"),
    row("rt_sigtimedwait", SYS_rt_sigtimedwait, &[Serving], "the SIGPIPE of a pipe whose reader is gone"),
    row("sched_getaffinity", SYS_sched_getaffinity, &[Program], "std's stack of the main thread"),
    row("sendto", SYS_sendto, &[Serving, Program], "answers on control sockets; writing to sockets"),
    row("set_robust_list", SYS_set_robust_list, &[Before, Program], "fork and threads of the C library"),
    row("set_tid_address", SYS_set_tid_address, &[Program], "threads"),
    row("setsockopt", SYS_setsockopt, &[Serving], "new sockets"),
    row("sigaltstack", SYS_sigaltstack, &[Program], "std's stack for SIGSEGV"),
    row("socket", SYS_socket, &[Serving], "new sockets"),
    row("statx", SYS_statx, &[Serving, Child, Program], "files"),
    row("unlink", SYS_unlink, &[Serving, Child, Parent], "PID file, the files of Unix sockets at a stop"),
    row("wait4", SYS_wait4, &[Failed], "the end of a failed child"),
    row("waitid", SYS_waitid, &[Failed], "the end of a failed child"),
    row("write", SYS_write, &[Serving, Parent, Child, Failed, Program], ""),
];

/// The table as the guide shows it.
pub fn markdown() -> String {
    let mut text = String::from(
        "| call | serving | parent | before `execve` | new program to `ready` | failure, fallback | any program | what for |\n|---|---|---|---|---|---|---|---|\n",
    );
    for Row { name, when, what_for, .. } in TABLE {
        let _ = write!(text, "| `{name}` |");
        for column in [Serving, Parent, Before, Child, Failed, Program] {
            text.push_str(if when.contains(&column) { " × |" } else { " |" });
        }
        let _ = writeln!(text, " {what_for} |");
    }
    text
}
