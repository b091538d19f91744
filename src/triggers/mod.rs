//! Triggers, which request an upgrade or a stop: signals, control sockets and calls, all in one poll.

pub(crate) mod control;
pub(crate) mod request;
pub(crate) mod takeover;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use self::control::ControlSockets;
use self::request::{Action, Calls, Reply, Request};
use crate::error::Error;
use crate::exit::ExitReason;
use crate::logging;
use crate::sys::poll::{poll, Deadline};
use crate::sys::signal::{self, Handlers};

/// All triggers of a process. The leading thread owns them and waits for them.
pub(crate) struct Triggers {
    signals: Vec<(i32, Action)>,
    handlers: Handlers,
    pub(crate) control: ControlSockets,
    calls: Arc<Calls>,
    /// Requests that are not handled yet.
    requests: VecDeque<Request>,
}

impl Triggers {
    pub(crate) fn new(
        signals: Vec<(i32, Action)>,
        handlers: Handlers,
        control: ControlSockets,
        calls: Arc<Calls>,
    ) -> Self {
        Self { signals, handlers, control, calls, requests: VecDeque::new() }
    }

    /// Keeps the handlers installed while this process lives, regardless of what the program drops, because a late
    /// SIGHUP must not end the drain.
    pub(crate) fn keep_handlers(&mut self) {
        self.handlers.keep();
    }

    /// The signals that request a stop.
    pub(crate) fn stop_signals(&self) -> Vec<i32> {
        self.signals.iter().filter(|(_, action)| action.stops()).map(|(signal, _)| *signal).collect()
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn add_signal(&mut self, signal: i32, action: Action) -> std::io::Result<()> {
        self.handlers.install(signal)?;
        self.signals.push((signal, action));
        Ok(())
    }

    /// Queues a request. An upgrade without a waiting caller is queued only once, however often it is requested.
    pub(crate) fn push(&mut self, request: Request) {
        if !(request.is_signal() && self.requests.iter().any(Request::is_signal)) {
            self.requests.push_back(request);
        }
    }

    pub(crate) fn has_request(&self, wanted: impl Fn(Action) -> bool) -> bool {
        self.requests.iter().any(|request| wanted(request.action))
    }

    /// Removes and returns the first request with such an action.
    pub(crate) fn take_request(&mut self, wanted: impl Fn(Action) -> bool) -> Option<Request> {
        let at = self.requests.iter().position(|request| wanted(request.action))?;
        self.requests.remove(at)
    }

    /// Keeps upgrades for later: one without a waiting caller, and those whose callers have waited for less than
    /// `time`. Answers the others with `busy`. Returns when to call this again.
    pub(crate) fn keep_upgrades(&mut self, time: Duration) -> Deadline {
        let mut again = Deadline::NEVER;
        for request in std::mem::take(&mut self.requests) {
            let deadline = Deadline::since(request.since, time);
            if request.action != Action::Upgrade || request.is_signal() {
                self.requests.push_back(request);
            } else if deadline.has_passed() {
                logging::info!("refused an upgrade requested by {}: busy", request.reason);
                request.reply.upgrade(Err(Error::Busy));
            } else {
                again = again.min(deadline);
                self.requests.push_back(request);
            }
        }
        again
    }

    /// Returns the source of a stop request.
    pub(crate) fn stop_reason(&self) -> Option<ExitReason> {
        self.requests.iter().find(|request| request.action.stops()).map(|request| request.reason.clone())
    }

    /// Answers requests that arrived after the service ended.
    pub(crate) fn answer_over(&mut self) {
        self.take_calls();
        while let Some(request) = self.take_request(|action| !action.stops()) {
            request.reply.stopping();
        }
    }

    /// Closes the control sockets when the service is over. A successor has its own copies.
    pub(crate) fn close(&mut self) {
        self.take_calls();
        while let Some(request) = self.requests.pop_front() {
            request.reply.stopping();
        }
        self.control.close();
    }

    /// Queues the requests that other threads have posted.
    pub(crate) fn take_calls(&mut self) {
        self.calls.take().into_iter().for_each(|request| self.push(request));
    }

    /// The one poll: waits for triggers, for one of `fds`, or for the deadline, and queues requests. Returns whether
    /// one of `fds` is ready. `accept` is false while another process serves the control sockets.
    pub(crate) fn poll(
        &mut self,
        fds: &[(BorrowedFd<'_>, PollFlags)],
        deadline: Deadline,
        accept: bool,
    ) -> Result<bool, Error> {
        let wake = self.calls.fd().map_err(|source| Error::Wait { source })?;
        let until = deadline.min(self.control.expire());
        let mut polled = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        polled.extend(fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
        polled.extend(self.control.poll_for(accept));
        poll(&mut polled, until).map_err(|e| Error::Wait { source: e.into() })?;

        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);
        if ready[0] {
            self.calls.clear();
            self.take_signals();
            self.take_calls();
        }
        let (fds, control) = ready[1..].split_at(fds.len());
        self.requests.extend(self.control.handle(control));
        Ok(fds.contains(&true))
    }

    fn take_signals(&mut self) {
        if self.signals.is_empty() {
            return;
        }
        for signal in signal::take_pending() {
            // A signal may have several actions. All are requested, and stops take precedence.
            for (_, action) in self.signals.clone().into_iter().filter(|(chosen, _)| *chosen == signal) {
                self.push(Request::new(action, ExitReason::Signal(signal), Reply::Nobody));
            }
        }
    }
}
