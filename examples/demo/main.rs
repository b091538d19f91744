//! Upgrades a server repeatedly under load, and counts the requests that fail.
//!
//!     cargo run --release --example demo
//!
//! It shows a progress line, and after about 11 seconds a table, in which no request should have failed. Options:
//!
//!     --upgrades N     how many times the server is replaced (40)
//!     --every MS       time from one SIGHUP to the next (250)
//!     --clients N      threads that send requests at full speed (8)
//!     --keep-alive     each client keeps its connection until an answer announces that it ends
//!     --http           the same with HTTP/1.1
//!     --unix, --udp    over a Unix socket; over UDP, compared with a run without upgrades
//!     --tokio          the server runs on Tokio; needs `--features tokio`
//!     --json           print one line of JSON, and the table on stderr
//!     --plot FILE.svg  draw latency over time, with each upgrade marked
//!     --picture F.svg  draw one upgrade, in milliseconds: which generation answers when
//!     --timeout MS     the longest wait for an answer, a commit or the end of the server (5000)
//!
//! Exit status: 1 if any request or upgrade failed, 2 if the options are wrong, 130 after Ctrl-C.
//!
//! `server.rs` is the server, which is this program in another process. `load.rs` contains the clients, and `request.rs` one
//! request. `operator.rs` starts, upgrades and ends the server. `report.rs`, `plot.rs` and `picture.rs` show the result.

mod load;
mod operator;
mod picture;
mod plot;
mod report;
mod request;
mod server;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "tokio_ecdysis")]
mod tokio_server;

use load::{now, Load};
use operator::Operator;
use request::Use;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

pub struct Options {
    upgrades: usize,
    every: Duration,
    clients: usize,
    transport: Transport,
    connections: Use,
    tokio: bool,
    json: bool,
    plot: Option<PathBuf>,
    picture: Option<PathBuf>,
    timeout: Duration,
    /// Run as the server.
    serve: bool,
    /// The server's address. By default it depends on the transport.
    listen: String,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Transport {
    Tcp,
    Unix,
    Udp,
}

impl Options {
    fn parse() -> Result<Options, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Options {
            upgrades: 40,
            every: Duration::from_millis(250),
            clients: 8,
            transport: Transport::Tcp,
            connections: Use::Once,
            tokio: false,
            json: false,
            plot: None,
            picture: None,
            timeout: Duration::from_secs(5),
            serve: false,
            listen: String::new(),
        };
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                Long("upgrades") => options.upgrades = args.value()?.parse()?,
                Long("every") => options.every = Duration::from_millis(args.value()?.parse()?),
                Long("clients") => options.clients = args.value()?.parse::<usize>()?.max(1),
                Long("keep-alive") => options.connections = Use::KeepAlive,
                Long("http") => options.connections = Use::Http,
                Long("unix") => options.transport = Transport::Unix,
                Long("udp") => options.transport = Transport::Udp,
                Long("tokio") if !cfg!(feature = "tokio_ecdysis") => {
                    return Err("--tokio needs a build with --features tokio".into());
                }
                Long("tokio") => options.tokio = true,
                Long("json") => options.json = true,
                Long("plot") => options.plot = Some(args.value()?.into()),
                Long("picture") => options.picture = Some(args.value()?.into()),
                Long("timeout") => options.timeout = Duration::from_millis(args.value()?.parse()?),
                Long("serve") => options.serve = true,
                Long("listen") => options.listen = args.value()?.string()?,
                other => return Err(other.unexpected()),
            }
        }
        if options.transport == Transport::Udp && options.connections != Use::Once {
            return Err("--udp has no connections to keep".into());
        }
        if options.listen.is_empty() {
            options.listen = match options.transport {
                Transport::Tcp => "127.0.0.1:0".into(),
                // An abstract name, so that no file is left behind.
                Transport::Unix => format!("unix:@ecdysis-demo-{}", process::id()),
                Transport::Udp => "udp:127.0.0.1:0".into(),
            };
        }
        Ok(options)
    }

    /// At most half the time between two signals, because a generation upgrades only after its probation. A real server should keep
    /// the default of one second.
    pub fn probation(&self) -> Duration {
        (self.every / 2).min(Duration::from_secs(1))
    }
}

