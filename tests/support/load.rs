//! Clients that send requests all the time, each on a new connection, and record every failure. The request is that of
//! the demo.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::request::{Client, Failure};
use super::DEADLINE;

pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    gate: Arc<Gate>,
    clients: Vec<JoinHandle<Counts>>,
}

/// How long a process may take to answer a connection that it has accepted. Less than the 5 seconds of the protocol.
const ANSWERING: Duration = Duration::from_secs(3);

/// A gate that can hold the clients back.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    under_way: AtomicUsize,
}

impl Gate {
    /// Announces a request before it checks the gate, so that closing the gate either sees the request or prevents it.
    fn enter(&self) -> bool {
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let open = !self.closed.load(Ordering::SeqCst);
        if !open {
            self.leave();
        }
        open
    }

    fn leave(&self) {
        self.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

/// While this exists, no client begins a request.
pub struct Quiet(Arc<Gate>);

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
    }
}

/// The results of the requests.
#[derive(Debug, Default)]
pub struct Counts {
    pub requests: u64,
    /// The number of failures by kind of error.
    pub failures: BTreeMap<String, u64>,
}

impl Counts {
    #[track_caller]
    pub fn assert_none_failed(&self) {
        assert!(self.requests > 0, "there was no load");
        assert!(self.failures.is_empty(), "{self:?}");
    }
}

impl Load {
    /// Starts clients of one address, at full speed.
    pub fn on(addr: &str, clients: usize) -> Self {
        Self::start(vec![addr.to_owned(); clients], Duration::ZERO)
    }

    /// Starts one client per address, with a pause between its requests.
    pub fn paced(addrs: &[String], pause: Duration) -> Self {
        Self::start(addrs.to_vec(), pause)
    }

    fn start(addrs: Vec<String>, pause: Duration) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let gate = Arc::<Gate>::default();
        let run = |addr: String| {
            let (stop, answered, gate) = (stop.clone(), answered.clone(), gate.clone());
            let mut client = Client::new(addr.parse().unwrap(), DEADLINE);
            thread::spawn(move || {
                let mut counts = Counts::default();
                // Each client sends a request, even if a loaded machine runs it only after the stop.
                let mut has_asked = false;
                while !(has_asked && stop.load(Ordering::Relaxed)) {
                    if !gate.enter() {
                        has_asked |= stop.load(Ordering::Relaxed);
                        thread::park_timeout(Duration::from_millis(1));
                        continue;
                    }
                    has_asked = true;
                    let answer = client.ask();
                    gate.leave();
                    match answer {
                        Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                        // The request was never sent.
                        Err(e) if Failure::of(&e) == Failure::NoPort => thread::yield_now(),
                        Err(e) => *counts.failures.entry(format!("{:?}: {e}", Failure::of(&e))).or_default() += 1,
                    }
                    if !pause.is_zero() {
                        thread::park_timeout(pause);
                    }
                }
                counts
            })
        };
        let clients = addrs.into_iter().map(run).collect();
        Self { stop, answered, gate, clients }
    }

    /// Waits until running requests are answered, and lets no new one begin, so that a process can be killed without
    /// losing accepted connections. A request that still waits then is in a queue: no process has accepted it, and it
    /// must not be lost.
    #[must_use]
    pub fn quiet(&self) -> Quiet {
        self.gate.closed.store(true, Ordering::SeqCst);
        let until = Instant::now() + ANSWERING;
        while self.gate.under_way.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            thread::park_timeout(Duration::from_millis(1));
        }
        Quiet(self.gate.clone())
    }

    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub fn stop(mut self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Counts { requests: self.answered(), ..Counts::default() };
        for client in self.clients.drain(..) {
            client.thread().unpark();
            for (kind, count) in client.join().unwrap().failures {
                *sum.failures.entry(kind).or_default() += count;
            }
        }
        sum.requests = self.answered() + sum.failures.values().sum::<u64>();
        sum
    }
}

/// A failing test stops its clients too.
impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
