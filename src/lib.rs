//! Replace a running network server by its next version without losing a connection.

#![deny(unsafe_code)]
#![warn(missing_docs, rust_2018_idioms)]

#[cfg(not(target_os = "linux"))]
compile_error!("ecdysis works on Linux only: it is made of fork, execve and descriptors that are inherited");

mod ecdysis;
mod error;
mod event;
mod handover;
mod key;
mod listen;
mod pass;
mod pid_file;
mod program;
mod seqpacket;
mod shutdown;
mod sockets;
mod sys;
mod takeover;
#[cfg(feature = "tokio_ecdysis")]
pub mod tokio_ecdysis;
mod trigger;
mod upgrade;

pub use crate::ecdysis::{Builder, Ecdysis, Exit, ExitMode, ExitReason, Overlap, Starting, Upgraded};
pub use error::Error;
pub use event::Event;
pub use handover::link::Transport;
pub use key::Key;
pub use listen::Socket;
pub use pass::Stream;
pub use seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener};
pub use shutdown::{Accept, Datagram, Guard, Incoming, Readable, Shutdown};
pub use sockets::Sockets;
pub use sys::peer::PeerCred;
pub use sys::spawn::Spawn;
pub use takeover::TakeoverSocket;
