//! The only unsafe code of the crate: what the kernel offers and neither std nor rustix hands out safely.

#![allow(unsafe_code)]

pub(crate) mod adopt;
#[cfg(feature = "systemd_sockets")]
pub(crate) mod listen_fds;
pub(crate) mod peer;
pub(crate) mod poll;
pub(crate) mod raw;
pub(crate) mod signal;
pub(crate) mod spawn;
pub(crate) mod sweep;
