//! The effect of upgrades on the latency of clients.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ecdysis_bench::sys;

use crate::chain::{Chain, Server};
use crate::report::Table;
use crate::stats::Runs;
use crate::{Outcome, Summary};

const CLIENTS: usize = 2;

/// Clients send requests at a steady rate, each on a new connection, while the server is upgraded repeatedly.
pub fn latency(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let upgrades = if quick { 5 } else { 400 };
    let pace = Duration::from_micros(400);
    let (mut ratios, mut all_cut) = (Vec::new(), Vec::new());
    let mut table = Table::new(&[
        "",
        "requests inside / outside",
        "cut",
        "median, µs",
        "p99, µs",
        "p99.9, µs",
        "p99.9 inside / outside",
    ]);
    for (name, way) in
        [("this library", "way=auto"), ("this library, fork", "way=fork"), ("bare, fork", "way=bare-fork")]
    {
        let Measured { inside, outside, cut } = measure(way, upgrades, pace).map_err(|e| format!("{name}: {e}"))?;
        let ratio = inside.quantile(0.999) / outside.quantile(0.999);
        ratios.push(ratio);
        all_cut.push(cut);
        let both = |share| format!("{:.0} / {:.0}", inside.quantile(share), outside.quantile(share));
        table.row(vec![
            name.into(),
            format!("{} / {}", inside.len(), outside.len()),
            cut.to_string(),
            both(0.5),
            both(0.99),
            both(0.999),
            format!("{ratio:.2}"),
        ]);
    }
    let text = format!(
        "{upgrades} upgrades each; {CLIENTS} clients, each with a request every {} µs. A request is inside if it \
         overlaps the time from the call to the end of the old process. It is cut if it gets no response: the bare \
         handover just exits.\n\n{}",
        pace.as_micros(),
        table.markdown()
    );
    let summary = Summary {
        what: "p99.9 of request latency inside upgrades".into(),
        against: "outside; the bare handover likewise",
        measured: format!("{:.1}, bare {:.1}; {} requests cut, bare {}", ratios[0], ratios[2], all_cut[0], all_cut[2]),
        goal: "≤ 1.2",
    };
    Ok(Outcome { text, picture: None, summary: vec![summary] })
}

/// Latencies in microseconds, during and between upgrades.
struct Measured {
    inside: Runs,
    outside: Runs,
    cut: usize,
}

fn measure(way: &str, upgrades: usize, pace: Duration) -> Result<Measured, Box<dyn Error>> {
    let mut chain = Chain::start(&Server::new("server", &[way, "threads=2"]))?;
    let over = AtomicBool::new(false);
    let port = chain.port;
    let (windows, requests) = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| client(port, pace, &over))).collect();
        let mut windows = Vec::new();
        let upgraded = (0..upgrades).try_for_each(|_| {
            // Between two upgrades only one generation runs.
            thread::sleep(Duration::from_millis(20));
            let upgrade = chain.upgrade()?;
            windows.push((upgrade.asked, upgrade.ended));
            io::Result::Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for client in clients {
            requests.extend(client.join().map_err(|_| io::Error::other("a client panicked"))?);
        }
        upgraded.map(|()| (windows, requests))
    })?;
    let cut = requests.iter().filter(|request| !request.answered).count();
    let is_inside = |r: &Request| windows.iter().any(|&(from, to)| r.start <= to && r.end >= from);
    let (inside, outside): (Vec<_>, Vec<_>) = requests.into_iter().filter(|r| r.answered).partition(is_inside);
    let runs = |requests: Vec<Request>| requests.into_iter().map(|r| (r.end - r.start) as f64 / 1e3).collect();
    Ok(Measured { inside: runs(inside), outside: runs(outside), cut })
}

struct Request {
    start: u64,
    end: u64,
    answered: bool,
}

fn client(port: u16, pace: Duration, over: &AtomicBool) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut due = Instant::now();
    while !over.load(Ordering::Relaxed) {
        // Requests have fixed times, so that a slow one does not delay the next.
        due += pace;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = sys::now();
        let answered = request(port).is_ok_and(|answered| answered);
        requests.push(Request { start, end: sys::now(), answered });
    }
    requests
}

/// Sends one request on a new connection. Returns whether it was answered.
pub fn request(port: u16) -> io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    sys::reset_on_close(&stream);
    stream.write_all(b"hello\n")?;
    Ok(stream.read(&mut [0; 16])? > 0)
}
