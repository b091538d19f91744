//! The log: every line names the process and its generation, because several generations write to one log.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// 0 before the handover was read.
static GENERATION: AtomicU64 = AtomicU64::new(0);

pub(crate) fn set_generation(generation: u64) {
    GENERATION.store(generation, Ordering::Relaxed);
}

/// Writes one line. The logger is foreign code, called in the middle of an upgrade, with descriptors and processes half
/// handed over. A panic in it must not unwind through that: it is dropped, and the line is lost.
pub(crate) fn write(level: log::Level, message: fmt::Arguments<'_>) {
    let (pid, generation) = (process::id(), GENERATION.load(Ordering::Relaxed));
    let write = || log::log!(target: "ecdysis", level, "{message} pid={pid} generation={generation}");
    let _ = panic::catch_unwind(AssertUnwindSafe(write));
}

macro_rules! error { ($($message:tt)+) => { $crate::logging::write(log::Level::Error, format_args!($($message)+)) }; }
macro_rules! warning { ($($message:tt)+) => { $crate::logging::write(log::Level::Warn, format_args!($($message)+)) }; }
macro_rules! info { ($($message:tt)+) => { $crate::logging::write(log::Level::Info, format_args!($($message)+)) }; }
macro_rules! debug { ($($message:tt)+) => { $crate::logging::write(log::Level::Debug, format_args!($($message)+)) }; }
pub(crate) use {debug, error, info, warning as warn};
