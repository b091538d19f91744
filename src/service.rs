//! What all handles of a generation share, and the loop that does what the triggers ask for.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use rustix::event::PollFlags;

use crate::builder::{Config, Overlap};
use crate::error::{chain, Error};
use crate::event::Event;
use crate::exit::{Exit, ExitMode, ExitReason, Upgraded};
use crate::handover::ancestors::{Ancestors, Announced, ParentLink};
use crate::handover::escape::escape;
use crate::handover::lines::{send, FromChild, FromParent};
use crate::manager::{Manager, ANNOUNCE};
use crate::pid_file;
use crate::program::Program;
use crate::shutdown::{Shutdown, State};
use crate::sockets::Sockets;
use crate::sys::attributes::Attributes;
use crate::sys::poll::Deadline;
use crate::trigger::{self, Action, Calls, Reply, Request, Triggers};
use crate::upgrade;

/// What all handles of a generation share.
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) program: Program,
    /// What this process started with, and every child will.
    pub(crate) attributes: Attributes,
    pub(crate) generation: u64,
    pub(crate) began: Instant,
    pub(crate) sockets: Sockets,
    pub(crate) shutdown: Shutdown,
    /// Empty if there is none, or nobody asked for it.
    pub(crate) manager: OnceLock<Arc<Manager>>,
    /// What the manager passed is taken, so it may store what it is to pass.
    pub(crate) takes_sockets: AtomicBool,
    pub(crate) ancestors: Ancestors,
    pub(crate) calls: Arc<Calls>,
    pub(crate) pid_file: Mutex<Option<PathBuf>>,
    pub(crate) driver: Mutex<Driver>,
    /// The triggers are free again, or a call has its answer.
    pub(crate) changed: Condvar,
    /// Open until this process ends.
    pub(crate) kept: Mutex<Kept>,
    pub(crate) _started: Started,
}

/// Who waits on the triggers, and what came of it.
pub(crate) struct Driver {
    /// `None` while some thread has them.
    pub(crate) triggers: Option<Triggers>,
    pub(crate) exit: Option<Exit>,
    /// What has asked this process to stop although it was replaced.
    pub(crate) stop: Option<ExitReason>,
}

/// What stays open until this process ends, because others wait for that.
#[derive(Default)]
pub(crate) struct Kept {
    /// The link to the child that took over.
    pub(crate) link: Option<Arc<OwnedFd>>,
    /// Control connections that asked for a stop.
    stopping: Vec<UnixStream>,
}

impl Core {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn manager(&self) -> Arc<Manager> {
        self.manager.get().cloned().unwrap_or_default()
    }

    /// Logs an event and tells the observer.
    pub(crate) fn emit(&self, event: &Event<'_>) {
        event.log();
        if self.is_main() {
            self.manager().hear(event);
        }
        if let Some(observer) = &self.config.observer {
            // In the middle of an upgrade a panic would leave a service that is neither here nor there.
            if panic::catch_unwind(AssertUnwindSafe(|| observer(event))).is_err() {
                log::error!("the observer panicked at {event:?}");
            }
        }
    }

    /// Whether the service manager listens to this process, as it does to a child once the parent has announced it.
    pub(crate) fn is_main(&self) -> bool {
        if !self.manager().is_there() || self.manager().is_main() {
            return self.manager().is_there();
        }
        match self.ancestors.parent.as_ref().map(ParentLink::announced) {
            Some(Announced::Yes) => self.manager().become_main(true),
            Some(Announced::Never) => self.manager().become_main(false),
            Some(Announced::NotYet) | None => return false,
        }
        self.store_sockets();
        true
    }

    pub(crate) fn store_sockets(&self) {
        if self.takes_sockets.load(Ordering::Relaxed) && self.manager().room() > 0 {
            self.sockets.registry().store_in(self.manager());
        }
    }

    /// Tells the service manager who serves now, before we may end. Our child becomes the main process of the service; a
    /// process that took over belongs to another unit or to none, so for this one it is the end.
    pub(crate) fn announce(&self, upgraded: &Upgraded, is_child: bool, link: &OwnedFd) {
        if !self.manager().is_there() {
            return;
        }
        // We may be a child whose own parent is about to announce it.
        if let Some(parent) = self.ancestors.parent.as_ref().filter(|_| !self.manager().is_main()) {
            parent.wait_announced(ANNOUNCE);
        }
        if self.is_main() {
            self.manager().announce(upgraded, is_child);
        }
        if is_child {
            // It may have ended since, on purpose.
            let _ = send(link, FromParent::Main.line());
        }
    }

    /// Keeps the service manager's watchdog content, and says when that has to be done again.
    pub(crate) fn beat(&self) -> Option<Instant> {
        self.manager().beat(|| self.is_main())
    }

