//! Triggers: what asks for an upgrade or a stop, and the one poll in which all of them are waited for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::error::{chain, Error};
use crate::exit::{ExitReason, Upgraded};
use crate::handover::greeting::{FirstLine, GREETING_TIME};
use crate::key::Key;
use crate::service::Core;
use crate::sys::net::NOSIGNAL;
use crate::sys::peer::PeerCred;
use crate::sys::poll::{poll, Deadline};
use crate::sys::signal::{self, Handlers};
use crate::takeover::{self, TakeoverRequest, Trust};

/// What a trigger asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Upgrade,
    Stop,
    PartialStop,
    /// Tells how things are, and changes nothing.
    Status,
}

impl Action {
    fn stops(self) -> bool {
        matches!(self, Self::Stop | Self::PartialStop)
    }
}

/// What a connection to a control socket means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The connection itself asks for this.
    Connect(Action),
    /// The first line says what is asked for.
    Command,
    /// The first line says that the peer wants to take over.
    Takeover,
}

/// Somebody asked.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) action: Action,
    pub(crate) reason: ExitReason,
    pub(crate) since: Instant,
    pub(crate) reply: Reply,
}

/// Who hears the outcome.
#[derive(Debug)]
pub(crate) enum Reply {
    Nobody,
    Socket(UnixStream),
    Call(Outcome),
    /// A process that takes over, and the call that let it in, if any.
    TakeoverRequest(TakeoverRequest, Option<Outcome>),
}

/// Where a call finds what came of it.
pub(crate) type Outcome = Arc<Mutex<Option<Result<Upgraded, Error>>>>;

impl Reply {
    /// Tells the outcome. The connection is given back: it stays open until this process ends, where that matters.
    pub(crate) fn upgrade(self, outcome: Result<Upgraded, Error>) -> Option<UnixStream> {
        let call = |cell: Outcome, outcome| *cell.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        match self {
            Self::Nobody => None,
            Self::Call(cell) => {
                call(cell, outcome);
                None
            }
            Self::Socket(stream) => {
                tell(&stream, &in_words(&outcome));
                Some(stream)
            }
            Self::TakeoverRequest(taker, cell) => {
                taker.refuse(&in_words(&outcome));
                if let Some(cell) = cell {
                    call(cell, outcome);
                }
                None
            }
        }
    }

    /// The process to hand over to, if it is not to be started first.
    pub(crate) fn taker(&self) -> Option<&TakeoverRequest> {
        match self {
            Self::TakeoverRequest(taker, _) => Some(taker),
            _ => None,
        }
    }

    pub(crate) fn status(self, line: &str) {
        if let Self::Socket(stream) = self {
            tell(&stream, line);
        }
    }

    pub(crate) fn stopping(self) -> Option<UnixStream> {
        self.upgrade(Err(Error::Over))
    }
}

/// The outcome in one line.
fn in_words(outcome: &Result<Upgraded, Error>) -> String {
    match outcome {
        Ok(Upgraded { pid, generation, commit }) => {
            let ms = commit.as_secs_f64() * 1e3;
            format!("upgraded pid={pid} generation={generation} ms={ms:.1}\n")
        }
        Err(Error::Busy) => "busy\n".into(),
        Err(Error::Over | Error::StopAsked { .. }) => "stopping\n".into(),
        Err(e) => format!("failed: {}\n", chain(e)),
    }
}

/// One line, if the peer takes it: nobody waits for a peer.
fn tell(stream: &UnixStream, line: &str) {
    let _ = rustix::net::send(stream, line.as_bytes(), NOSIGNAL | rustix::net::SendFlags::DONTWAIT);
}

/// Requests from this process's own threads, and a place to leave them.
#[derive(Debug, Default)]
pub(crate) struct Calls(Mutex<Vec<Request>>);

impl Calls {
    pub(crate) fn post(&self, request: Request) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        signal::wake();
    }

    pub(crate) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A control socket.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    pub(crate) path: PathBuf,
    pub(crate) listener: UnixListener,
    pub(crate) meaning: Purpose,
}

/// A connection whose first line has not come yet.
#[derive(Debug)]
struct PendingCommand {
    stream: UnixStream,
    peer: PeerCred,
    path: PathBuf,
    meaning: Purpose,
    line: FirstLine,
    since: Instant,
}

/// How many connections may be about to send their first line.
const MAX_TALKS: usize = 16;

