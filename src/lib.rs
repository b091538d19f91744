//! Replaces a running network server with its next version without refusing, resetting or losing a connection.
//!
//! The running process starts the new program and hands it every listening socket. It keeps serving until the new
//! process reports that it is ready. Only then does it stop accepting, finish its connections, and end. If the new
//! version cannot start, crashes, hangs or refuses, the old one keeps serving, and no client notices.
//!
//! The library is small, blocking and built on system calls. By default it depends only on `libc`, `rustix` and `log`.
//! It is made for Linux; see [`guide::platforms`] for other systems.
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
//!     // The first generation binds the socket, and later ones inherit it.
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
//! One upgrade, in order. `src/upgrade` contains these steps.
//!
//! 1. Every listener that the program asked for is in the registry ([`Sockets`]), under its kind and the address that
//!    was **asked for**.
//! 2. A trigger fires: a signal, a connection to a control socket, or a call. Everything that needs memory is built
//!    now: arguments, environment, manifest.
//! 3. The parent creates a child. The child resets signals to their defaults, sets close-on-exec on every descriptor
//!    except those that are handed over, and calls execve.
//! 4. The parent waits in one poll for messages of the child, the deadline, and its triggers, which keep working.
//! 5. The child verifies that the handover in its environment is meant for it, adopts the descriptors, and sets
//!    close-on-exec on them.
//! 6. The child asks for its listeners with the same lines of code, which now claim the handed-over sockets, and sends
//!    [`ready`](Starting::ready).
//! 7. The parent stops accepting and answers `commit`. From then on the child serves. The parent keeps its sockets for
//!    the probation of one second, and accepts again if the child dies. Then it drains and ends.
//!
//! A recorded upgrade, drawn by `cargo run --release --example demo -- --picture FILE.svg`:
//!
#![doc = include_str!("guide/upgrade.svg")]
//!
//! # Guarantees and limits
//!
//! - An upgrade refuses, resets or strands no connection. But if a *new* version crashes, the connections that it has
//!   accepted are lost.
//! - A failed upgrade changes nothing, and its [`Error`] names the cause. The next attempt may follow immediately.
//! - The probation covers a child that *dies*. To catch a child that runs but answers wrongly, use your own check
//!   before `ready`, or [`Builder::verify`].
//! - The new version starts only with stdin, stdout, stderr and the handed-over descriptors, and with every signal at
//!   its default.
//! - A connection stays with the process that accepted it, until it ends or the drain's deadline cuts it. A program can
//!   also hand over individual connections ([`Sockets::pass_stream`]), together with their state.
//! - UDP sockets are handed over, but the packets of a flow are not steered, see [`guide::sockets`].
//! - A socket stays in the network namespace in which it was created.
//!
//! # Features
//!
//! None is on by default. `tokio_ecdysis` (alias `tokio`) is the asynchronous interface, in the module of that name.
//! `systemd_notify` and `systemd_sockets` (together `systemd`) are described in [`guide::systemd`].
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
mod map_err;
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

/// The guide. Each chapter can be read on its own.
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
// These are in the crate root in version 1.1.1.
#[cfg(feature = "tokio_ecdysis")]
pub use tokio_ecdysis::UnixSeqpacketListenerStream;
#[cfg(all(feature = "tokio_ecdysis", feature = "systemd_notify"))]
pub use tokio_ecdysis::{SystemdNotifier, SystemdNotifierError};
#[cfg(all(feature = "tokio_ecdysis", feature = "systemd_sockets"))]
pub use tokio_ecdysis::{SystemdSocketError, SystemdSocketsReadError};
