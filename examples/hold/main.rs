//! Starts a server and keeps one PID while the server is upgraded, for containers, runit, s6, supervisord and terminals.
//!
//!     cargo build --examples && cd target/debug/examples
//!     ./hold -- ./echo 127.0.0.1:7000       # hold: started pid=4712 …
//!     kill -HUP $(pgrep -x hold)            # in a second terminal: the server is upgraded, and hold stays
//!     kill $(pgrep -x hold)                 # or Ctrl-C in the first: the server drains, and hold exits with its status
//!
//! `cargo install --path . --example hold` installs it. The guide's chapter on supervisors shows how each of them runs it.
//!
//! An upgrade changes the PID of a service. Supervisors other than systemd know one PID, and take the end of that process
//! for the end of the service. `hold` between the two never changes its PID:
//!
//! - it sends each signal on to the generation that serves, and reaps whatever ends (it is PID 1, or a subreaper);
//! - it speaks sd_notify(3) with the server, so a server with `Builder::systemd_notify` and `systemd_sockets` reports
//!   which generation serves, and stores its listeners; a server without them works too, and is known by its command line;
//! - a generation that has served and then crashes is started again, and gets the stored listeners back by `LISTEN_FDS`:
//!   connections wait in their queues meanwhile, and none is refused;
//! - a stop (SIGTERM, SIGINT, the terminal's end, or the server's own) waits for every generation, with a deadline.
//!
//! The server and its generations are a session of their own, so Ctrl-C reaches `hold` alone, and the server once.
//!
//!     hold [options] -- program args…
//!       --check "ARGS"         before an upgrade, run the program with these arguments instead; a failure is no upgrade
//!       --upgrade-signal NAME  which signal asks for one (HUP); only --check needs to know
//!       --stop-timeout SECS    how long a stop may take before what is left is killed (90); the server may extend it
//!       --restarts N/SECS      how often a crashed server is started again (5/60); 0/1 is never
//!       --store N              how many descriptors are stored at most (256)
//!       --watchdog SECS        how long the server may be silent before it counts as hung (not watched)
//!       --notify-fd N          write a line to this descriptor when the server is ready, as s6 asks for
//!
//! The exit code tells what happened:
//!
//!     0…122   the service is over: the status of the last generation
//!     123     it crashed more often than --restarts allows
//!     124     the stop took too long, and what was left was killed
//!     125     hold itself failed, or wrong usage
//!     126,127 the program cannot be executed, is not there
//!     128+N   the last generation was ended by signal N
//!
//! Only the serving generation is believed. One that was replaced may still report that its drain makes progress. Messages
//! of any other process are refused, logged and counted. Configure the supervisor to wait longer than `--stop-timeout`: if it
//! kills `hold` outside of a container, the server continues without it.

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
