//! What the service manager hears of this generation's life, and when.
//!
//! It listens to the main process alone (`NotifyAccess=main`). That is the one that it started itself, and later each
//! one that the one before has announced: so a parent announces, and a child is silent until then.

use std::env;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::chain;
use crate::event::Event;
use crate::listen::FileId;
use crate::systemd::{watchdog_interval, Notifier, NotifyError};
use crate::{Error, Exit, ExitMode, Key, Upgraded};

/// How long the manager may take to make a child the main process. It does that at once, unless it hangs.
pub(crate) const ANNOUNCE: Duration = Duration::from_secs(5);

/// How much time a stop asks for whenever it made progress, and how often at most it asks.
const PROGRESS: Duration = Duration::from_secs(10);
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);

/// The service manager, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Manager(Option<Link>);

#[derive(Debug)]
struct Link {
    notifier: Notifier,
    generation: u64,
    /// The manager has started this process itself.
    started_by_it: bool,
    /// The manager listens to us.
    main: AtomicBool,
    /// What an upgrade may take at most, so that the manager does not give up before us.
    upgrade_time: Duration,
    /// `RELOADING` was sent, and `READY` not yet.
    reloading: AtomicBool,
    watchdog: Option<Duration>,
    next_beat: Mutex<Instant>,
    last_progress: Mutex<Option<Instant>>,
    /// How many descriptors the manager stores.
    room: usize,
}

impl Manager {
    /// The manager that the environment names. A child of ours waits to be announced; but a generation that the
    /// manager started itself is main, wherever it got its sockets from.
    pub(crate) fn from_env(generation: u64, is_child: bool, upgrade_time: Duration) -> Result<Self, Error> {
        let notifier = Notifier::from_env().map_err(|e| match e {
            NotifyError::Address { address, source } => {
                Error::ServiceManager { what: format!("NOTIFY_SOCKET={}", address.to_string_lossy()), source }
            }
            other => Error::ServiceManager { what: "its socket".into(), source: std::io::Error::other(other) },
        })?;
        let number = |name| env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
        let started_by_it = !is_child || number("SYSTEMD_EXEC_PID") == Some(std::process::id());
        Ok(Self(notifier.map(|notifier| Link {
            notifier,
            generation,
            started_by_it,
            main: AtomicBool::new(started_by_it),
            upgrade_time: upgrade_time.saturating_add(ANNOUNCE),
            reloading: AtomicBool::new(false),
            watchdog: watchdog_interval(),
            next_beat: Mutex::new(Instant::now()),
            last_progress: Mutex::default(),
            room: number("FDSTORE").unwrap_or(0) as usize,
        })))
    }

