//! All integration tests in one program. They use real processes, signals, sockets and files.
//!
//! To add a test, write a module with `#[test]` functions and declare it here. `support` is the test bed:
//!
//!     let mut server = Server::whoami(["--listen", "127.0.0.1:0", "--probation", "20"]);
//!     let load = Load::on(&server.addr(), 2);
//!     server.upgrade();
//!     load.stop().assert_none_failed();
//!
//! A test that changes its own process (a signal handler, a limit, a started `Ecdysis`) runs in a child: see
//! `this_program`.

#[path = "../support/mod.rs"]
mod support;

mod chaos;
mod demo;
mod echo;
mod endurance;
mod environments;
mod exact_state;
mod examples;
// The tracer needs this processor's registers, and a list of calls that can fail on this system. With musl, the
// allocator maps memory in each upgrade, and std aborts a program without memory. With the fallbacks, the sweep makes
// thousands of calls.
#[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
mod faults;
mod hold;
mod keep_alive;
mod kv;
mod listeners;
#[cfg(feature = "systemd")]
mod notify;
mod one_serves;
mod operators;
mod output;
mod passing;
mod post_fork;
mod probation;
mod process;
// A sanitizer makes additional calls.
#[cfg(all(target_arch = "x86_64", target_env = "gnu", not(sanitized), not(ecdysis_unix)))]
mod seccomp;
mod sockets;
#[cfg(feature = "systemd")]
mod supervisors;
#[cfg(feature = "systemd")]
mod systemd;
mod takeover;
mod takeover_faults;
mod tidy;
#[cfg(feature = "tokio_ecdysis")]
mod tokio;
