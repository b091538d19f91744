//! A service: which thread leads the event loop, and the effect of each request.

mod probation;

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{mpsc, Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::PollFlags;

use crate::error::Error;
use crate::event::Event;
use crate::event_loop::{EventLoop, Phase};
use crate::exit::{Exit, ExitMode, ExitReason, Upgraded};
use crate::generation::Generation;
use crate::handover::lines::COMMIT;
use crate::logging;
use crate::shutdown::State;
use crate::started::Started;
use crate::stop_signal::StopSignal;
use crate::sys::poll::Deadline;
use crate::triggers::control::{TakeoverSocket, Trust};
use crate::triggers::request::{Action, Outcome, Reply, Request};
use crate::triggers::Triggers;
use crate::upgrade::parent::{upgrade, Paused};

/// The state that all handles of a generation share.
pub(crate) struct Service {
    pub(crate) generation: Generation,
    lead: Mutex<Lead>,
    /// Notified when a thread has stopped leading, or a call has its outcome.
    changed: Condvar,
    trust: Trust,
    _started: Option<Started>,
}

/// Which thread leads the event loop, and how the service ended.
pub(crate) struct Lead {
    /// `None` while a thread leads.
    pub(crate) triggers: Option<Triggers>,
    exit: Option<Exit>,
    /// The source of a stop request that came after this process was replaced.
    stop: Option<ExitReason>,
    /// A stop that waits for its delay, and when the delay began.
    delayed: Option<(Request, Instant)>,
}

impl Service {
    pub(crate) fn new(generation: Generation, triggers: Triggers, trust: Trust, started: Option<Started>) -> Self {
        Self {
            generation,
            lead: Mutex::new(Lead { triggers: Some(triggers), exit: None, stop: None, delayed: None }),
            changed: Condvar::new(),
            trust,
            _started: started,
        }
    }

    pub(crate) fn lead(&self) -> MutexGuard<'_, Lead> {
        self.lead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when `done` returns a value. Until then this thread leads, `turn` by `turn`, or waits while another
    /// thread leads.
    ///
    /// A leading thread does not stop leading while a stop is queued or delayed, so a caller of `stop` need not wait.
    fn lead_until<T>(
        &self,
        mut turn: impl FnMut(&mut EventLoop<'_>) -> Result<(), Error>,
        mut done: impl FnMut(&Lead) -> Option<T>,
    ) -> Result<T, Error> {
        /// Puts the triggers back when dropped, also by a panic.
        struct Turn<'a>(&'a Service, Option<Triggers>);
        impl Drop for Turn<'_> {
            fn drop(&mut self) {
                self.0.lead().triggers = self.1.take();
                self.0.changed.notify_all();
            }
        }

        let (mut lead, mut value) = (self.lead(), None);
        loop {
            value = value.or_else(|| done(&lead));
            let delayed = lead.delayed.is_some();
            let stop_queued = lead.exit.is_none()
                && lead.triggers.as_mut().is_some_and(|triggers| {
                    triggers.take_calls();
                    delayed || triggers.has_request(Action::stops)
                });
            if let Some(value) = value.take_if(|_| !stop_queued) {
                return Ok(value);
            }
            let Some(triggers) = lead.triggers.take() else {
                lead = self.changed.wait(lead).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(lead);
            let mut taken = Turn(self, Some(triggers));
            if let Some(triggers) = &mut taken.1 {
                turn(&mut EventLoop { generation: &self.generation, triggers })?;
            }
            drop(taken);
            lead = self.lead();
        }
    }

    pub(crate) fn run(&self) -> Result<Exit, Error> {
        self.check_ready()?;
        self.lead_until(|event_loop| self.serve(event_loop), |lead| lead.exit.clone())
    }

    /// Upgrades, or hands over, and waits for the verdict.
    pub(crate) fn upgrade(&self, reply: impl FnOnce(Outcome) -> Reply) -> Result<Upgraded, Error> {
        self.check_ready()?;
        let (outcome, outcomes) = mpsc::channel();
        self.generation.calls.post(Request::new(Action::Upgrade, ExitReason::Call, reply(outcome)));
        let upgraded = self.lead_until(
            |event_loop| self.serve(event_loop),
            |lead| outcomes.try_recv().ok().or_else(|| lead.exit.is_some().then_some(Err(Error::Over))),
        )??;
        self.generation.shutdown.wait();
        Ok(upgraded)
    }

    /// Hands over to the process that has connected to `socket` and requests it, if there is one.
    pub(crate) fn hand_over(&self, socket: &TakeoverSocket) -> Result<Option<Upgraded>, Error> {
        let Some(request) = socket.accept(&self.trust, self.generation.origin.app.as_deref())? else { return Ok(None) };
        self.upgrade(|outcome| Reply::Takeover(request, Some(outcome))).map(Some)
    }

    /// Requests a stop. If another thread leads, that thread performs it; otherwise this one does.
    pub(crate) fn stop(&self) {
        self.generation.calls.post(Request::new(Action::Stop, ExitReason::Call, Reply::Nobody));
        if self.check_ready().is_ok() {
            let led = |lead: &Lead| (lead.exit.is_some() || lead.triggers.is_none()).then_some(());
            if let Err(e) = self.lead_until(|event_loop| self.serve(event_loop), led) {
                logging::error!("cannot stop: {e}");
            }
        }
    }

    pub(crate) fn wait_for_stop(&self) -> Result<ExitReason, Error> {
        let exit = self.run()?;
        if !matches!(exit.mode, ExitMode::Upgraded(_)) {
            return Ok(exit.reason);
        }
        let wait = |event_loop: &mut EventLoop<'_>| {
            event_loop.wait(Phase::Over, &[], Deadline::NEVER)?;
            self.lead().stop = event_loop.triggers.stop_reason();
            Ok(())
        };
        self.lead_until(wait, |lead| lead.stop.clone())
    }

    fn check_ready(&self) -> Result<(), Error> {
        match self.generation.shutdown.state() {
            State::Starting => Err(Error::NotReady),
            _ => Ok(()),
        }
    }

    /// Carries out the next request, or waits for one.
    fn serve(&self, event_loop: &mut EventLoop<'_>) -> Result<(), Error> {
        let generation = &self.generation;
        // A stop takes precedence over an upgrade.
        let on_probation = generation.ancestors.on_probation();
        let next = event_loop.triggers.take_request(Action::stops);
        let next =
            next.or_else(|| event_loop.triggers.take_request(|action| action == Action::Rollback || !on_probation));
        let Some(Request { action, reason, reply, .. }) = self.after_delay(next) else {
            return self.wait(event_loop);
        };
        // Accepting ends when this is dropped, after everyone has been notified.
        let mut _paused = None;
        let mode = match action {
            Action::Stop | Action::PartialStop if self.stop_was_taken_back(action) => {
                // The parent may not have received it, so the caller must repeat it.
                reply.upgrade(Err(Error::GivenUp));
                self.yield_to_parent(event_loop);
                return Ok(());
            }
            Action::Stop => {
                _paused = self.keep_passed();
                generation.sockets.registry().unlink(|_| true);
                generation.pid_file.remove();
                generation.shutdown.drains().end_older(generation.ancestors.clone());
                reply.stopping();
                ExitMode::Stopped
            }
            Action::Rollback => {
                self.roll_back(event_loop, reason, reply);
                return Ok(());
            }
            Action::PartialStop => {
                generation.sockets.registry().unlink(|key| event_loop.triggers.control.listens_on(key));
                reply.stopping();
                ExitMode::PartiallyStopped
            }
            Action::Upgrade => {
                // The time limit of a queued request starts after its wait.
                let since = Instant::now();
                let succeeded = if generation.may_overlap() {
                    upgrade(event_loop, reply.takeover(), since)
                } else {
                    Err(Error::ParentDrains)
                };
                let outcome = succeeded.map(|(upgraded, paused)| {
                    _paused = Some(paused);
                    generation.bound_overlap();
                    upgraded
                });
                match &outcome {
                    Ok(upgraded) => generation.reporter.emit(&Event::Upgraded(upgraded)),
                    Err(error) => {
                        generation.reporter.emit(&Event::UpgradeFailed { error, after: since.elapsed() });
                    }
                }
                let upgraded = outcome.as_ref().ok().cloned();
                reply.upgrade(outcome);
                self.changed.notify_all();
                let Some(upgraded) = upgraded else { return Ok(()) };
                ExitMode::Upgraded(upgraded)
            }
            Action::Status => {
                reply.status(&generation.status("serving"));
                return Ok(());
            }
        };
        let handed_over = matches!(mode, ExitMode::Upgraded(_));
        self.end(event_loop.triggers, Exit { mode, reason }, handed_over);
        Ok(())
    }

    /// Makes the service manager store everything that was passed, for the next start, if the program chose that.
    /// Accepting is paused for this, and is not resumed.
    fn keep_passed(&self) -> Option<Paused<'_>> {
        let generation = &self.generation;
        // Without a service manager, for example in a terminal, nothing is expected to be stored.
        if !generation.keep_passed.load(Ordering::Relaxed) || generation.reporter.manager.get().is_none() {
            return None;
        }
        let Some(store) = generation.reporter.store() else {
            logging::warn!("cannot store the passed state for the next start: this process has no store, see Builder::systemd_keep_passed");
            return None;
        };
        let mut paused = Paused::begin(&generation.shutdown, HashSet::new());
        paused.then = State::Stopped;
        match generation.sockets.keep_passed(&*store, generation.number) {
            Ok(count) => logging::info!("stored the passed state for the next start: descriptors={count}"),
            Err(e) => logging::error!("cannot store the passed state for the next start: {e}"),
        }
        Some(paused)
    }

    /// Waits for a request, and for messages of a parent that can still take its commit back.
    fn wait(&self, event_loop: &mut EventLoop<'_>) -> Result<(), Error> {
        let generation = &self.generation;
        let parent = generation.ancestors.parent.as_ref().filter(|parent| !parent.state().ended);
        let fds: Vec<_> = parent.iter().map(|parent| (parent.reader.as_fd(), PollFlags::IN)).collect();
        let delay = generation.options.stop_delay;
        let until = self.lead().delayed.as_ref().map_or(Deadline::NEVER, |(_, began)| Deadline::since(*began, delay));
        event_loop.wait(Phase::Serving, &fds, until)?;
        // The parent may have sent its announcement.
        generation.reporter.main();
        self.take_from_parent(event_loop);
        Ok(())
    }

    /// Delays a stop. During the delay another stop takes effect immediately, and other requests are answered.
    fn after_delay(&self, next: Option<Request>) -> Option<Request> {
        let (generation, delay) = (&self.generation, self.generation.options.stop_delay);
        let mut lead = self.lead();
        match (lead.delayed.take(), next) {
            (None, Some(stop)) if stop.action == Action::Stop && !delay.is_zero() => {
                logging::info!("stop requested by {}: accepting for {delay:?} more", stop.reason);
                lead.delayed = Some((stop, Instant::now()));
                // Without the lock, because this wakes tasks.
                drop(lead);
                generation.shutdown.set(State::Leaving);
                None
            }
            (None, next) => next,
            (Some((stop, began)), None) if Deadline::since(began, delay).has_passed() => Some(stop),
            // One request for a stop may arrive twice. A signal to the whole process group also reaches the parent, which
            // forwards it. A parent that takes the service back gets its child's stop in addition to its own. A stop that
            // comes much later is a second request.
            (Some((stop, began)), Some(again))
                if again.action == Action::Stop
                    && again.since.saturating_duration_since(began) < COMMIT
                    && (again.since <= began || again.is_forwarded() || stop.is_forwarded()) =>
            {
                let (kept, copy) = if stop.is_forwarded() { (again, stop) } else { (stop, again) };
                copy.reply.stopping();
                lead.delayed = Some((kept, began));
                None
            }
            (Some((stop, _)), Some(again)) if again.action.stops() => {
                again.reply.stopping();
                Some(stop)
            }
            (delayed, next) => {
                lead.delayed = delayed;
                match next {
                    Some(status) if status.action == Action::Status => return Some(status),
                    Some(other) => other.reply.upgrade(Err(Error::Over)),
                    None => {}
                }
                None
            }
        }
    }

    /// Ends the service, or only this process; in the latter case the connections in the accept queue belong to another
    /// process.
    fn end(&self, triggers: &mut Triggers, exit: Exit, handed_over: bool) {
        let generation = &self.generation;
        generation.sockets.registry().close_all();
        self.lead().stop = triggers.stop_reason();
        triggers.close();
        if generation.options.second_stop_ends_drain || handed_over {
            match StopSignal::new(triggers.stop_signals(), handed_over) {
                Ok(signal) => generation.shutdown.drains().add_end_signal(Arc::new(signal)),
                Err(e) => logging::warn!("a stop signal will not end the drain: {e}"),
            }
        }
        if handed_over {
            generation.drain_status();
        }
        generation.reporter.emit(&Event::Ended(&exit));
        let state = if handed_over { State::HandedOver } else { State::Stopped };
        // This comes last, because a program that waits for the shutdown handle may end the process immediately, so
        // everyone else must have been notified before. After an upgrade nothing is accepted until then, because
        // accepting has been paused since the commit.
        generation.shutdown.set(state);
        self.lead().exit = Some(exit);
        self.changed.notify_all();
    }
}
