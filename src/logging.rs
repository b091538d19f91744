//! The log: every line names the process and its generation, because several generations write to one log.

use std::fmt;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use crate::foreign::Foreign;

/// The generation of this process; 0 before the handover is read.
static GENERATION: AtomicU64 = AtomicU64::new(0);

pub(crate) fn set_generation(generation: u64) {
    GENERATION.store(generation, Ordering::Relaxed);
}

/// Writes one line. The logger may block, for example on a full pipe, so no thread waits for it without a limit.
pub(crate) fn write(level: log::Level, message: fmt::Arguments<'_>) {
    static LOGGER: OnceLock<Foreign<(log::Level, String)>> = OnceLock::new();

    if level > log::max_level() {
        return;
    }
    let (pid, generation) = (process::id(), GENERATION.load(Ordering::Relaxed));
    let logger = || {
        Foreign::new("ecdysis-log", |(level, text): (log::Level, String)| log::log!(target: "ecdysis", level, "{text}"))
    };
    LOGGER.get_or_init(logger).call((level, format!("{message} pid={pid} generation={generation}")));
}

macro_rules! error { ($($message:tt)+) => { $crate::logging::write(log::Level::Error, format_args!($($message)+)) }; }
macro_rules! warning { ($($message:tt)+) => { $crate::logging::write(log::Level::Warn, format_args!($($message)+)) }; }
macro_rules! info { ($($message:tt)+) => { $crate::logging::write(log::Level::Info, format_args!($($message)+)) }; }
macro_rules! debug { ($($message:tt)+) => { $crate::logging::write(log::Level::Debug, format_args!($($message)+)) }; }
pub(crate) use {debug, error, info, warning as warn};
