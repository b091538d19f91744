//! Triggers: what requests an upgrade or a stop. Signals, control sockets and calls, waited for in one poll.

pub(crate) mod control;
pub(crate) mod request;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};

use self::control::{ControlSocket, ControlSockets, Trust};
use self::request::{Action, Calls, Reply, Request};
use crate::error::Error;
use crate::exit::ExitReason;
use crate::key::Key;
use crate::sys::poll::{poll, Deadline};
use crate::sys::signal::{self, Handlers};

/// All triggers of a process. One thread at a time owns them and waits on them.
pub(crate) struct Triggers {
    signals: Vec<(i32, Action)>,
    /// Installed while this lives, also when the service is over: otherwise a late SIGHUP would end the drain.
    // The underscore: without `tokio_ecdysis` it is only held.
    _handlers: Handlers,
    control: ControlSockets,
    calls: Arc<Calls>,
    /// Not yet handled.
    requests: VecDeque<Request>,
    /// Connections that requested a stop. They close when this process ends.
    stopping: Vec<UnixStream>,
}

impl Triggers {
    pub(crate) fn new(
        signals: Vec<(i32, Action)>,
        handlers: Handlers,
        sockets: Vec<ControlSocket>,
        trust: Trust,
        calls: Arc<Calls>,
    ) -> Self {
        let control = ControlSockets::new(sockets, trust);
        Self { signals, _handlers: handlers, control, calls, requests: VecDeque::new(), stopping: Vec::new() }
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn add_signal(&mut self, signal: i32, action: Action) -> std::io::Result<()> {
        self._handlers.install(signal)?;
        self.signals.push((signal, action));
        Ok(())
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn add_socket(&mut self, socket: ControlSocket) {
        self.control.add(socket);
    }

    /// Whether this is the key of one of the control sockets.
    pub(crate) fn listens_on(&self, key: &Key) -> bool {
        self.control.listens_on(key)
    }

    pub(crate) fn push(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    pub(crate) fn has_requests(&self) -> bool {
        !self.requests.is_empty()
    }

    /// The first request for such an action.
    pub(crate) fn take_request(&mut self, wanted: impl Fn(Action) -> bool) -> Option<Request> {
        let at = self.requests.iter().position(|request| wanted(request.action))?;
        self.requests.remove(at)
    }

    /// The next request. A stop comes before an upgrade, because it wins.
    pub(crate) fn next_request(&mut self) -> Option<Request> {
        self.take_request(Action::stops).or_else(|| self.requests.pop_front())
    }

    pub(crate) fn stop_requested(&self) -> bool {
        self.requests.iter().any(|request| request.action.stops())
    }

    /// What has requested a stop.
    pub(crate) fn stop_reason(&self) -> Option<ExitReason> {
        self.requests.iter().find(|request| request.action.stops()).map(|request| request.reason.clone())
    }

    /// Answers everything that was requested after the service ended.
    pub(crate) fn answer_over(&mut self) {
        self.take_calls();
        while let Some(request) = self.take_request(|action| !action.stops()) {
            request.reply.stopping();
        }
    }

    /// Answers a request for a stop.
    pub(crate) fn answer_stop(&mut self, reply: Reply) {
        self.stopping.extend(reply.stopping());
    }

    /// Closes the control sockets when the service is over. A successor has its own copies.
    pub(crate) fn close(&mut self) {
        self.take_calls();
        while let Some(request) = self.requests.pop_front() {
            self.answer_stop(request.reply);
        }
        self.control.close();
    }

    /// The requests that were posted by calls.
    pub(crate) fn take_calls(&mut self) {
        self.requests.extend(self.calls.take());
    }

    /// The one poll: waits for triggers, for one of `fds`, or for the deadline, and queues what was requested. Returns
    /// whether one of `fds` is ready. `accept` is false while the control sockets are another process's to answer.
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
            // A signal may have several actions. Each is requested, and stops win.
            let actions = self.signals.iter().filter(|(chosen, _)| *chosen == signal);
            let request = |action| Request::new(action, ExitReason::Signal(signal), Reply::Nobody);
            self.requests.extend(actions.map(|(_, action)| request(*action)));
        }
    }
}
