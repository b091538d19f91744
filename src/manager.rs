//! The interface to a service manager and to its store for sockets. Module `systemd` has the only implementation.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::Event;
use crate::exit::Upgraded;
use crate::key::Key;
use crate::listen::FileId;

/// How long the manager may take to make a child the main process. It does that immediately, unless it hangs.
pub(crate) const ANNOUNCE: Duration = Duration::from_secs(5);

/// The process that an upgrade has started.
#[derive(Clone, Copy)]
pub(crate) struct Child {
    /// Distinguishes it from any other process, see [`pidfd_id`](crate::sys::program::pidfd_id).
    #[cfg_attr(not(feature = "systemd_notify"), allow(dead_code))]
    pub(crate) id: Option<u64>,
}

/// A service manager that was found in the environment.
///
/// # Contract
///
/// - No method fails. An implementation logs errors, and the service continues without its manager.
/// - No method blocks for longer than [`ANNOUNCE`], whatever the manager does.
/// - The manager accepts messages only from the main process. That is the process that it started, and later each
///   process that its predecessor has announced. [`is_main`](Self::is_main) returns whether this process is the main
///   process, and the caller sends nothing before. A main process stays the main process until it has announced
///   another.
/// - Any thread may call any method, even concurrently.
pub(crate) trait ServiceManager: fmt::Debug + Send + Sync {
    fn is_main(&self) -> bool;

    /// Whether this process is the manager's child, so that its successor must be one too.
    fn is_parent(&self) -> bool;

    /// Call this when the parent has announced this process, or has ended without doing so (`announced` is false). In
    /// the latter case this process announces itself, for a manager that accepts messages from all processes.
    fn become_main(&self, announced: bool);

    /// Reports an event of the main process.
    fn on_event(&self, event: &Event<'_>);

    /// Announces the process that serves now. A child becomes the main process, and this returns only when the manager
    /// knows that, because the service would end with a main process that ends earlier. If a process of another unit
    /// took over, this service ends, and `child` is `None`. Returns false if the announcement could not be sent: then
    /// this process is still the main process.
    fn announce(&self, upgraded: &Upgraded, child: Option<Child>) -> bool;

    /// Sends a watchdog message if one is due and `is_main` returns true. Returns when the next one is due.
    fn watchdog_tick(&self, is_main: &dyn Fn() -> bool) -> Option<Instant>;

    /// Reports that a stop has made progress, with the number of connections that are left.
    fn progress(&self, left: usize);

    /// Extends the timeout of the current start, reload or stop.
    #[cfg(all(feature = "tokio_ecdysis", feature = "systemd_notify"))]
    fn extend_timeout(&self, time: Duration) -> std::io::Result<()>;

    /// Returns the manager's store, if it has room for sockets.
    fn store(self: Arc<Self>) -> Option<Arc<dyn Store>>;
}

/// Keeps sockets open after the end of this process, and passes them to the next start of the service.
///
/// # Contract
///
/// - No method blocks, as above, and only [`keep_passed`](Self::keep_passed) fails.
/// - The store keeps one copy for each key and file. Storing it again has no effect.
/// - Only the main process may use it.
pub(crate) trait Store: fmt::Debug + Send + Sync {
    /// Returns the capacity in sockets. Further ones are dropped without an error.
    fn capacity(&self) -> usize;

    /// Stores a copy of `fd`. `file` identifies the file of a Unix socket.
    fn keep(&self, key: &Key, fd: BorrowedFd<'_>, file: Option<FileId>);

    /// Closes the stored copies of this key and file.
    fn forget(&self, key: &Key, file: Option<FileId>);

    /// Stores the state that was passed, under names of this stop: the text of a manifest, and its descriptors in
    /// order. The first `early` of those can be taken before `ready`; the others belong to the commit.
    ///
    /// # Errors
    /// Something could not be stored, so the next start uses nothing of it.
    fn keep_passed(&self, descriptors: Vec<Arc<OwnedFd>>, early: usize) -> io::Result<()>;

    /// Closes the stored copies that an earlier stop has stored under this name.
    fn forget_passed(&self, name: &str);
}
