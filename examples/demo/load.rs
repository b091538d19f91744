//! The clients: threads that send requests at full speed, and their results.

use crate::request::{Client, Failure, Target};
use crate::Options;
use hdrhistogram::Histogram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A request counts as "during an upgrade" if it overlaps the time from the signal until this long after the commit. By
/// then the old process has stopped accepting, and the new one has answered its first requests.
pub const MARGIN: Duration = Duration::from_millis(10);

/// CLOCK_MONOTONIC in ns. Not `Instant`, because it is compared with the time that the server reports for the commit.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The latest upgrade, as the clients see it. It is open until the commit is known.
pub struct Window {
    opened: AtomicU64,
    closed: AtomicU64,
}

impl Window {
    pub fn open(&self, at: u64) {
        self.closed.store(u64::MAX, Relaxed);
        self.opened.store(at, Relaxed);
    }

    pub fn close(&self, at: u64) {
        self.closed.store(at + MARGIN.as_nanos() as u64, Relaxed);
    }

    fn touches(&self, start: u64, end: u64) -> bool {
        end >= self.opened.load(Relaxed) && start <= self.closed.load(Relaxed)
    }
}

/// State that all clients share, also for the progress line.
pub struct Shared {
    pub window: Window,
    pub answered: AtomicU64,
    pub failed: AtomicU64,
    stop: AtomicBool,
}

pub struct Load {
    pub shared: Arc<Shared>,
    clients: Vec<JoinHandle<Seen>>,
    started: u64,
}

/// An answered request; start and latency in ns.
pub struct Point {
    pub start: u64,
    pub latency: u64,
    /// The generation that answered.
    pub generation: u64,
}

/// The results of the clients.
pub struct Seen {
    pub during: Histogram<u64>,
    pub between: Histogram<u64>,
    pub refused: u64,
    pub reset: u64,
    pub eof: u64,
    pub timeout: u64,
    pub other: u64,
    /// Requests that never left the client, so they are not failures of the server.
    pub no_port: u64,
    pub first_error: Option<String>,
    /// Each answered request; only for the pictures.
    pub points: Vec<Point>,
    /// When requests failed.
    pub failed_at: Vec<u64>,
    pub seconds: f64,
}

impl Seen {
    fn new() -> Seen {
        // Up to a minute in ns, exact to three digits.
        let empty = || Histogram::new_with_max(60_000_000_000, 3).expect("these bounds are allowed");
        Seen {
            during: empty(),
            between: empty(),
            refused: 0,
            reset: 0,
            eof: 0,
            timeout: 0,
            other: 0,
            no_port: 0,
            first_error: None,
            points: vec![],
            failed_at: vec![],
            seconds: 0.0,
        }
    }

    pub fn failed(&self) -> u64 {
        self.refused + self.reset + self.eof + self.timeout + self.other
    }

    pub fn requests(&self) -> u64 {
        self.during.len() + self.between.len() + self.failed()
    }

    fn add(&mut self, other: Seen) {
        self.during += other.during;
        self.between += other.between;
        self.refused += other.refused;
        self.reset += other.reset;
        self.eof += other.eof;
        self.timeout += other.timeout;
        self.other += other.other;
        self.no_port += other.no_port;
        self.first_error = self.first_error.take().or(other.first_error);
        self.points.extend(other.points);
        self.failed_at.extend(other.failed_at);
    }
}

impl Load {
    pub fn start(target: &Target, options: &Options, keep_points: bool) -> Load {
        let window = Window { opened: AtomicU64::new(u64::MAX), closed: AtomicU64::new(0) };
        let (answered, failed, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { window, answered, failed, stop });
        let client = |_| {
            let (shared, client) =
                (shared.clone(), Client::new(target.clone(), options.timeout).using(options.connections));
            thread::spawn(move || ask_until_told(client, &shared, keep_points))
        };
        let clients = (0..options.clients).map(client).collect();
        Load { shared, clients, started: now() }
    }

    /// Ends the clients. Each waits for its last answer, for at most the timeout.
    pub fn stop(self) -> Seen {
        self.shared.stop.store(true, Relaxed);
        let mut seen = Seen::new();
        for client in self.clients {
            seen.add(client.join().expect("a client thread does not panic"));
        }
        seen.seconds = (now() - self.started) as f64 / 1e9;
        seen
    }
}

fn ask_until_told(mut client: Client, shared: &Shared, keep_points: bool) -> Seen {
    let mut seen = Seen::new();
    while !shared.stop.load(Relaxed) {
        let start = now();
        let result = client.ask();
        let end = now();
        let error = match result {
            Err(error) => error,
            Ok(answer) => {
                let histogram = if shared.window.touches(start, end) { &mut seen.during } else { &mut seen.between };
                histogram.saturating_record(end - start);
                shared.answered.fetch_add(1, Relaxed);
                if keep_points {
                    seen.points.push(Point { start, latency: end - start, generation: answer.generation });
                }
                continue;
            }
        };
        let kind = Failure::of(&error);
        let count = match kind {
            Failure::Refused => &mut seen.refused,
            Failure::Reset => &mut seen.reset,
            Failure::Eof => &mut seen.eof,
            Failure::Timeout => &mut seen.timeout,
            Failure::Other => &mut seen.other,
            Failure::NoPort => &mut seen.no_port,
        };
        *count += 1;
        if kind != Failure::NoPort {
            seen.failed_at.push(end);
            shared.failed.fetch_add(1, Relaxed);
        }
        seen.first_error.get_or_insert_with(|| format!("{kind:?}: {error}"));
        // A dead server would refuse a million requests per second. With a pause before the next try, the count means more.
        thread::sleep(Duration::from_millis(10));
    }
    seen
}
