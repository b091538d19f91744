//! Replace a running network server by its next version without losing a connection.
#![deny(unsafe_code)]
#[allow(dead_code)] // the core that uses it comes next
mod handover {
    pub(crate) mod blob;
    pub(crate) mod scm;
}
mod seqpacket;
#[allow(unsafe_code, dead_code)]
mod sys {
    pub(crate) mod peer;
}
pub use seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener};
pub use sys::peer::PeerCred;
