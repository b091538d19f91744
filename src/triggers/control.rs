//! Control and takeover sockets: accepts connections, checks the peer's user, and reads the first line.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::request::{send_line, Action, Reply, Request};
use super::takeover::TakeoverRequest;
use crate::error::Error;
use crate::exit::ExitReason;
use crate::handover::greeting::{self, FirstLine, GREETING_TIME};
use crate::key::Key;
use crate::logging;
use crate::sys::peer::{peer, PeerCred};
use crate::sys::poll::Deadline;
use crate::sys::{net, Mode};

/// Decides which users may be at the other end of a takeover socket.
pub(crate) type Trust = Arc<dyn Fn(&PeerCred) -> bool + Send + Sync>;

/// The maximum number of open connections that have not sent their command yet.
const MAX_PENDING: usize = 16;

/// How long a socket is not polled after a failed accept, which may be due to a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The meaning of a connection to a control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The connection itself is the request.
    Connect(Action),
    /// The first line is the request.
    Command,
    /// The first line is a takeover request.
    Takeover,
}

#[derive(Debug)]
pub(crate) struct ControlSocket {
    pub(crate) path: PathBuf,
    pub(crate) listener: UnixListener,
}

/// All control sockets of a process.
pub(crate) struct ControlSockets {
    pub(crate) sockets: Vec<(ControlSocket, Purpose)>,
    trust: Trust,
    /// The name of this application.
    app: Option<String>,
    pending: Vec<PendingCommand>,
    accept_again: Deadline,
}

/// A connection whose first line is not complete.
#[derive(Debug)]
struct PendingCommand {
    stream: UnixStream,
    peer: PeerCred,
    path: PathBuf,
    purpose: Purpose,
    line: FirstLine,
    deadline: Deadline,
}

impl ControlSockets {
    pub(crate) fn new(sockets: Vec<(ControlSocket, Purpose)>, trust: Trust, app: Option<String>) -> Self {
        Self { sockets, trust, app, pending: Vec::new(), accept_again: Deadline::after(Duration::ZERO) }
    }

    /// Whether this is the key of one of the control sockets.
    pub(crate) fn listens_on(&self, key: &Key) -> bool {
        self.sockets.iter().any(|(socket, _)| Key::unix(&socket.path) == *key)
    }

    pub(super) fn close(&mut self) {
        self.sockets.clear();
        self.pending.clear();
    }

    /// Closes connections that were idle for too long. Returns when to call this again.
    pub(super) fn expire(&mut self) -> Deadline {
        self.pending.retain(|pending| !pending.deadline.has_passed());
        let pause = if self.accept_again.has_passed() { Deadline::NEVER } else { self.accept_again };
        self.pending.iter().fold(pause, |first, pending| first.min(pending.deadline))
    }