/// After a failed accept, for want of descriptors say, a control socket is left alone for this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// All triggers of a process. One thread at a time has them and waits on them.
pub(crate) struct Triggers {
    signals: Vec<(i32, Action)>,
    /// Installed as long as this lives: also when all is over, or a late SIGHUP would end the drain.
    // The underscore: without `tokio_ecdysis` it is only held.
    _handlers: Handlers,
    sockets: Vec<ControlSocket>,
    trust: Trust,
    talks: Vec<PendingCommand>,
    accept_again: Option<Instant>,
    calls: Arc<Calls>,
    /// Asked and not dealt with.
    pub(crate) requests: VecDeque<Request>,
}

/// Why a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// Some of the descriptors given are ready; or there are requests.
    Ready,
    Deadline,
}

/// Whether the control sockets are ours to answer, which they are not once a child has committed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sockets {
    Answer,
    Leave,
}

impl Triggers {
    pub(crate) fn new(
        signals: Vec<(i32, Action)>,
        handlers: Handlers,
        sockets: Vec<ControlSocket>,
        trust: Trust,
        calls: Arc<Calls>,
    ) -> Self {
        Self {
            signals,
            _handlers: handlers,
            sockets,
            trust,
            talks: Vec::new(),
            accept_again: None,
            calls,
            requests: VecDeque::new(),
        }
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn add_signal(&mut self, signal: i32, action: Action) -> io::Result<()> {
        self._handlers.install(signal)?;
        self.signals.push((signal, action));
        Ok(())
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn add_socket(&mut self, socket: ControlSocket) {
        self.sockets.push(socket);
    }

    /// Whether this is the key of one of the control sockets.
    pub(crate) fn listens_on(&self, key: &Key) -> bool {
        self.sockets.iter().any(|socket| Key::unix(&socket.path) == *key)
    }

    /// The next request: stops before upgrades, because a stop wins.
    pub(crate) fn next_request(&mut self) -> Option<Request> {
        let stop = self.requests.iter().position(|request| request.action.stops());
        self.requests.remove(stop.unwrap_or(0))
    }

    pub(crate) fn stop_asked(&self) -> bool {
        self.requests.iter().any(|request| request.action.stops())
    }

    /// What has asked for a stop.
    pub(crate) fn stop_reason(&self) -> Option<ExitReason> {
        self.requests.iter().find(|request| request.action.stops()).map(|request| request.reason.clone())
    }

    /// During an upgrade: whoever asks for another hears that it is busy.
    pub(crate) fn answer_busy(&mut self, core: &Core, phase: &str) {
        for request in std::mem::take(&mut self.requests) {
            match request.action {
                Action::Stop | Action::PartialStop => self.requests.push_back(request),
                Action::Status => request.reply.status(&core.status(phase)),
                Action::Upgrade => {
                    log::info!("upgrade asked for by {}: busy", request.reason);
                    core.manager().asked_again();
                    request.reply.upgrade(Err(Error::Busy));
                }
            }
        }
    }

    /// When all is over: whoever still asks hears so. Gives back the connections of those who asked for a stop.
    pub(crate) fn answer_over(&mut self) -> Vec<UnixStream> {
        self.requests.extend(self.calls.take());
        self.requests.drain(..).filter_map(|request| request.reply.stopping()).collect()
    }

    /// When all is over: nobody is heard any more, and a successor's copies of the sockets are its own.
    pub(crate) fn close_sockets(&mut self) {
        self.sockets.clear();
        self.talks.clear();
    }

    /// The one poll: waits for requests, for one of `fds`, or for the deadline. Requests are put into the queue.
    pub(crate) fn wait(
        &mut self,
        core: &Core,
        fds: &[(BorrowedFd<'_>, PollFlags)],
        deadline: Deadline,
        sockets: Sockets,
    ) -> Result<Wake, Error> {
        let asked_before = self.requests.len();
        loop {
            let beat = core.beat();
            let now = Instant::now();
            self.accept_again = self.accept_again.filter(|again| *again > now);
            self.talks.retain(|talk| talk.since + GREETING_TIME > now);
            let listening = sockets == Sockets::Answer && self.accept_again.is_none();

            let wake = signal::wake_fd().map_err(|source| Error::Wait { source })?;
            let mut polled = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
            polled.extend(fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
            let talks_at = polled.len();
            polled.extend(self.talks.iter().map(|talk| PollFd::new(&talk.stream, PollFlags::IN)));
            let sockets_at = polled.len();
            if listening {
                polled.extend(self.sockets.iter().map(|socket| PollFd::new(&socket.listener, PollFlags::IN)));
            }

            let talk_ends = self.talks.iter().map(|talk| talk.since + GREETING_TIME).min();
            let others = [talk_ends, self.accept_again, beat].into_iter().flatten().min();
            let until = others.map_or(deadline, |other| deadline.min(Deadline::at(other)));
            poll(&mut polled, until).map_err(|e| Error::Wait { source: e.into() })?;

            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(polled);
            if ready[0] {
                signal::clear_wake();
                self.take_signals();
                self.requests.extend(self.calls.take());
            }
            // In this order, because accepting may end the oldest of the talks.
            for at in (talks_at..sockets_at).rev().filter(|at| ready[*at]) {
                self.listen_to(at - talks_at);
            }
            for at in (sockets_at..ready.len()).filter(|at| ready[*at]) {
                self.accept(at - sockets_at);
            }
            if ready[1..talks_at].contains(&true) || self.requests.len() > asked_before {
                return Ok(Wake::Ready);
            }
            if deadline.has_passed() {
                return Ok(Wake::Deadline);
            }
        }
    }

    fn take_signals(&mut self) {
        for signal in signal::take_pending() {
            // Several actions on one signal: each is asked for, and stops win.
            let actions = self.signals.iter().filter(|(chosen, _)| *chosen == signal);
            self.requests.extend(actions.map(|(_, action)| Request {
                action: *action,
                reason: ExitReason::Signal(signal),
                since: Instant::now(),
                reply: Reply::Nobody,
            }));
        }
    }

    /// Accepts one connection, and trusts it only if its user may trigger.
    fn accept(&mut self, at: usize) {
        let ControlSocket { path, listener, meaning } = &self.sockets[at];
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => return,
            Err(e) => {
                log::warn!("cannot accept on control socket {}: {e}", path.display());
                self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                return;
            }
        };
        let takes_over = *meaning == Purpose::Takeover;
        let trust = |peer: &PeerCred| if takes_over { (self.trust)(peer) } else { peer.is_same_user_or_root() };
        let Some(peer) = takeover::trusted(&stream, path, trust) else {
            if takes_over {
                takeover::answer(&stream, "denied");
            }
            return;
        };
        match *meaning {
            Purpose::Connect(action) => self.requests.push_back(Request {
                action,
                reason: ExitReason::Socket(path.clone()),
                since: Instant::now(),
                reply: Reply::Socket(stream),
            }),
            meaning => {
                let (path, since) = (path.clone(), Instant::now());
                self.talks.push(PendingCommand { stream, peer, path, meaning, line: FirstLine::default(), since });
                if self.talks.len() > MAX_TALKS {
                    // Who has kept silent longest has least to say, and must not keep others out.
                    match self.talks.remove(0) {
                        PendingCommand { stream, meaning: Purpose::Takeover, .. } => takeover::answer(&stream, "busy"),
                        PendingCommand { stream, .. } => tell(&stream, "busy\n"),
                    }
                }
            }
        }
    }

    /// Receives more of the first line. Acts on it once it is complete, and drops a peer that closes before that.
    fn listen_to(&mut self, at: usize) {
        let talk = &mut self.talks[at];
        match talk.line.receive(&talk.stream) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => return drop(self.talks.remove(at)),
        }
        let PendingCommand { stream, peer, path, meaning, line, .. } = self.talks.remove(at);
        let (reason, since) = (ExitReason::Socket(path), Instant::now());
        if meaning == Purpose::Takeover {
            if let Some(taker) = TakeoverRequest::new(stream.into(), peer, line.bytes()) {
                let reply = Reply::TakeoverRequest(taker, None);
                self.requests.push_back(Request { action: Action::Upgrade, reason, since, reply });
            }
            return;
        }
        let Some(action) = command(line.bytes()) else {
            return tell(&stream, "failed: unknown command; known are upgrade, stop, partial-stop, status\n");
        };
        self.requests.push_back(Request { action, reason, since, reply: Reply::Socket(stream) });
    }
}

/// The command in the first line of what came.
pub(crate) fn command(received: &[u8]) -> Option<Action> {
    match received.split(|byte| *byte == b'\n').next()?.trim_ascii() {
        b"upgrade" => Some(Action::Upgrade),
        b"stop" => Some(Action::Stop),
        b"partial-stop" => Some(Action::PartialStop),
        b"status" => Some(Action::Status),
        _ => None,
    }
}
