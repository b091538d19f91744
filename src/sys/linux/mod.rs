//! Linux: system calls beyond POSIX.

pub(crate) mod blob;
pub(crate) mod calls;
pub(crate) mod clone;
pub(crate) mod flag;
pub(crate) mod identity;
pub(crate) mod mask;
pub(crate) mod net;
pub(crate) mod peer;
pub(crate) mod program;
pub(crate) mod scheduling;
pub(crate) mod sweep;
pub(crate) mod watch;