    /// Returns what to poll: the pending connections, and the sockets if connections are accepted now.
    pub(super) fn poll_for(&self, accept: bool) -> impl Iterator<Item = PollFd<'_>> {
        let accept = accept && self.accept_again.has_passed();
        let sockets = self.sockets.iter().filter(move |_| accept);
        let pending = self.pending.iter().map(|pending| PollFd::new(&pending.stream, PollFlags::IN));
        pending.chain(sockets.map(|(socket, _)| PollFd::new(&socket.listener, PollFlags::IN)))
    }

    /// Handles the ready descriptors, in the order of [`poll_for`](Self::poll_for), and returns the requests.
    pub(super) fn handle(&mut self, ready: &[bool]) -> Vec<Request> {
        let pending = self.pending.len();
        let mut requests = Vec::new();
        // Iterate from the end, because a finished connection is removed, and an accept may remove the oldest.
        for at in (0..pending).rev().filter(|at| ready[*at]) {
            requests.extend(self.read(at));
        }
        for at in (pending..ready.len()).filter(|at| ready[*at]) {
            requests.extend(self.accept(at - pending));
        }
        requests
    }

    fn accept(&mut self, at: usize) -> Option<Request> {
        let (ControlSocket { path, listener }, purpose) = &self.sockets[at];
        let stream = match accept(listener) {
            Ok(stream) => stream?,
            Err(e) => {
                logging::warn!("cannot accept on control socket {}: {e}", path.display());
                self.accept_again = Deadline::after(ACCEPT_PAUSE);
                return None;
            }
        };
        let peer = match purpose {
            Purpose::Takeover => trusted(&stream, path, &*self.trust, true)?,
            _ => trusted(&stream, path, PeerCred::is_same_user_or_root, false)?,
        };
        if let Purpose::Connect(action) = *purpose {
            return Some(Request::new(action, ExitReason::Socket(path.clone()), Reply::Socket(stream)));
        }
        let (path, purpose, line, deadline) =
            (path.clone(), *purpose, FirstLine::default(), Deadline::after(GREETING_TIME));
        self.pending.push(PendingCommand { stream, peer, path, purpose, line, deadline });
        if self.pending.len() > MAX_PENDING {
            // Drop the connection that has been idle longest, so that idle peers cannot lock others out.
            match self.pending.remove(0) {
                PendingCommand { stream, purpose: Purpose::Takeover, .. } => greeting::refuse(&stream, "busy"),
                PendingCommand { stream, .. } => send_line(&stream, "busy\n"),
            }
        }
        None
    }

    /// Reads more of a first line. Once the line is complete, the connection is no longer pending, whatever the line
    /// contains.
    fn read(&mut self, at: usize) -> Option<Request> {
        let pending = &mut self.pending[at];
        let complete = pending.line.receive(&pending.stream);
        if matches!(complete, Ok(false)) {
            return None;
        }
        let PendingCommand { stream, peer, path, purpose, line, .. } = self.pending.remove(at);
        complete.ok()?;
        let (action, reply) = if purpose == Purpose::Takeover {
            let request = TakeoverRequest::new(stream.into(), peer, line.bytes(), self.app.as_deref())?;
            (Action::Upgrade, Reply::Takeover(request, None))
        } else if let Some(action) = command(line.bytes()) {
            (action, Reply::Socket(stream))
        } else {
            send_line(&stream, "failed: unknown command; known are upgrade, stop, partial-stop, rollback, status\n");
            return None;
        };
        Some(Request::new(action, ExitReason::Socket(path), reply))
    }
}

/// Returns a nonblocking stream, or `None` if no peer is connected (any more).
fn accept(listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    match net::accept(listener, Mode::Nonblocking) {
        Ok(stream) => Ok(Some(stream.into())),
        Err(Errno::AGAIN | Errno::CONNABORTED) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Returns the peer, if it is allowed. Otherwise logs that, and answers it if it wants to take over.
fn trusted(stream: &UnixStream, path: &Path, trust: impl Fn(&PeerCred) -> bool, is_takeover: bool) -> Option<PeerCred> {
    let who = match peer(stream) {
        Ok(peer) if trust(&peer) => return Some(peer),
        Ok(peer) => format!("user {}", peer.uid),
        Err(e) => format!("a peer without credentials ({e})"),
    };
    logging::warn!("refused {who} on socket {}", path.display());
    if is_takeover {
        greeting::refuse(stream, "denied");
    }
    None
}

/// Returns the command in the first line of `received`.
pub(crate) fn command(received: &[u8]) -> Option<Action> {
    match received.split(|byte| *byte == b'\n').next()?.trim_ascii() {
        b"upgrade" => Some(Action::Upgrade),
        b"stop" => Some(Action::Stop),
        b"partial-stop" => Some(Action::PartialStop),
        b"rollback" => Some(Action::Rollback),
        b"status" => Some(Action::Status),
        _ => None,
    }
}

/// A takeover socket for programs with their own event loop, from
/// [`Sockets::listen_takeover`](crate::Sockets::listen_takeover). When it is readable, call
/// [`Ecdysis::hand_over`](crate::Ecdysis::hand_over). It is nonblocking.
#[derive(Debug)]
pub struct TakeoverSocket {
    pub(crate) socket: ControlSocket,
}

impl AsFd for TakeoverSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.listener.as_fd()
    }
}

impl TakeoverSocket {
    /// Returns the next process that requests a takeover; `None` if no process has connected. Waits only for the first
    /// line.
    pub(crate) fn accept(&self, trust: &Trust, app: Option<&str>) -> Result<Option<TakeoverRequest>, Error> {
        let ControlSocket { path, listener } = &self.socket;
        let accepted = accept(listener).map_err(|source| Error::Connect { path: path.clone(), source })?;
        let Some(stream) = accepted else { return Ok(None) };
        let Some(peer) = trusted(&stream, path, &**trust, true) else { return Ok(None) };
        let line = FirstLine::default().wait(&stream, Deadline::after(GREETING_TIME));
        Ok(TakeoverRequest::new(stream.into(), peer, &line, app))
    }
}
