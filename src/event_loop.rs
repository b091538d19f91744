//! The one poll of a generation: triggers, the watchdog, and whatever the caller waits for.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::PollFlags;

use crate::error::Error;
use crate::generation::Generation;
use crate::handover::held_open::held_open;
use crate::sys::child::reap_late;
use crate::sys::poll::Deadline;
use crate::triggers::request::Action;
use crate::triggers::Triggers;

/// One thread's use of the triggers.
pub(crate) struct EventLoop<'a> {
    pub(crate) generation: &'a Generation,
    pub(crate) triggers: &'a mut Triggers,
}

/// The phase of this generation, which decides how it answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    /// A child starts.
    Upgrading,
    /// The child serves, and answers the control sockets.
    Probation,
    /// The service is over. The loop waits only for a stop.
    Over,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// A descriptor is ready. While serving, also: there is a request or a message of the parent.
    Ready,
    Deadline,
    /// A stop was requested. It stays in the queue.
    Stop,
}

impl EventLoop<'_> {
    /// Waits until one of `fds` is ready, the deadline has passed or there is a request to act on. Answers `status`,
    /// and queues or refuses an upgrade that is requested during another one.
    ///
    /// # Errors
    ///
    /// [`Error::Wait`] if poll(2) fails.
    pub(crate) fn wait(
        &mut self,
        phase: Phase,
        fds: &[(BorrowedFd<'_>, PollFlags)],
        deadline: Deadline,
    ) -> Result<Wake, Error> {
        let (mut polled, mut ready) = (false, false);
        loop {
            let on_probation = phase == Phase::Serving && self.generation.ancestors.on_probation();
            let again = self.answer(phase, on_probation);
            if self.triggers.has_request(Action::stops) {
                return Ok(Wake::Stop);
            }
            // A rollback that was requested while the child starts is forwarded after the commit.
            let keeps = on_probation || phase == Phase::Upgrading;
            let news = phase == Phase::Serving && self.generation.ancestors.has_news();
            if ready || news || self.triggers.has_request(|action| action == Action::Rollback || !keeps) {
                return Ok(Wake::Ready);
            }
            if polled && deadline.has_passed() {
                return Ok(Wake::Deadline);
            }
            let tick = self.generation.reporter.watchdog_tick().map_or(Deadline::NEVER, Deadline::at);
            let accept = matches!(phase, Phase::Serving | Phase::Upgrading);
            let held = held_open();
            let ends = held.iter().map(|fd| (fd.as_fd(), PollFlags::empty()));
            let fds: Vec<_> = fds.iter().copied().chain(ends).collect();
            ready = self.triggers.poll(&fds, deadline.min(tick).min(again).min(reap_late()), accept)?;
            polled = true;
        }
    }

    /// Answers requests that can be answered immediately. Returns when to call this again.
    fn answer(&mut self, phase: Phase, on_probation: bool) -> Deadline {
        // How long an upgrade may wait for this phase to end.
        let (name, time) = match phase {
            Phase::Serving if !on_probation => ("serving", None),
            Phase::Serving => ("probation", Some(self.generation.options.ready_timeout)),
            Phase::Upgrading => ("upgrading", Some(Duration::ZERO)),
            Phase::Probation => ("probation", Some(Duration::ZERO)),
            Phase::Over => {
                self.triggers.answer_over();
                return Deadline::NEVER;
            }
        };
        while let Some(request) = self.triggers.take_request(|action| action == Action::Status) {
            request.reply.status(&self.generation.status(name));
        }
        let is_refused = |action| action == Action::Rollback && phase != Phase::Serving;
        while let Some(request) = self.triggers.take_request(is_refused) {
            request.reply.status("failed: not on probation\n");
        }
        time.map_or(Deadline::NEVER, |time| self.triggers.keep_upgrades(time))
    }
}