    pub(crate) fn is_there(&self) -> bool {
        self.0.is_some()
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn notifier(&self) -> Option<&Notifier> {
        self.0.as_ref().map(|link| &link.notifier)
    }

    pub(crate) fn is_main(&self) -> bool {
        self.0.as_ref().is_some_and(|link| link.main.load(Ordering::Relaxed))
    }

    /// The parent has announced us; or it is gone and cannot, so we do that ourselves, for a manager that listens to
    /// all (`NotifyAccess=all`).
    pub(crate) fn become_main(&self, announced: bool) {
        let Some(link) = &self.0 else { return };
        link.main.store(true, Ordering::Relaxed);
        if !announced {
            let status = format!("generation {}, serving without its parent", link.generation);
            told(link.notifier.new_main(std::process::id(), &status));
        }
    }

    /// Tells what has happened. To be called in the main process only. Nothing that goes wrong here is a reason to
    /// serve any worse.
    pub(crate) fn hear(&self, event: &Event<'_>) {
        let Some(link) = &self.0 else { return };
        let Link { notifier, generation, .. } = link;
        told(match event {
            // Whoever announced us has said so already.
            Event::Serving { .. } if !link.started_by_it => Ok(()),
            Event::Serving { .. } => notifier.ready(&format!("generation {generation}")),
            Event::Upgrading => link.begin_reload(),
            Event::Spawned { pid } => notifier.status(&format!("generation {generation}, upgrading to pid {pid}")),
            Event::Committed(Upgraded { pid, generation: next, .. }) => {
                notifier.status(&format!("generation {generation}; generation {next}, pid {pid}, is on probation"))
            }
            Event::UpgradeFailed { error, .. } => link.end_reload(&format!("upgrade failed: {}", chain(error))),
            Event::Ended(Exit { mode: ExitMode::Stopped, reason }) => {
                notifier.stopping(&format!("generation {generation}, stopped by {reason}"))
            }
            Event::Ended(Exit { mode: ExitMode::PartiallyStopped, reason }) => {
                notifier.status(&format!("generation {generation}, partially stopped by {reason}"))
            }
            // By then the child is the one that is heard.
            Event::Upgraded(_) | Event::Ended(Exit { mode: ExitMode::Upgraded(_), .. }) => Ok(()),
        });
    }

    /// Makes the child the main process, and returns when the manager knows: whoever ends before that takes the
    /// service along. If somebody else's process took over, this service ends.
    pub(crate) fn announce(&self, Upgraded { pid, generation, .. }: &Upgraded, is_child: bool) {
        let Some(Link { notifier, generation: ours, .. }) = &self.0 else { return };
        if is_child {
            let status = format!("generation {generation}, upgraded from pid {}", std::process::id());
            told(notifier.new_main(*pid, &status).and_then(|()| notifier.barrier(ANNOUNCE)));
        } else {
            told(notifier.stopping(&format!("generation {ours}, taken over by pid {pid}, generation {generation}")));
        }
    }

    /// An upgrade was asked for while one is under way. If it was the manager that asked, it waits for word of an
    /// upgrade that began after that, so this is said to be one.
    pub(crate) fn asked_again(&self) {
        if let Some(link) = self.0.as_ref().filter(|link| link.main.load(Ordering::Relaxed)) {
            told(link.begin_reload());
        }
    }

    /// Sends a sign of life if one is due, and says when the next will be.
    pub(crate) fn beat(&self, is_main: impl FnOnce() -> bool) -> Option<Instant> {
        let link = self.0.as_ref()?;
        let every = link.watchdog? / 2;
        let mut next = link.next_beat.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if *next <= now {
            *next = now + every;
            if is_main() {
                told(link.notifier.alive());
            }
        }
        Some(*next)
    }

    /// A stop goes on, and something of it was finished just now: it may take longer.
    pub(crate) fn progress(&self, left: usize) {
        let Some(link) = self.0.as_ref().filter(|link| link.main.load(Ordering::Relaxed)) else { return };
        let mut last = link.last_progress.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < PROGRESS_PAUSE) {
            return;
        }
        *last = Some(Instant::now());
        told(link.notifier.extend_timeout(PROGRESS));
        told(link.notifier.status(&format!("generation {}, stopping, {left} connections left", link.generation)));
    }

    /// How many sockets given to `keep` outlive this process.
    pub(crate) fn room(&self) -> usize {
        self.0.as_ref().map_or(0, |link| link.room)
    }

    /// Stores a copy of a socket with the manager.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn keep(&self, key: &Key, fd: BorrowedFd<'_>, file: Option<FileId>) {
        let Some(Link { notifier, .. }) = &self.0 else { return };
        match crate::systemd::stored::name(key, file) {
            Some(name) => told(notifier.store(&name, fd)),
            None => log::debug!("{key} cannot be stored with the service manager"),
        }
    }

    /// Has the manager close its copies.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn forget(&self, key: &Key, file: Option<FileId>) {
        let Some(Link { notifier, .. }) = &self.0 else { return };
        if let Some(name) = crate::systemd::stored::name(key, file) {
            told(notifier.forget(&name));
        }
    }

    #[cfg(not(feature = "systemd_sockets"))]
    pub(crate) fn keep(&self, _: &Key, _: BorrowedFd<'_>, _: Option<FileId>) {}

    #[cfg(not(feature = "systemd_sockets"))]
    pub(crate) fn forget(&self, _: &Key, _: Option<FileId>) {}
}

impl Link {
    fn begin_reload(&self) -> Result<(), NotifyError> {
        self.reloading.store(true, Ordering::Relaxed);
        self.notifier.reloading(&format!("generation {}, upgrading", self.generation), self.upgrade_time)
    }

    /// `READY` ends a reload only after `RELOADING`, and an upgrade may be refused before it begins.
    fn end_reload(&self, outcome: &str) -> Result<(), NotifyError> {
        if !self.reloading.load(Ordering::Relaxed) {
            self.begin_reload()?;
        }
        self.reloading.store(false, Ordering::Relaxed);
        self.notifier.ready(&format!("generation {}, {outcome}", self.generation))
    }
}

fn told(result: Result<(), NotifyError>) {
    let Err(error) = result else { return };
    match std::error::Error::source(&error) {
        Some(source) => log::warn!("{error}: {source}"),
        None => log::warn!("{error}"),
    }
}