    fn pid_file(&self) -> Option<PathBuf> {
        self.pid_file.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn write_pid_file(&self) -> Result<(), Error> {
        match self.pid_file() {
            Some(path) => pid_file::write(&path).map_err(|source| Error::PidFile { path, source }),
            None => Ok(()),
        }
    }

    /// After a failed upgrade, whose child may have written its own PID.
    pub(crate) fn rewrite_pid_file(&self) {
        if let Err(e) = self.write_pid_file() {
            log::error!("{}", chain(&e));
        }
    }

    /// The answer to `status`.
    pub(crate) fn status(&self, phase: &str) -> String {
        let draining: Vec<_> = self.ancestors.draining().map(|link| link.generation.to_string()).collect();
        let mut line = format!(
            "pid={} generation={} uptime_ms={} phase={phase} connections={} draining={}",
            std::process::id(),
            self.generation,
            self.began.elapsed().as_millis(),
            self.shutdown.guarded(),
            draining.join(","),
        );
        for key in self.sockets.registry().keys() {
            line.push_str(" socket=");
            escape(key.to_string().as_bytes(), &mut line);
        }
        line.push('\n');
        line
    }

    /// After a successful upgrade: ends the drains that are too many.
    fn bound_overlap(&self) {
        let Overlap::AtMost(most) = self.config.overlap else { return };
        let draining: Vec<_> = self.ancestors.draining().collect();
        let too_many = (draining.len() + 1).saturating_sub(most);
        for link in draining.iter().take(too_many) {
            log::info!("tells generation {} to end its drain", link.generation);
            link.end_drain();
        }
        if too_many > draining.len() {
            self.shutdown.end_drain();
        }
    }
}

/// A thread's turn at the triggers. It gives them back however it ends.
pub(crate) struct Turn<'a> {
    pub(crate) core: &'a Core,
    pub(crate) triggers: Option<Triggers>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.core.lock().triggers = self.triggers.take();
        self.core.changed.notify_all();
    }
}

impl Turn<'_> {
    /// Waits for requests, or does what the first of them asks for. True if the service is over.
    pub(crate) fn serve(&mut self) -> Result<bool, Error> {
        let core = self.core;
        let Some(triggers) = &mut self.triggers else { return Ok(true) };
        let Some(Request { action, reason, since, reply }) = triggers.next_request() else {
            let parent = core.ancestors.parent.as_ref().filter(|parent| !parent.has_ended());
            let fds: Vec<_> = parent.iter().map(|parent| (parent.reader.as_fd(), PollFlags::IN)).collect();
            triggers.wait(core, &fds, Deadline::NEVER, trigger::Sockets::Answer)?;
            // The announcement is among what the parent may have said.
            core.is_main();
            // In the probation the parent is still the one that is asked to stop.
            if parent.and_then(ParentLink::next_message) == Some(FromParent::Stop) {
                let (reason, since) = (ExitReason::Parent, Instant::now());
                triggers.requests.push_back(Request { action: Action::Stop, reason, since, reply: Reply::Nobody });
            }
            return Ok(false);
        };
        let (mode, state) = match action {
            Action::Stop => {
                core.ancestors.send_to_parent(&FromChild::Stopping);
                core.sockets.registry().unlink(|_| true);
                if let Some(Err(e)) = core.pid_file().as_deref().map(pid_file::remove_if_ours) {
                    log::warn!("cannot remove the PID file: {e}");
                }
                core.kept().stopping.extend(reply.stopping());
                (ExitMode::Stopped, State::Stopped)
            }
            Action::PartialStop => {
                core.ancestors.send_to_parent(&FromChild::Stopping);
                core.sockets.registry().unlink(|key| triggers.listens_on(key));
                core.kept().stopping.extend(reply.stopping());
                (ExitMode::PartiallyStopped, State::Stopped)
            }
            Action::Status => {
                reply.status(&core.status("serving"));
                return Ok(false);
            }
            Action::Upgrade => {
                let refused = core.config.overlap == Overlap::Refuse && core.ancestors.draining().next().is_some();
                let outcome = if refused {
                    Err(Error::ParentDrains)
                } else {
                    upgrade::upgrade(core, reply.taker(), triggers, since)
                };
                let upgraded = outcome.as_ref().ok().cloned();
                match &outcome {
                    Ok(upgraded) => {
                        core.bound_overlap();
                        core.emit(&Event::Upgraded(upgraded));
                    }
                    Err(error) => core.emit(&Event::UpgradeFailed { error, after: since.elapsed() }),
                }
                reply.upgrade(outcome);
                core.changed.notify_all();
                match upgraded {
                    Some(upgraded) => (ExitMode::Upgraded(upgraded), State::HandedOver),
                    None => return Ok(false),
                }
            }
        };
        core.sockets.registry().close_all();
        core.lock().stop = triggers.stop_reason();
        core.kept().stopping.extend(triggers.answer_over());
        triggers.close_sockets();
        let exit = Exit { mode, reason };
        core.emit(&Event::Ended(&exit));
        // Last: a program that waits for the shutdown handle may end the process at once, and by then whoever is to
        // hear of this has heard. After an upgrade nothing is accepted meanwhile: it is paused since the commit.
        core.shutdown.set(state);
        core.lock().exit = Some(exit);
        core.changed.notify_all();
        Ok(true)
    }

    /// After the service is over: waits until this process is asked to stop.
    pub(crate) fn wait_for_stop(&mut self) -> Result<ExitReason, Error> {
        let core = self.core;
        let Some(triggers) = &mut self.triggers else { return Err(Error::Over) };
        loop {
            if let Some(reason) = triggers.stop_reason() {
                return Ok(reason);
            }
            triggers.answer_over();
            triggers.wait(core, &[], Deadline::NEVER, trigger::Sockets::Leave)?;
        }
    }
}

/// There is one start at a time in a process: signals are the process's, and so is the handover.
pub(crate) struct Started;

static STARTED: AtomicBool = AtomicBool::new(false);

impl Started {
    pub(crate) fn claim() -> Option<Self> {
        (!STARTED.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        STARTED.store(false, Ordering::Release);
    }
}
