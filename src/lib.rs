//! Replace a running network server by its next version without refusing, resetting or losing a connection.
//!
//! The running process starts the new program and hands it every listening socket. It goes on serving until the new
//! one says that it is ready, and only then stops accepting, finishes what it has, and ends. If the new version cannot
//! start, crashes, hangs or refuses, the old one serves on, and nobody has noticed.
//!
//! Small, blocking, made of direct system calls: the only dependencies are `libc`, `rustix` and `log`. Linux only.
//!
//! # A server
//!
//! ```no_run
//! use std::{io::Write, thread, time::Duration};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let starting = ecdysis::Ecdysis::builder()
//!         .upgrade_on_signal(libc::SIGHUP)
//!         .stop_on_signal(libc::SIGTERM)
//!         .start()?;
//!     // Binds in the first generation; in every later one it is the same socket.
//!     let listener = starting.listen_tcp("0.0.0.0:7000".parse()?)?;
//!     let server = starting.ready()?;
//!     let shutdown = server.shutdown();
//!     let accepting = shutdown.clone();
//!     thread::spawn(move || {
//!         for mut stream in accepting.incoming(&listener).flatten() {
//!             let guard = accepting.guard();
//!             thread::spawn(move || {
//!                 let _ = stream.write_all(b"hello\n");
//!                 drop(guard);
//!             });
//!         }
//!     });
//!     server.run()?; // waits for the signals
//!     shutdown.drain(Duration::from_secs(60));
//!     Ok(())
//! }
//! ```
//!
//! # The life of a listener
//!
//! One upgrade, in order. `src/upgrade.rs` has the steps in this order.
//!
//! 1. Every listener that the program asked for is in the registry ([`Sockets`]), under its kind and the address that
//!    was **asked for**.
//! 2. A trigger fires: a signal, a connection to a control socket, a call. What needs memory is built: arguments,
//!    environment, manifest.
//! 3. The parent makes a child. In it: signals to default, close-on-exec on everything, cleared on what is handed over,
//!    execve.
//! 4. The parent waits in one poll: for the child's word, the deadline, and its triggers, which stay alive.
//! 5. The child proves that its environment means *it*, adopts the descriptors, marks them close-on-exec.
//! 6. The child asks for its listeners in the same lines of code, which now claim what was handed over, and says
//!    [`ready`](Starting::ready).
//! 7. The parent stops accepting and answers `commit`: from then on the child serves. The parent keeps its sockets for
//!    the probation, a second; if the child dies, it accepts again. Then it drains and ends.
//!
//! A real one, drawn by `cargo run --release --example demo -- --picture FILE.svg`:
//!
#![doc = include_str!("guide/upgrade.svg")]
//!
//! # Promises and their limits
//!
//! - No connection is refused, reset or left unserved by an upgrade. Connections that a *new* version has accepted and then
//!   takes along when it crashes are lost: nothing can give them back.
//! - A failed upgrade changes nothing, and its [`Error`] names the cause. The next attempt may follow at once.
//! - The probation covers a child that *dies*. One that lives and serves nonsense needs a check of your own before
//!   `ready`, and an upgrade back.
//! - The new version starts with stdin, stdout, stderr and what was handed to it, every signal at its default.
//! - A connection stays with the process that accepted it, until it ends or the drain's deadline cuts it. Connections can
//!   be handed on one by one ([`Sockets::pass_stream`]), if your protocol has a state to go with them.
//! - UDP sockets are handed on; flows are not steered, see [`guide::sockets`].
//! - A socket stays in the network namespace in which it was made.
//!
//! # Features
//!
//! None is on by default. `tokio_ecdysis` (also called `tokio`): the async face, in the module of that name.
//! `systemd_notify` and `systemd_sockets` (together `systemd`): see [`guide::systemd`].
//!
//! The [`guide`] has chapters on each of these, on operations, and on migrating from other libraries.

#![deny(unsafe_code)]
#![warn(missing_docs, rust_2018_idioms)]

mod builder;
pub mod control;
mod ecdysis;
mod error;
mod event;
mod event_loop;
mod exit;
mod foreign;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(missing_docs, clippy::missing_panics_doc)]
pub mod fuzzing;
mod generation;
mod handover;
mod key;
mod listen;
mod logging;
mod manager;
mod options;
mod pid_file;
mod program;
mod reporter;
mod seqpacket;
mod service;
mod shutdown;
mod sockets;
mod start;
mod started;
mod stop_signal;
mod sys;
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
pub mod systemd;
#[cfg(feature = "tokio_ecdysis")]
pub mod tokio_ecdysis;
mod triggers;
mod upgrade;

/// Chapters of the guide. Each can be read alone.
pub mod guide {
    #[doc = include_str!("guide/threaded.md")]
    pub mod threaded {}
    #[doc = include_str!("guide/sockets.md")]
    pub mod sockets {}
    #[doc = include_str!("guide/state.md")]
    pub mod state {}
    #[doc = include_str!("guide/platforms.md")]
    pub mod platforms {}
    #[doc = include_str!("guide/seccomp.md")]
    pub mod seccomp {}
    #[cfg(feature = "tokio_ecdysis")]
    #[doc = include_str!("guide/tokio.md")]
    pub mod tokio {}
    #[cfg(feature = "tokio_ecdysis")]
    #[doc = include_str!("guide/frameworks.md")]
    pub mod frameworks {}
    #[doc = include_str!("guide/systemd.md")]
    pub mod systemd {}
    #[doc = include_str!("guide/supervisors.md")]
    pub mod supervisors {}
    #[doc = include_str!("guide/takeover.md")]
    pub mod takeover {}
    #[doc = include_str!("guide/operations.md")]
    pub mod operations {}
    #[doc = include_str!("guide/protocol.md")]
    pub mod protocol {}
    #[doc = include_str!("guide/who-serves.md")]
    pub mod who_serves {}
    #[doc = include_str!("guide/gotchas.md")]
    pub mod gotchas {}
    #[doc = include_str!("guide/migrating.md")]
    pub mod migrating {}
    #[doc = include_str!("guide/comparison.md")]
    pub mod comparison {}
    #[doc = include_str!("guide/why_not.md")]
    pub mod why_not {}
}

pub use crate::ecdysis::{Ecdysis, Starting};
pub use builder::Builder;
pub use error::Error;
pub use event::Event;
pub use exit::{Exit, ExitMode, ExitReason, Upgraded};
pub use handover::link::Transport;
pub use key::Key;
pub use listen::Socket;
pub use options::Overlap;
pub use program::Changes;
pub use seqpacket::{UnixSeqpacketConn, UnixSeqpacketListener};
pub use shutdown::{Accept, Connection, Datagram, Guard, Incoming, Readable, Shutdown};
pub use sockets::pass::Stream;
pub use sockets::Sockets;
pub use sys::peer::PeerCred;
pub use sys::spawn::Spawn;
pub use triggers::control::TakeoverSocket;
// Where version 1.1.1 has them.
#[cfg(feature = "tokio_ecdysis")]
pub use tokio_ecdysis::UnixSeqpacketListenerStream;
#[cfg(all(feature = "tokio_ecdysis", feature = "systemd_notify"))]
pub use tokio_ecdysis::{SystemdNotifier, SystemdNotifierError};
#[cfg(all(feature = "tokio_ecdysis", feature = "systemd_sockets"))]
pub use tokio_ecdysis::{SystemdSocketError, SystemdSocketsReadError};
