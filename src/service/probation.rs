//! A generation on probation: requests that its parent forwards, and how it gives the service back.

use std::collections::HashSet;
use std::iter;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::{Lead, Service};
use crate::error::Error;
use crate::event_loop::EventLoop;
use crate::exit::{Exit, ExitMode, ExitReason};
use crate::handover::ancestors::{ParentLink, ParentState};
use crate::handover::lines::{FromChild, FromParent, COMMIT};
use crate::logging;
use crate::shutdown::State;
use crate::sys::poll::{wait_readable, Deadline};
use crate::triggers::request::{Action, Reply, Request};
use crate::upgrade::parent::Paused;

/// How often to check whether another thread has read a message of the parent.
const AGAIN: Duration = Duration::from_secs(1);

impl Service {
    /// Handles the parent's messages during the probation in a program that does not call `run`: carries out forwarded
    /// requests, and ends the service if the parent takes it back. Otherwise two processes could serve.
    pub(crate) fn watch_probation(self: &Arc<Self>) {
        if !self.generation.ancestors.on_probation() {
            return;
        }
        let service = self.clone();
        let watch = move || {
            let ancestors = &service.generation.ancestors;
            let Some(parent) = &ancestors.parent else { return };
            while service.lead().exit.is_none() && !parent.state().ended && ancestors.on_probation() {
                // Another thread, or the line above, may have read what has arrived.
                if !ancestors.has_news() {
                    wait_readable(&parent.reader, Deadline::after(AGAIN));
                }
                let nothing_to_do =
                    |lead: &Lead| lead.exit.is_some() || !ancestors.has_news() || !ancestors.on_probation();
                let done = |lead: &Lead| nothing_to_do(lead).then_some(());
                if let Err(e) = service.lead_until(|event_loop| service.serve(event_loop), done) {
                    return logging::error!("cannot watch the parent: {e}");
                }
            }
        };
        if let Err(e) = thread::Builder::new().name("ecdysis-probation".into()).spawn(watch) {
            logging::warn!("only `run` handles the parent's messages: cannot create a thread: {e}");
        }
    }

    /// Queues requests that the parent forwards, and ends the service if the parent has taken it back.
    pub(super) fn take_from_parent(&self, event_loop: &mut EventLoop<'_>) {
        for request in self.generation.ancestors.parent.iter().flat_map(ParentLink::take_requests) {
            let action = match request {
                FromParent::RequestStop => Action::Stop,
                FromParent::RequestPartialStop => Action::PartialStop,
                FromParent::RequestUpgrade => Action::Upgrade,
                _ => continue,
            };
            event_loop.triggers.push(Request::new(action, ExitReason::Parent, Reply::Nobody));
        }
        if self.is_given_up() {
            self.yield_to_parent(event_loop);
        }
    }

    /// Gives the service back to the parent, which keeps its sockets during the probation.
    pub(super) fn roll_back(&self, event_loop: &mut EventLoop<'_>, reason: ExitReason, reply: Reply) {
        let (generation, refused) = (&self.generation, FromChild::Refused(format!("rolled back by {reason}")));
        let parent = generation.ancestors.parent.as_ref().filter(|_| generation.ancestors.on_probation());
        let Some(parent) = parent else {
            return reply.status("failed: not on probation; upgrade to the earlier version instead\n");
        };
        // First this process stops accepting. Then the parent accepts again, and confirms that with `stop`. If the
        // parent has ended instead, or has just sent the verdict, it does not accept, so this process must continue. If
        // the parent does not answer, it takes the service back when it continues, and `stop` arrives then.
        let mut paused = Paused::begin(&generation.shutdown, HashSet::new());
        let _ = parent.send(&refused);
        logging::info!("rollback requested by {reason}, waiting for the parent");
        let state = parent.wait_for(COMMIT, |state| state.given_up || state.free);
        if !state.given_up {
            let why = match state {
                ParentState { ended: true, .. } => "the parent has ended",
                ParentState { free: true, .. } => "the probation is over",
                _ => "the parent does not answer",
            };
            drop(paused);
            return reply.status(&format!("failed: {why}\n"));
        }
        paused.then = State::HandedOver;
        logging::warn!("rolled back by {reason}: the parent serves again");
        self.refuse_queued(event_loop);
        // This comes last, because after it this process may exit immediately.
        reply.status("rolled back\n");
        self.end(event_loop.triggers, Exit { mode: ExitMode::PartiallyStopped, reason }, true);
    }

    /// Notifies the parent that the service stops. Returns true if the parent has just given up on this process: then
    /// the parent performs the stop, and owns the socket files and the PID file.
    pub(super) fn stop_was_taken_back(&self, action: Action) -> bool {
        self.generation.ancestors.send_to_parent(&FromChild::Stopping);
        if action == Action::Stop {
            // The parent announces this process when it learns of the stop. Until then, this process can neither extend
            // the manager's timeout nor use its store.
            self.generation.reporter.wait_announced();
        }
        self.is_given_up()
    }

    fn is_given_up(&self) -> bool {
        self.generation.ancestors.parent.as_ref().is_some_and(|parent| parent.state().given_up)
    }

    /// Ends the service of this process, because the parent has given up on it.
    pub(super) fn yield_to_parent(&self, event_loop: &mut EventLoop<'_>) {
        logging::error!("the parent has given up on this process and serves again");
        self.refuse_queued(event_loop);
        self.end(event_loop.triggers, Exit { mode: ExitMode::PartiallyStopped, reason: ExitReason::Parent }, true);
        self.generation.ancestors.send_to_parent(&FromChild::Refused("taken back".into()));
    }

    /// Refuses every request that this process has not carried out, because the parent serves again. Reports stops to it.
    fn refuse_queued(&self, event_loop: &mut EventLoop<'_>) {
        // Requests that have arrived at the same time.
        let _ = event_loop.triggers.poll(&[], Deadline::after(Duration::ZERO), false);
        let delayed = self.lead().delayed.take().map(|(stop, _)| stop);
        let queued = iter::from_fn(|| event_loop.triggers.take_request(|_| true));
        for request in delayed.into_iter().chain(queued) {
            // The parent remembers those that it has forwarded.
            if request.action.stops() && !request.is_forwarded() {
                self.generation.ancestors.send_to_parent(&FromChild::Stopping);
            }
            request.reply.upgrade(Err(Error::GivenUp));
        }
    }
}
