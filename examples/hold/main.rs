//! Starts a server and keeps one PID while the server is upgraded, for containers, runit, s6, supervisord and terminals.
//!
//!     cargo build --examples && cd target/debug/examples
//!     ./hold -- ./echo 127.0.0.1:7000 &     # hold: started pid=4712 …
//!     kill -HUP $!                          # the server is upgraded, and hold keeps its PID
//!     kill $!                               # or `fg` and Ctrl-C: the server drains, and hold exits with its status
//!
//! `cargo install --path . --example hold` installs it. The guide's chapter on supervisors shows how each supervisor runs it.
//!
//! An upgrade changes the PID of a service. Supervisors other than systemd know only one PID, and treat the end of that
//! process as the end of the service. `hold` runs between the two and never changes its PID:
//!
//! - It forwards each signal to the generation that serves, and reaps every process that ends (as PID 1, or as a subreaper).
//! - It is a service manager for sd_notify(3). A server with `Builder::systemd_notify` and `systemd_sockets` reports which
//!   generation serves, and stores its listeners. A server without them works too; `hold` finds it by its command line.
//! - If a generation has served and then crashes, `hold` restarts it and passes the stored listeners by `LISTEN_FDS`. New
//!   connections wait in the queue until then, and none is refused.
//! - At a stop (SIGTERM, SIGINT, a closed terminal, or by the server itself) it waits for every generation, with a deadline.
//!
//! The server runs in its own session, so Ctrl-C reaches only `hold`, which forwards it to the server once.
//!
//!     hold [options] -- program args…
//!       --check "ARGS"         before each upgrade, run the program with these arguments; upgrade only if it succeeds
//!       --upgrade-signal NAME  the signal that requests an upgrade (HUP); used only by --check
//!       --stop-timeout SECS    how long a stop may take before all processes are killed (90); the server may extend it
//!       --restarts N/SECS      restart a crashed server at most N times in SECS (5/60); 0/1 is never
//!       --store N              the maximum number of stored descriptors (256)
//!       --watchdog SECS        how long the server may be silent before it counts as hung (no watchdog)
//!       --notify-fd N          write a line to this descriptor when the server is ready, as s6 requires
//!
//! The exit code says what happened:
//!
//!     0…122   the service has ended: the status of the last generation
//!     123     it crashed more often than --restarts allows
//!     124     the stop took too long, and the remaining processes were killed
//!     125     hold itself failed, or wrong usage
//!     126,127 the program cannot be executed, or does not exist
//!     128+N   signal N ended the last generation
//!
//! `hold` accepts messages only from the serving generation. A generation that was replaced may still report progress of its
//! drain. Messages of any other process are refused, logged and counted. Configure the supervisor to wait longer than
//! `--stop-timeout`: if it kills `hold` outside of a container, the server continues without it.

mod generations;
mod message;
mod options;
mod process;
mod service;
mod signals;
mod start;
mod store;
#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;

/// The exit codes of `hold` itself.
pub const CRASHED: u8 = 123;
pub const KILLED: u8 = 124;
pub const FAILED: u8 = 125;

fn main() -> ExitCode {
    support::help(include_str!("main.rs"));
    let options = match options::Options::parse() {
        Ok(options) => options,
        Err(error) => {
            say(&format!("{error}; see hold --help"));
            return ExitCode::from(FAILED);
        }
    };
    match service::Service::start(options).and_then(service::Service::run) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say(&error.to_string());
            ExitCode::from(FAILED)
        }
    }
}

/// Logs a line.
pub fn say(line: &str) {
    support::say(format!("hold: {line}"));
}
