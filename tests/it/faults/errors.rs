//! The errors that a system call with valid arguments can return: a lack of memory, descriptors or space, an
//! interruption, a missing file, and the refusal of a seccomp filter.

#![allow(non_upper_case_globals)]

use super::trace::{Call, Role};
use libc::*;

/// Name and errors. A call without errors cannot fail, or injecting the failure would itself do harm: an injected error
/// leaves a `close` undone.
const TABLE: &[(i64, &str, &[i32])] = &[
    (SYS_accept4, "accept4", &[EMFILE, ENFILE, ENOMEM, ENOBUFS, ECONNABORTED, EINTR, EPERM]),
    (SYS_access, "access", &[EACCES, ENOENT, ENOMEM]),
    (SYS_arch_prctl, "arch_prctl", &[]),
    (SYS_bind, "bind", &[EADDRINUSE, EACCES, ENOMEM]),
    (SYS_brk, "brk", &[]),
    (SYS_chdir, "chdir", &[ENOENT, EACCES, ENOMEM, EIO, ENOTDIR]),
    (SYS_clone, "clone", &[EAGAIN, ENOMEM, EPERM, ENOSYS, EINVAL]),
    (SYS_clone3, "clone3", &[EAGAIN, ENOMEM, EPERM, ENOSYS]),
    (SYS_close, "close", &[]),
    (SYS_close_range, "close_range", &[ENOSYS, EPERM, EINVAL, ENOMEM, EMFILE]),
    (SYS_connect, "connect", &[ECONNREFUSED, EAGAIN]),
    (SYS_epoll_create1, "epoll_create1", &[EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM]),
    (SYS_epoll_ctl, "epoll_ctl", &[ENOMEM, ENOSPC, EPERM]),
    (SYS_eventfd2, "eventfd2", &[EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM]),
    (
        SYS_execve,
        "execve",
        &[
            ENOENT, EACCES, ETXTBSY, ENOEXEC, ENOMEM, E2BIG, EMFILE, ENFILE, EIO, ELOOP, EPERM, EAGAIN, EISDIR, EINVAL,
            ENOTDIR,
        ],
    ),
    (SYS_exit_group, "exit_group", &[]),
    (SYS_fchmod, "fchmod", &[EPERM, EROFS, EIO]),
    (SYS_fcntl, "fcntl", &[EPERM]),
    (SYS_fstat, "fstat", &[ENOMEM, EIO, EPERM]),
    (SYS_futex, "futex", &[]),
    (SYS_getcwd, "getcwd", &[ENOENT, ENOMEM]),
    (SYS_getdents64, "getdents64", &[EIO, EPERM]),
    (SYS_getrandom, "getrandom", &[EAGAIN, EINTR, ENOSYS]),
    (SYS_getsockname, "getsockname", &[ENOBUFS]),
    (SYS_getsockopt, "getsockopt", &[ENOMEM, ENOPROTOOPT, EPERM]),
    (SYS_ioctl, "ioctl", &[ENOMEM, EPERM]),
    (SYS_listen, "listen", &[EADDRINUSE]),
    (SYS_mmap, "mmap", &[ENOMEM]),
    (SYS_mprotect, "mprotect", &[ENOMEM]),
    (SYS_munmap, "munmap", &[]),
    (SYS_newfstatat, "newfstatat", &[ENOENT, EACCES, ENOMEM]),
    (SYS_openat, "openat", &[EMFILE, ENFILE, ENOMEM, ENOENT, EACCES, EINTR, ENOSPC, EROFS]),
    (SYS_pidfd_open, "pidfd_open", &[EMFILE, ENFILE, ENOMEM, ENOSYS, EPERM]),
    (SYS_pidfd_send_signal, "pidfd_send_signal", &[ENOSYS, EPERM]),
    (SYS_pipe2, "pipe2", &[EMFILE, ENFILE, ENOMEM]),
    (SYS_poll, "poll", &[EINTR, ENOMEM]),
    (SYS_ppoll, "ppoll", &[EINTR, ENOMEM, EAGAIN]),
    (SYS_prctl, "prctl", &[EPERM]),
    (SYS_pread64, "pread64", &[EIO, EINTR]),
    (SYS_prlimit64, "prlimit64", &[EPERM, ENOSYS]),
    (SYS_read, "read", &[EINTR, EIO]),
    (SYS_readlink, "readlink", &[ENOENT, EACCES, ENOMEM]),
    (SYS_recvmsg, "recvmsg", &[EAGAIN, EINTR, ENOBUFS, ENOMEM, EPERM]),
    (SYS_rename, "rename", &[ENOSPC, EACCES, EROFS, EIO, EDQUOT]),
    (SYS_rseq, "rseq", &[ENOSYS, EPERM]),
    // Setting a handler fails only for an invalid argument, or if a filter refuses it.
    (SYS_rt_sigaction, "rt_sigaction", &[EPERM]),
    (SYS_rt_sigprocmask, "rt_sigprocmask", &[EPERM]),
    (SYS_rt_sigreturn, "rt_sigreturn", &[]),
    (SYS_rt_sigtimedwait, "rt_sigtimedwait", &[EAGAIN, EINTR, EPERM]),
    (SYS_restart_syscall, "restart_syscall", &[]),
    (SYS_sched_getaffinity, "sched_getaffinity", &[EPERM, ENOSYS]),
    (SYS_sendmsg, "sendmsg", &[EAGAIN, EINTR, ENOBUFS, ENOMEM, EPERM, EPIPE, ETOOMANYREFS]),
    (SYS_sendto, "sendto", &[EPIPE, EAGAIN, ENOBUFS, EINTR]),
    (SYS_set_robust_list, "set_robust_list", &[ENOSYS, EPERM]),
    (SYS_set_tid_address, "set_tid_address", &[]),
    (SYS_setsockopt, "setsockopt", &[ENOMEM, EPERM]),
    (SYS_sigaltstack, "sigaltstack", &[ENOMEM, EPERM]),
    (SYS_socket, "socket", &[EMFILE, ENFILE, ENOMEM, ENOBUFS, EACCES]),
    (SYS_socketpair, "socketpair", &[EMFILE, ENFILE, ENOMEM, EPERM]),
    (SYS_statx, "statx", &[ENOENT, EACCES, ENOMEM, ENOSYS, EPERM]),
    (SYS_unlink, "unlink", &[EACCES, EROFS, EIO, EPERM]),
    (SYS_wait4, "wait4", &[EINTR, ECHILD]),
    (SYS_waitid, "waitid", &[EINTR, ECHILD]),
    (SYS_write, "write", &[EINTR, EIO, EPIPE, ENOSPC, EAGAIN]),
    (SYS_clock_nanosleep, "clock_nanosleep", &[EINTR]),
    (SYS_getpid, "getpid", &[]),
    (SYS_gettid, "gettid", &[]),
    (SYS_geteuid, "geteuid", &[]),
    (SYS_getuid, "getuid", &[]),
];

pub fn errnos(call: &Call) -> &'static [i32] {
    if call.number == SYS_fcntl && call.argument as i32 == F_DUPFD_CLOEXEC {
        return &[EMFILE, EPERM];
    }
    match call.number {
        // The pipes and sockets are never full, and involve no disk. While the parent is alive, a late answer reaches
        // it.
        SYS_write if call.pipe && call.role == Role::Child && call.late => return &[EINTR],
        SYS_write if call.pipe => return &[EINTR, EPIPE],
        SYS_read if call.pipe => return &[EINTR],
        _ => {}
    }
    TABLE.iter().find(|(number, ..)| *number == call.number).map_or(&[EPERM, ENOSYS], |(_, _, errnos)| errnos)
}

pub fn name(number: i64) -> String {
    match TABLE.iter().find(|(known, ..)| *known == number) {
        Some((_, name, _)) => (*name).to_owned(),
        None => format!("syscall {number}"),
    }
}
