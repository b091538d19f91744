//! The log: every line names the process and its generation, because several generations write to one log.

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

/// 0 before the handover was read.
static GENERATION: AtomicU64 = AtomicU64::new(0);

pub(crate) fn set_generation(generation: u64) {
    GENERATION.store(generation, Ordering::Relaxed);
}

/// How long a line may take before the ones that follow are no longer waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many lines may wait while the logger blocks. More are lost.
const WAITING: usize = 256;

struct Line {
    level: log::Level,
    text: String,
    /// Closed when the line is written.
    _written: SyncSender<()>,
}

/// Whether a line has taken longer than [`PATIENCE`], and no other has been written since.
static BLOCKED: AtomicBool = AtomicBool::new(false);

/// Writes one line.
///
/// The logger is foreign code. It may block without limit, on a full pipe for example, and would hold up the thread that
/// serves the triggers. So a thread of its own calls it, and nobody waits for that longer than [`PATIENCE`].
pub(crate) fn write(level: log::Level, message: fmt::Arguments<'_>) {
    static WRITER: OnceLock<Option<SyncSender<Line>>> = OnceLock::new();

    if level > log::max_level() {
        return;
    }
    let (pid, generation) = (process::id(), GENERATION.load(Ordering::Relaxed));
    let text = format!("{message} pid={pid} generation={generation}");
    let Some(writer) = WRITER.get_or_init(|| start_writer().ok()) else { return call_logger(level, &text) };
    let (written, wait) = mpsc::sync_channel(0);
    if writer.try_send(Line { level, text, _written: written }).is_err() || BLOCKED.load(Ordering::Relaxed) {
        return;
    }
    if wait.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
        BLOCKED.store(true, Ordering::Relaxed);
    }
}

fn start_writer() -> io::Result<SyncSender<Line>> {
    let (writer, lines) = mpsc::sync_channel::<Line>(WAITING);
    let body = move || {
        for line in lines {
            call_logger(line.level, &line.text);
            BLOCKED.store(false, Ordering::Relaxed);
        }
    };
    thread::Builder::new().name("ecdysis-log".into()).spawn(body).map(|_| writer)
}

/// A panic of the logger must not unwind through an upgrade: it is dropped, and the line is lost.
fn call_logger(level: log::Level, text: &str) {
    let write = || log::log!(target: "ecdysis", level, "{text}");
    let _ = panic::catch_unwind(AssertUnwindSafe(write));
}

macro_rules! error { ($($message:tt)+) => { $crate::logging::write(log::Level::Error, format_args!($($message)+)) }; }
macro_rules! warning { ($($message:tt)+) => { $crate::logging::write(log::Level::Warn, format_args!($($message)+)) }; }
macro_rules! info { ($($message:tt)+) => { $crate::logging::write(log::Level::Info, format_args!($($message)+)) }; }
macro_rules! debug { ($($message:tt)+) => { $crate::logging::write(log::Level::Debug, format_args!($($message)+)) }; }
pub(crate) use {debug, error, info, warning as warn};
