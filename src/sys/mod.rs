//! The only unsafe code of the crate, and the only code that knows on which system it runs.
//!
//! `linux` and `unix` are two sides of one face: the same modules with the same names. `unix` is for every other Unix, and
//! stands in for `linux` too if the crate is built with `--cfg ecdysis_unix`: so its fallbacks are tested.
//!
//! | module | `linux` | `unix` |
//! |---|---|---|
//! | `blob` | sealed memory files | unlinked files in the directory for temporary ones |
//! | `calls` | system calls that leave `errno` alone | libc, which restores `errno` |
//! | `clone` | clone(2) that shares memory; pidfds | none: spawn.rs forks, and looks for the end of a child |
//! | `flag` | eventfd(2) | a pipe |
//! | `identity` | inodes | none for pipes and sockets: a nonce proves the handover |
//! | `mask` | rt_sigprocmask(2), every signal there is | sigset_t, without the C library's own signals |
//! | `net` | accept4(2), pipe2(2) and flags for socket(2) | fcntl(2) afterwards |
//! | `peer` | SO_PEERCRED, SO_PEERPIDFD | getpeereid(3) or getpeerucred(3C), no pidfd |
//! | `program` | /proc/self/exe, AT_SECURE | std's `current_exe`, issetugid(2) |
//! | `scheduling` | CPU affinity and nice value of a thread | nice value of the process |
//! | `sweep` | close_range(2) or /proc/self/fd | every number up to the limit |
//! | `watch` | epoll(7) with EPOLLEXCLUSIVE | none: poll(2) |
//!
//! What a system does not have is an error that names it.

#![allow(unsafe_code)]

#[cfg(all(target_os = "linux", not(ecdysis_unix)))]
mod linux;
#[cfg(all(target_os = "linux", not(ecdysis_unix)))]
use linux as system;
#[cfg(not(all(target_os = "linux", not(ecdysis_unix))))]
mod unix;
#[cfg(not(all(target_os = "linux", not(ecdysis_unix))))]
use unix as system;

pub(crate) use system::{blob, flag, net, watch};

pub(crate) mod adopt;
pub(crate) mod attributes;
pub(crate) mod child;
#[cfg(feature = "systemd_notify")]
pub(crate) mod clock;
#[cfg(feature = "systemd_sockets")]
pub(crate) mod listen_fds;
pub(crate) mod peer;
pub(crate) mod plan;
pub(crate) mod poll;
pub(crate) mod program;
pub(crate) mod signal;
pub(crate) mod spawn;
pub(crate) mod stdio;
pub(crate) mod wake;

/// Whether calls on a socket wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Blocking,
    Nonblocking,
}
