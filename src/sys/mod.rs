//! The only unsafe code of the crate, and the only code that knows on which system it runs.
//!
//! `linux` holds what only Linux has.

#![allow(unsafe_code)]

mod linux;
use linux as system;

pub(crate) use system::{blob, flag, net, program, watch};

pub(crate) mod adopt;
pub(crate) mod attributes;
pub(crate) mod child;
#[cfg(feature = "systemd_sockets")]
pub(crate) mod listen_fds;
pub(crate) mod peer;
pub(crate) mod poll;
pub(crate) mod signal;
pub(crate) mod spawn;
pub(crate) mod stdio;

/// Whether calls on a socket wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Blocking,
    Nonblocking,
}
