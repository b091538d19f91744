//! A process that has requested a takeover, until the handover begins or is refused.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::handover::greeting::{another_app, parse_takeover, refuse};
use crate::logging;
use crate::sys::peer::PeerCred;

/// A process that has requested a takeover.
#[derive(Debug)]
pub(crate) struct TakeoverRequest {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) peer: PeerCred,
    /// Whether the handover has begun. From then on the socket carries messages, and no answer may be sent.
    begun: Cell<bool>,
}

impl TakeoverRequest {
    /// Returns `None` for a connection whose first line is another request.
    pub(super) fn new(socket: OwnedFd, peer: PeerCred, line: &[u8], app: Option<&str>) -> Option<Self> {
        let refused = |why: &str| {
            refuse(&socket, why);
            None
        };
        let Some(theirs) = parse_takeover(line) else { return refused("failed: this is a takeover socket") };
        if let (Some(app), Some(other)) = (app, another_app(app, theirs.as_deref())) {
            logging::warn!("refused to hand over to application {other:?}: this is {app:?}");
            return refused(&format!("failed: this is application {app:?}, not {other:?}"));
        }
        Some(Self { socket: Arc::new(socket), peer, begun: Cell::new(false) })
    }

    /// The handover begins.
    pub(crate) fn begin(&self) -> Arc<OwnedFd> {
        self.begun.set(true);
        self.socket.clone()
    }

    /// Answers with the reason why there is no handover, unless the handover has begun.
    pub(crate) fn refuse(&self, why: &str) {
        if !self.begun.get() {
            refuse(&self.socket, why);
        }
    }
}
