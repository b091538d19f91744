//! A process that has asked to take over, until the handover begins or is refused.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::handover::greeting::{refuse, Greeting};
use crate::handover::link::nonblocking;
use crate::sys::peer::PeerCred;

/// A process that has asked to take over.
#[derive(Debug)]
pub(crate) struct TakeoverRequest {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) peer: PeerCred,
    /// Whether the handover has begun. From then on the socket carries messages, and no answer.
    begun: Cell<bool>,
}

impl TakeoverRequest {
    /// `None` for a connection whose first line asks for something else.
    pub(super) fn new(socket: OwnedFd, peer: PeerCred, line: &[u8]) -> Option<Self> {
        if Greeting::parse(line).is_none() {
            refuse(&socket, "failed: this is a takeover socket");
            return None;
        }
        if let Err(e) = nonblocking(&socket) {
            refuse(&socket, &format!("failed: {e}"));
            return None;
        }
        Some(Self { socket: Arc::new(socket), peer, begun: Cell::new(false) })
    }

    /// The handover begins.
    pub(crate) fn begin(&self) -> Arc<OwnedFd> {
        self.begun.set(true);
        self.socket.clone()
    }

    /// Answers why there is no handover, unless it has begun.
    pub(crate) fn refuse(&self, why: &str) {
        if !self.begun.get() {
            refuse(&self.socket, why);
        }
    }
}
