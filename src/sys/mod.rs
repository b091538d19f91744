//! The only unsafe code of the crate, and the only code that depends on the operating system.
//!
//! `linux` and `unix` are two implementations of one interface: the same modules with the same names. `unix` is for
//! every other Unix. If the crate is built with `--cfg ecdysis_unix`, it also replaces `linux`, so that its fallbacks
//! can be tested on Linux.
//!
//! | module | `linux` | `unix` |
//! |---|---|---|
//! | `blob` | sealed memory files | unlinked files in the directory for temporary ones |
//! | `calls` | system calls that leave `errno` alone | libc, which restores `errno` |
//! | `clone` | clone(2) that shares memory; pidfds | none: spawn.rs forks, and checks periodically for the end of a child |
//! | `flag` | eventfd(2) | a pipe |
//! | `identity` | inodes | none for pipes and sockets: a nonce verifies the handover |
//! | `mask` | rt_sigprocmask(2), every signal there is | sigset_t, without the C library's own signals |
//! | `net` | accept4(2), pipe2(2) and flags for socket(2) | a later fcntl(2) |
//! | `peer` | SO_PEERCRED, SO_PEERPIDFD | getpeereid(3) or getpeerucred(3C), no pidfd |
//! | `program` | /proc/self/exe, AT_SECURE | std's `current_exe`, issetugid(2) |
//! | `scheduling` | CPU affinity and nice value of a thread | nice value of the process |
//! | `sweep` | close_range(2) or /proc/self/fd | every number up to the limit |
//! | `watch` | epoll(7) with EPOLLEXCLUSIVE | none: poll(2) |
//!
//! A feature that a system lacks is an error that names the feature.

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
mod sockopt;
pub(crate) mod spawn;
pub(crate) mod stdio;
pub(crate) mod wake;

/// Whether calls on a socket block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Blocking,
    Nonblocking,
}

/// The parent of a new process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parentage {
    /// The calling process.
    Us,
    /// The parent of the calling process, if the kernel allows it. That parent then reaps the new process. For a
    /// service manager that waits only for its own children at a stop.
    OurParent,
    /// Another process, which has started the one that takes over.
    Another,
}
