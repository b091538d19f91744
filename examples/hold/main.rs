//! Stays while a server is upgraded: one process that keeps its PID, starts the server, and is what a container, runit, s6,
//! supervisord or a terminal sees.
//!
//!     cargo install --path . --example hold                # or: cargo run --example hold -- target/debug/examples/…
//!     hold -- echo 127.0.0.1:7000                          # hold: started pid=4712
//!     kill -HUP $(pgrep -x hold)                           # in a second terminal: the server upgrades; hold stays
//!     kill $(pgrep -x hold)                                # or Ctrl-C in the first: the server drains, hold exits with its status
//!
//! An upgrade changes the PID of a service. Supervisors other than systemd know one PID, and take its end for the end of the
//! service. With `hold` in between that PID never changes:
//!
//! - it sends each signal on to the generation that serves, and reaps whatever ends (it is PID 1, or a subreaper);
//! - it speaks sd_notify(3) with the server, so a server with `Builder::systemd_notify` and `systemd_sockets` says who
//!   serves, and stores its listeners; a server without them works too, and is known by its command line;
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
//! Which process may say what: the serving generation anything; one that it replaced, only that its drain goes on; nobody
//! else anything. Messages that are refused are logged and counted. Give the supervisor above a longer patience than
//! `--stop-timeout`: when `hold` is killed with SIGKILL outside of a container, the server goes on without it.

mod generations;
mod message;
mod options;
mod process;
mod service;
mod signals;
mod start;
mod store;

use std::io::Write;
use std::process::ExitCode;

/// The exit codes of `hold` itself.
pub const CRASHED: u8 = 123;
pub const KILLED: u8 = 124;
pub const FAILED: u8 = 125;

fn main() -> ExitCode {
    let options = match options::Options::parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            let _ = std::io::stdout().write_all(options::HELP.as_bytes());
            return ExitCode::SUCCESS;
        }
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

/// One write a line, because the server writes to the same stderr. If nobody reads it, nobody misses it.
pub fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("hold: {line}\n").as_bytes());
}
