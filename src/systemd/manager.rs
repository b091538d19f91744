//! systemd as the service manager: the message for each event, and when it is sent.

use std::env;
use std::io;
use std::iter;
#[cfg(feature = "systemd_sockets")]
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
#[cfg(feature = "systemd_sockets")]
use std::time::{SystemTime, UNIX_EPOCH};

use super::notify::{Notifier, NotifyError};
#[cfg(feature = "systemd_sockets")]
use super::stored::Piece;
use super::watchdog::watchdog_interval;
use crate::error::Error;
use crate::event::Event;
use crate::exit::{Exit, ExitMode, Upgraded};
use crate::logging;
use crate::manager::{Child, ServiceManager, Store, ANNOUNCE};
use crate::sys::poll::Deadline;
use crate::sys::program;
#[cfg(feature = "systemd_sockets")]
use crate::{key::Key, listen::FileId};

/// By how much a stop extends its timeout when it makes progress, and the minimum time between two extensions.
const PROGRESS: Duration = Duration::from_secs(10);
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);

/// The service manager that started this service.
#[derive(Debug)]
pub(crate) struct Systemd {
    notifier: Notifier,
    generation: u64,
    /// Whether the manager started this process itself.
    started_by_it: bool,
    /// Whether this is a nested service, see [`is_nested`].
    nested: bool,
    /// Whether the manager accepts messages of this process.
    main: AtomicBool,
    /// Whether the manager accepts messages of the successor that this process has announced.
    handed_over: AtomicBool,
    /// The longest time that an upgrade may take. The manager's timeout is extended to it.
    upgrade_time: Duration,
    /// Whether `RELOADING` was sent and `READY` was not sent yet.
    reloading: AtomicBool,
    watchdog: Option<Duration>,
    next_tick: Mutex<Instant>,
    last_progress: Mutex<Option<Instant>>,
    /// The number of descriptors that the manager can store.
    #[cfg(feature = "systemd_sockets")]
    capacity: usize,
}

/// The variable that names the process that systemd executed for the unit. In a child of a nested generation it is 0.
pub(crate) const EXEC_PID: &str = "SYSTEMD_EXEC_PID";

fn number(name: &str) -> Option<u32> {
    env::var(name).ok()?.parse().ok()
}

/// Whether this service runs inside a unit with another main process, as a helper that inherited NOTIFY_SOCKET, or in a
/// container. Its generations are not the manager's children, and none of them is ever announced as the main process.
/// Otherwise the manager would end the unit with it, or kill an unrelated process, because a PID means another process
/// in another PID namespace.
pub(crate) fn is_nested(is_child: bool) -> bool {
    match number(EXEC_PID) {
        // The first process of a PID namespace has another PID outside.
        _ if std::process::id() == 1 => true,
        executed if is_child => executed == Some(0),
        Some(executed) => executed != std::process::id(),
        // This is not systemd. It has the same PIDs if there is only one namespace.
        None => !program::in_first_pid_namespace(),
    }
}

impl Systemd {
    /// Returns the manager that the environment names, if any. A child waits until it is announced. A generation that
    /// the manager started itself is the main process from the start, wherever its sockets came from.
    pub(crate) fn from_env(generation: u64, is_child: bool, upgrade_time: Duration) -> Result<Option<Self>, Error> {
        let notifier = Notifier::from_env().map_err(|e| match e {
            NotifyError::Address { address, source } => {
                Error::ServiceManager { what: format!("NOTIFY_SOCKET={}", address.to_string_lossy()), source }
            }
            other => Error::ServiceManager { what: "its socket".into(), source: io::Error::other(other) },
        })?;
        let started_by_it = !is_child || number(EXEC_PID) == Some(std::process::id());
        Ok(notifier.map(|notifier| Self {
            notifier,
            generation,
            started_by_it,
            nested: is_nested(is_child),
            main: AtomicBool::new(started_by_it),
            handed_over: AtomicBool::new(false),
            upgrade_time: upgrade_time.saturating_add(ANNOUNCE),
            reloading: AtomicBool::new(false),
            watchdog: watchdog_interval(),
            next_tick: Mutex::new(Instant::now()),
            last_progress: Mutex::default(),
            #[cfg(feature = "systemd_sockets")]
            capacity: number("FDSTORE").unwrap_or(0) as usize,
        }))
    }

    fn begin_reload(&self) -> Result<(), NotifyError> {
        self.reloading.store(true, Ordering::Relaxed);
        self.notifier.reloading(&format!("generation {}, upgrading", self.generation), self.upgrade_time)
    }

    /// `READY` ends a reload only after `RELOADING`, so send that first if the upgrade was refused before it began.
    fn end_reload(&self, errno: i32, outcome: &str) -> Result<(), NotifyError> {
        if !self.reloading.load(Ordering::Relaxed) {
            self.begin_reload()?;
        }
        self.reloading.store(false, Ordering::Relaxed);
        self.notifier.reloaded(errno, &format!("generation {}, {outcome}", self.generation))
    }
}

impl ServiceManager for Systemd {
    fn is_main(&self) -> bool {
        self.main.load(Ordering::Relaxed)
    }

    fn is_parent(&self) -> bool {
        self.is_main() && !self.nested
    }

    fn become_main(&self, announced: bool) {
        self.main.store(true, Ordering::Relaxed);
        self.handed_over.store(false, Ordering::Relaxed);
        if !announced && !self.nested {
            let status = format!("generation {}, serving without its parent", self.generation);
            log_failure(self.notifier.announce(std::process::id(), program::own_pidfd_id(), &status));
        }
    }

