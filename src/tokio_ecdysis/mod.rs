//! The asynchronous interface, feature `tokio_ecdysis`: streams for Tokio, and the end of this generation as a future.
//!
//! The [guide's chapter](crate::guide::tokio) shows a server, when a stream yields, and what differs from version 1.1.1.

mod builder;
mod exit;
mod futures;
mod gate;
mod handle;
mod seqpacket;
mod socket;
mod source;
mod stoppable;
mod stream;
#[cfg(feature = "systemd_notify")]
mod systemd_notify;
#[cfg(feature = "systemd_sockets")]
mod systemd_sockets;
#[cfg(test)]
mod tests;
mod thread;
mod watch;

pub use self::builder::TokioEcdysisBuilder;
pub use self::exit::{ExitFuture, ExitMode, ExitReason, TokioEcdysisUpgradeResult};
pub use self::gate::StopOnShutdown;
pub use self::handle::TokioEcdysis;
pub use self::seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener, UnixSeqpacketListenerStream};
pub use self::socket::{SockAddr, Socket};
pub use self::source::{Listener, Source, UdpStream};
pub use self::stoppable::Stoppable;
pub use self::stream::StoppableStream;
#[cfg(feature = "systemd_notify")]
pub use self::systemd_notify::{SystemdNotifier, SystemdNotifierError};
#[cfg(feature = "systemd_sockets")]
pub use self::systemd_sockets::{SystemdSocketError, SystemdSocketsReadError};
pub use tokio::signal::unix::SignalKind;

/// The paths of version 1.1.1.
pub mod supervisor {
    pub use super::{StopOnShutdown, Stoppable, StoppableStream};
}
