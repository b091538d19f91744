//! A request for an upgrade, a stop or the status, and where its answer goes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{mpsc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{send, SendFlags};

use super::takeover::TakeoverRequest;
use crate::error::Error;
use crate::exit::{ExitReason, Upgraded};
use crate::handover::greeting::GREETING_TIME;
use crate::handover::held_open::hold_open;
use crate::logging;
use crate::sys::flag::Flag;
use crate::sys::net::NOSIGNAL;
use crate::sys::poll::{wait_writable, Deadline};
use crate::sys::signal;

/// A requested action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Upgrade,
    Stop,
    PartialStop,
    /// Gives the service back to the parent, which is possible during the probation.
    Rollback,
    /// Reports the state and changes nothing.
    Status,
}

impl Action {
    pub(crate) fn stops(self) -> bool {
        matches!(self, Self::Stop | Self::PartialStop)
    }
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) action: Action,
    pub(crate) reason: ExitReason,
    pub(crate) since: Instant,
    pub(crate) reply: Reply,
}

impl Request {
    pub(crate) fn new(action: Action, reason: ExitReason, reply: Reply) -> Self {
        Self { action, reason, since: Instant::now(), reply }
    }

    /// Whether the parent received it during the probation.
    pub(crate) fn is_forwarded(&self) -> bool {
        matches!(self.reason, ExitReason::Parent)
    }

    /// Whether it requests an upgrade without waiting for the outcome, like a signal.
    pub(super) fn is_signal(&self) -> bool {
        self.action == Action::Upgrade && matches!(self.reply, Reply::Nobody)
    }
}

/// The receiver of the outcome.
#[derive(Debug)]
pub(crate) enum Reply {
    Nobody,
    Socket(UnixStream),
    Call(Outcome),
    /// A process that takes over, and the call that accepted it, if any.
    Takeover(TakeoverRequest, Option<Outcome>),
}

/// Where a call waits for its outcome.
pub(crate) type Outcome = mpsc::Sender<Result<Upgraded, Error>>;

impl Reply {
    /// Delivers the outcome.
    pub(crate) fn upgrade(self, outcome: Result<Upgraded, Error>) {
        let line = in_words(&outcome);
        let call = match self {
            Self::Nobody => None,
            Self::Call(call) => Some(call),
            Self::Takeover(request, call) => {
                request.refuse(&line);
                call
            }
            Self::Socket(stream) => return send_line(&stream, &line),
        };
        if let Some(call) = call {
            let _ = call.send(outcome);
        }
    }

    /// Returns the process to hand over to, if it already runs.
    pub(crate) fn takeover(&self) -> Option<&TakeoverRequest> {
        match self {
            Self::Takeover(request, _) => Some(request),
            _ => None,
        }
    }

    /// With thousands of sockets the line is longer than the connection's buffer. Then a thread sends the rest, because the
    /// event loop must not wait for a client.
    pub(crate) fn status(self, line: &str) {
        let Self::Socket(stream) = self else { return };
        let sent = send_some(&stream, line.as_bytes());
        if sent == line.len() {
            return;
        }
        let (rest, deadline) = (line.as_bytes()[sent..].to_owned(), Deadline::after(GREETING_TIME));
        let send_rest = move || {
            let mut rest = &rest[..];
            while !rest.is_empty() && wait_writable(&stream, deadline) {
                rest = &rest[send_some(&stream, rest)..];
            }
        };
        if let Err(e) = thread::Builder::new().name("ecdysis-status".into()).spawn(send_rest) {
            logging::warn!("a long status was cut: cannot create a thread: {e}");
        }
    }

    /// Answers that the service is over. The connection closes when this process ends.
    pub(crate) fn stopping(self) {
        if let Self::Socket(stream) = self {
            send_line(&stream, "stopping\n");
            hold_open(OwnedFd::from(stream));
        } else {
            self.upgrade(Err(Error::Over));
        }
    }
}

/// Formats the outcome as one line.
fn in_words(outcome: &Result<Upgraded, Error>) -> String {
    match outcome {
        Ok(Upgraded { pid, generation, commit }) => {
            let ms = commit.as_secs_f64() * 1e3;
            format!("upgraded pid={pid} generation={generation} ms={ms:.1}\n")
        }
        Err(Error::Busy) => "busy\n".into(),
        Err(Error::Over | Error::StopAsked { .. }) => "stopping\n".into(),
        Err(e) => format!("failed: {e}\n"),
    }
}

/// Sends one line if the socket has room for it, without waiting for the peer.
pub(super) fn send_line(stream: &UnixStream, line: &str) {
    send_some(stream, line.as_bytes());
}

/// Sends as much as the socket has room for. Returns the number of bytes; for a peer that is gone, that of all.
fn send_some(stream: &UnixStream, bytes: &[u8]) -> usize {
    match send(stream, bytes, NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(sent) => sent,
        Err(Errno::AGAIN | Errno::INTR) => 0,
        Err(_) => bytes.len(),
    }
}

/// Requests that other threads have posted, and the descriptor that wakes the waiting thread.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    posted: Mutex<Vec<Request>>,
    /// `None` for the process's own descriptor, which its signals also make readable.
    own: Option<Flag>,
}

impl Calls {
    /// For a service that shares its process with other services.
    pub(crate) fn standalone() -> io::Result<Self> {
        Ok(Self { posted: Mutex::default(), own: Some(Flag::new(false)?) })
    }

    pub(crate) fn post(&self, request: Request) {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        self.own.as_ref().map_or_else(signal::wake, Flag::raise);
    }

    pub(super) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut *self.posted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the descriptor that is readable when there is a request.
    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.own {
            Some(own) => Ok(own.as_fd()),
            None => signal::wake_fd(),
        }
    }

    pub(super) fn clear(&self) {
        self.own.as_ref().map_or_else(signal::clear_wake, Flag::lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_status_longer_than_the_buffer_arrives_whole() {
        let (ours, mut client) = UnixStream::pair().unwrap();
        let line = format!("{}\n", "socket=tcp ".repeat(500_000));
        Reply::Socket(ours).status(&line);
        client.set_read_timeout(Some(GREETING_TIME)).unwrap();
        let mut received = String::new();
        client.read_to_string(&mut received).unwrap();
        assert!(received == line, "{} of {} bytes", received.len(), line.len());
    }
}
