//! The one poll of a generation: triggers, the watchdog, and whatever the caller waits for.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::PollFlags;

use crate::error::Error;
use crate::generation::Generation;
use crate::handover::held_open::held_open;
use crate::logging;
use crate::sys::child::reap_late;
use crate::sys::poll::Deadline;
use crate::triggers::request::{Action, Reply, Request};
use crate::triggers::Triggers;

/// A thread's turn at the triggers.
pub(crate) struct EventLoop<'a> {
    pub(crate) generation: &'a Generation,
    pub(crate) triggers: &'a mut Triggers,
}

/// What this generation is doing, which decides how it answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    /// A child starts.
    Upgrading,
    /// The child serves. The control sockets are the child's to answer.
    Probation,
    /// The service is over; only a stop is waited for.
    Over,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// A descriptor is ready; or, while serving, there is a request or a message of the parent.
    Ready,
    Deadline,
    /// A stop was requested. It stays in the queue.
    Stop,
}

impl EventLoop<'_> {
    /// Waits until one of `fds` is ready, the deadline has passed or there is a request to act on. Answers `status`,
    /// refuses an upgrade during another one, and keeps one that must wait.
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
            let again = self.answer(phase);
            let kept = self.keeps_upgrades(phase);
            if self.triggers.stop_requested() {
                return Ok(Wake::Stop);
            }
            let news = phase == Phase::Serving && self.generation.ancestors.has_news();
            if ready || news || self.triggers.has_request(|action| action == Action::Rollback || !kept) {
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

    /// While this process is on probation itself it keeps requests for an upgrade.
    fn keeps_upgrades(&self, phase: Phase) -> bool {
        phase == Phase::Serving && self.generation.ancestors.on_probation()
    }

    /// Answers what can be answered at once. Returns when to call this again.
    fn answer(&mut self, phase: Phase) -> Deadline {
        let kept = self.keeps_upgrades(phase);
        let name = match phase {
            Phase::Serving if !kept => "serving",
            Phase::Upgrading => "upgrading",
            Phase::Serving | Phase::Probation => "probation",
            Phase::Over => {
                self.triggers.answer_over();
                return Deadline::NEVER;
            }
        };
        while let Some(request) = self.triggers.take_request(|action| action == Action::Status) {
            request.reply.status(&self.generation.status(name));
        }
        if matches!(phase, Phase::Upgrading | Phase::Probation) {
            while let Some(request) = self.triggers.take_request(|action| action == Action::Rollback) {
                request.reply.status("failed: not on probation\n");
            }
        }
        match phase {
            Phase::Serving if kept => return self.triggers.keep_upgrades(self.generation.limits.ready_timeout),
            Phase::Upgrading | Phase::Probation => self.refuse_upgrades(phase),
            Phase::Serving | Phase::Over => {}
        }
        Deadline::NEVER
    }

    /// Refuses an upgrade during another one. A signal during the probation stays in the queue: it is for the child.
    fn refuse_upgrades(&mut self, phase: Phase) {
        let refused = |request: &Request| {
            let answered = !matches!(request.reply, Reply::Nobody);
            request.action == Action::Upgrade && (answered || phase == Phase::Upgrading)
        };
        while let Some(request) = self.triggers.take(refused) {
            logging::info!("refused an upgrade requested by {}: busy", request.reason);
            self.generation.reporter.asked_again();
            request.reply.upgrade(Err(Error::Busy));
        }
    }
}
