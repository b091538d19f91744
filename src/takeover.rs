//! The takeover socket, up to the point at which a handover through it begins.
//!
//! Whoever wants to take over connects and says `takeover 1`. Then the handover comes, or an answer in one word and the
//! line `end`. A connection that says nothing asks for nothing, and is closed after a while.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::{retry_on_intr, Errno};
use rustix::net::SendFlags;

use crate::error::Error;
use crate::handover::greeting::{FirstLine, Greeting, GREETING_TIME};
use crate::handover::link::nonblocking;
use crate::listen;
use crate::sys::net::NOSIGNAL;
use crate::sys::peer::{peer, PeerCred};
use crate::sys::poll::Deadline;

/// Who may be at the other end of a takeover socket.
pub(crate) type Trust = Arc<dyn Fn(&PeerCred) -> bool + Send + Sync>;

// ---- the old process --------------------------------------------------------------------------------------------

/// A takeover socket for programs with a loop of their own, from
/// [`Sockets::listen_takeover`](crate::Sockets::listen_takeover). When it is readable, call
/// [`Ecdysis::hand_over`](crate::Ecdysis::hand_over). It is nonblocking.
#[derive(Debug)]
pub struct TakeoverSocket {
    pub(crate) path: PathBuf,
    pub(crate) listener: UnixListener,
}

impl AsFd for TakeoverSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl TakeoverSocket {
    /// The next process that asks to take over; `None` if nobody has connected. Waits for its first line only.
    pub(crate) fn accept(&self, trust: &Trust) -> Result<Option<TakeoverRequest>, Error> {
        let failed = |source| Error::Connect { path: self.path.clone(), source };
        let stream = match self.listener.accept() {
            Ok((stream, _)) => OwnedFd::from(stream),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                return Ok(None);
            }
            Err(e) => return Err(failed(e)),
        };
        let Some(peer) = trusted(&stream, &self.path, &**trust) else {
            answer(&stream, "denied");
            return Ok(None);
        };
        let line = FirstLine::default().wait(&stream, Deadline::after(GREETING_TIME));
        Ok(TakeoverRequest::new(stream, peer, &line))
    }
}

/// Who is at the other end, if that is somebody who may be; else that is logged.
pub(crate) fn trusted(socket: impl AsFd, path: &Path, trust: impl Fn(&PeerCred) -> bool) -> Option<PeerCred> {
    match peer(socket) {
        Ok(peer) if trust(&peer) => Some(peer),
        Ok(peer) => {
            log::warn!("refused user {} on socket {}", peer.uid, path.display());
            None
        }
        Err(e) => {
            log::warn!("refused a peer without credentials on socket {}: {e}", path.display());
            None
        }
    }
}

/// Answers a process that will not get the handover.
pub(crate) fn answer(socket: impl AsFd, words: &str) {
    let text = format!("{}\nend\n", words.trim_end());
    let _ = rustix::net::send(socket, text.as_bytes(), NOSIGNAL | SendFlags::DONTWAIT);
}

/// A process that has asked to take over.
#[derive(Debug)]
pub(crate) struct TakeoverRequest {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) peer: PeerCred,
    /// Whether the handover has begun. From then on what it hears is not an answer.
    begun: Cell<bool>,
}

impl TakeoverRequest {
    /// `None` for a connection whose first line asks for something else.
    pub(crate) fn new(socket: OwnedFd, peer: PeerCred, line: &[u8]) -> Option<Self> {
        if Greeting::parse(line).is_none() {
            answer(&socket, "failed: this is a takeover socket");
            return None;
        }
        if let Err(e) = nonblocking(&socket) {
            answer(&socket, &format!("failed: {e}"));
            return None;
        }
        Some(Self { socket: Arc::new(socket), peer, begun: Cell::new(false) })
    }

    /// The handover begins.
    pub(crate) fn begin(&self) -> Arc<OwnedFd> {
        self.begun.set(true);
        self.socket.clone()
    }

    /// Says why there is no handover; unless it had begun.
    pub(crate) fn refuse(&self, words: &str) {
        if !self.begun.get() {
            answer(&self.socket, words);
        }
    }
}

// ---- the new process --------------------------------------------------------------------------------------------

/// Connects to the process that serves, and asks. `None` if there is none: no such file, or nobody listens.
pub(crate) fn connect(path: &Path, trust: &Trust) -> Result<Option<OwnedFd>, Error> {
    let failed = |source| Error::Connect { path: path.to_owned(), source };
    let Some(socket) = listen::connect_unix(path).map_err(failed)? else { return Ok(None) };
    let peer = peer(&socket).map_err(failed)?;
    if !trust(&peer) {
        return Err(Error::Untrusted { path: path.to_owned(), uid: peer.uid });
    }
    let line = Greeting::default().line();
    match retry_on_intr(|| rustix::net::send(&socket, line.as_bytes(), NOSIGNAL)) {
        // It has ended since; the wait for its answer tells.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(Some(socket)),
        Err(e) => Err(failed(e.into())),
    }
}

/// Whether the other process has closed its end in the middle.
pub(crate) fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}