fn main() -> ExitCode {
    support::help(include_str!("main.rs"));
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("demo: {error}");
            return ExitCode::from(2);
        }
    };
    let result = if options.serve { serve(&options).map(|()| ExitCode::SUCCESS) } else { demo(&options) };
    result.unwrap_or_else(|error| {
        eprintln!("demo: {error}");
        ExitCode::FAILURE
    })
}

fn serve(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "tokio_ecdysis")]
    if options.tokio {
        return tokio_server::serve(options);
    }
    server::serve(options)
}

fn demo(options: &Options) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut operator = Operator::start(options)?;
    let target = operator.address.parse()?;

    let mut baseline = None;
    if options.transport == Transport::Udp {
        // UDP may lose a datagram at any time, so first measure the loss without an upgrade.
        let time = (options.every * options.upgrades as u32 / 3).max(Duration::from_millis(200));
        let load = Load::start(&target, options, false);
        let mut progress = Progress::new("without upgrades");
        let waited = operator.watch(Instant::now() + time, || progress.show(&load, ""));
        baseline = Some(load.stop());
        waited?;
    }

    let draws = options.plot.is_some() || options.picture.is_some();
    let load = Load::start(&target, options, draws);
    let start = now();
    let problem = drive(options, &mut operator, &load).err();
    let seen = load.stop();
    // The clients have read their last answers. The server must now stop cleanly.
    let problem = match (problem, operator.end()) {
        (Some(problem), _) => Some(problem),
        (None, ended) => ended.err(),
    };

    let report = report::Report { options, baseline, seen, operator: &operator, start, problem: problem.as_ref() };
    if options.json {
        eprint!("{}", report.table());
        println!("{}", report.json());
    } else {
        print!("{}", report.table());
    }
    for (file, draw) in [(&options.plot, plot::draw as fn(&_) -> _), (&options.picture, picture::draw)] {
        if let Some(file) = file {
            std::fs::write(file, draw(&report)?).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
            eprintln!("drawn: {}", file.display());
        }
    }
    Ok(match problem {
        Some(operator::Problem::Interrupted) => ExitCode::from(130),
        _ if report.good() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Waits and upgrades repeatedly. Returns at the first step that does not finish in time.
fn drive(options: &Options, operator: &mut Operator, load: &Load) -> Result<(), operator::Problem> {
    let mut progress = Progress::new("");
    let (mut failed, mut last) = (0, String::new());
    let mut next = Instant::now() + options.every;
    for number in 0..=options.upgrades {
        let text = format!("upgrade {number}/{}  generation {}{last}", options.upgrades, operator.generation);
        operator.watch(next, || progress.show(load, &text))?;
        next = Instant::now() + options.every;
        if number == options.upgrades {
            break;
        }
        operator.verdict()?; // the signal must go to the new process, so wait for the verdict
        load.shared.window.open(now());
        let upgrade = operator.upgrade()?;
        load.shared.window.close(upgrade.end);
        last = match &upgrade.error {
            None => format!("  last one {:.1} ms", upgrade.ms()),
            Some(_) => {
                failed += 1;
                format!("  {failed} upgrades failed")
            }
        };
    }
    operator.verdict()
}

/// A progress line: updated in place on a terminal, or one line per second elsewhere.
struct Progress {
    label: &'static str,
    terminal: bool,
    start: Instant,
    last: Instant,
    answered: u64,
}

impl Progress {
    fn new(label: &'static str) -> Progress {
        let (terminal, start) = (io::stderr().is_terminal(), Instant::now());
        Progress { label, terminal, start, last: start, answered: 0 }
    }

    /// May be called every few milliseconds; writes less often.
    fn show(&mut self, load: &Load, text: &str) {
        let since = self.last.elapsed();
        if since < Duration::from_millis(if self.terminal { 200 } else { 1000 }) {
            return;
        }
        let (answered, failed) = (load.shared.answered.load(Relaxed), load.shared.failed.load(Relaxed));
        let rate = (answered - self.answered) as f64 / since.as_secs_f64();
        let line = format!(
            "{:5.1} s  {}{text}  {rate:.0} requests/s  {failed} failed",
            self.start.elapsed().as_secs_f64(),
            self.label
        );
        let _ = if self.terminal { write!(io::stderr(), "\r\x1b[K{line}") } else { writeln!(io::stderr(), "{line}") };
        (self.last, self.answered) = (Instant::now(), answered);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