    fn on_event(&self, event: &Event<'_>) {
        let Self { notifier, generation, .. } = self;
        log_failure(match event {
            // The parent that announced this process has reported it as ready.
            Event::Serving { .. } if !self.started_by_it => Ok(()),
            // Send the PID, like version 1.1.1, if the manager has the same number for this process.
            Event::Serving { .. } if !self.nested => {
                notifier.ready_as(std::process::id(), &format!("generation {generation}"))
            }
            Event::Serving { .. } => notifier.ready(&format!("generation {generation}")),
            Event::Upgrading => self.begin_reload(),
            Event::Spawned { pid } => notifier.status(&format!("generation {generation}, upgrading to pid {pid}")),
            Event::Committed(Upgraded { pid, generation: next, .. }) => {
                notifier.status(&format!("generation {generation}; generation {next}, pid {pid}, is on probation"))
            }
            Event::UpgradeFailed { error, .. } => self.end_reload(errno(error), &format!("upgrade failed: {error}")),
            Event::Ended(Exit { mode: ExitMode::Stopped, reason }) => {
                notifier.stopping(&format!("generation {generation}, stopped by {reason}"))
            }
            Event::Ended(Exit { mode: ExitMode::PartiallyStopped, reason }) => {
                notifier.status(&format!("generation {generation}, partially stopped by {reason}"))
            }
            // By then the child is the main process.
            Event::Upgraded(_) | Event::Ended(Exit { mode: ExitMode::Upgraded(_), .. }) => Ok(()),
        });
    }

    fn announce(&self, Upgraded { pid, generation, .. }: &Upgraded, child: Option<Child>) -> bool {
        let (Self { notifier, generation: ours, .. }, until) = (self, Deadline::after(ANNOUNCE));
        let sent = match child {
            None => notifier.stopping(&format!("generation {ours}, taken over by pid {pid}, generation {generation}")),
            Some(_) if self.nested => notifier.reloaded(0, &format!("generation {generation}, upgraded")),
            Some(Child { id }) => {
                let status = format!("generation {generation}, upgraded from pid {}", std::process::id());
                notifier.announce(*pid, id, &status)
            }
        };
        let is_sent = sent.is_ok();
        self.handed_over.store(is_sent && child.is_some() && !self.nested, Ordering::Relaxed);
        // The manager finds no unit for a message of a process that it did not start and that has already ended. So a
        // nested service waits too.
        let handled = || if child.is_some() { notifier.barrier(until.time_left()) } else { Ok(()) };
        log_failure(sent.and_then(|()| handled()));
        is_sent
    }

    fn watchdog_tick(&self, is_main: &dyn Fn() -> bool) -> Option<Instant> {
        let every = self.watchdog? / 2;
        let mut next = self.next_tick.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if *next <= now {
            // WATCHDOG_USEC may be any number, so the sum may overflow.
            *next = now.checked_add(every)?;
            if !self.handed_over.load(Ordering::Relaxed) && is_main() {
                log_failure(self.notifier.alive());
            }
        }
        Some(*next)
    }

    fn progress(&self, left: usize) {
        if !self.is_main() || self.handed_over.load(Ordering::Relaxed) {
            return;
        }
        let mut last = self.last_progress.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < PROGRESS_PAUSE) {
            return;
        }
        *last = Some(Instant::now());
        log_failure(self.notifier.extend_timeout(PROGRESS));
        log_failure(
            self.notifier.status(&format!("generation {}, stopping, {left} connections left", self.generation)),
        );
    }

    #[cfg(feature = "tokio_ecdysis")]
    fn extend_timeout(&self, time: Duration) -> io::Result<()> {
        self.notifier.extend_timeout(time).map_err(io::Error::other)
    }

    fn store(self: Arc<Self>) -> Option<Arc<dyn Store>> {
        #[cfg(feature = "systemd_sockets")]
        if self.capacity > 0 {
            return Some(self);
        }
        None
    }
}

#[cfg(feature = "systemd_sockets")]
impl Store for Systemd {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn keep(&self, key: &Key, fd: BorrowedFd<'_>, file: Option<FileId>) {
        match super::stored::name(key, file) {
            Some(name) => log_failure(self.notifier.store(&name, fd)),
            None => logging::debug!("the service manager cannot store {key}: its name is too long"),
        }
    }

    fn keep_passed(&self, descriptors: Vec<Arc<OwnedFd>>, early: usize) -> io::Result<()> {
        let stop = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let until = Deadline::after(ANNOUNCE);
        // Store the text last, because without it nothing is used.
        for (index, fd) in descriptors.iter().enumerate().rev() {
            self.notifier.store_by(until, &Piece { stop, index, early }.name(), fd).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn forget_passed(&self, name: &str) {
        log_failure(self.notifier.forget(name));
    }

    fn forget(&self, key: &Key, file: Option<FileId>) {
        if let Some(name) = super::stored::name(key, file) {
            log_failure(self.notifier.forget(&name));
        }
    }
}

/// Returns the errno behind an error. Without one, ECANCELED reports at least that something failed.
fn errno(error: &Error) -> i32 {
    let causes = iter::successors(error.parts().1, |&cause| cause.source());
    let mut numbers = causes.filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    numbers.next().unwrap_or(match error {
        Error::Timeout { .. } => libc::ETIMEDOUT,
        _ => libc::ECANCELED,
    })
}

/// Logs a failure and otherwise ignores it.
fn log_failure(result: Result<(), NotifyError>) {
    let Err(error) = result else { return };
    match std::error::Error::source(&error) {
        Some(source) => logging::warn!("{error}: {source}"),
        None => logging::warn!("{error}"),
    }
}
