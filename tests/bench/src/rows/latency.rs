//! What clients feel of an upgrade.

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
use crate::Outcome;

const CLIENTS: usize = 2;

/// Clients ask at a steady pace, each request over a new connection, while the server is upgraded again and again.
pub fn latency(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let upgrades = if quick { 5 } else { 400 };
    let pace = Duration::from_micros(400);
    let mut table =
        Table::new(&["", "requests inside / outside", "median, µs", "p99, µs", "p99.9, µs", "p99.9 inside / outside"]);
    for (name, way) in
        [("this library", "way=auto"), ("this library, fork", "way=fork"), ("bare, fork", "way=bare-fork")]
    {
        let (inside, outside) = measure(way, upgrades, pace)?;
        let both = |share| format!("{:.0} / {:.0}", inside.quantile(share), outside.quantile(share));
        table.row(vec![
            name.into(),
            format!("{} / {}", inside.len(), outside.len()),
            both(0.5),
            both(0.99),
            both(0.999),
            format!("{:.2}", inside.quantile(0.999) / outside.quantile(0.999)),
        ]);
    }
    let text = format!(
        "{upgrades} upgrades each; {CLIENTS} clients, a request every {} µs each. Inside are the requests that were \
         under way at any time between the call and the end of the old process. Every request was answered.\n\n{}",
        pace.as_micros(),
        table.markdown()
    );
    Ok(Outcome { text, picture: None })
}

/// Latencies in microseconds, inside and outside upgrades.
fn measure(way: &str, upgrades: usize, pace: Duration) -> Result<(Runs, Runs), Box<dyn Error>> {
    let mut chain = Chain::start(&Server::new("server", &[way, "threads=2"]))?;
    let over = AtomicBool::new(false);
    let port = chain.port;
    let (windows, requests) = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| client(port, pace, &over))).collect();
        let mut windows = Vec::new();
        let upgraded = (0..upgrades).try_for_each(|_| {
            // Between two upgrades the clients see the server alone.
            thread::sleep(Duration::from_millis(20));
            let upgrade = chain.upgrade()?;
            windows.push((upgrade.asked, upgrade.ended));
            io::Result::Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for client in clients {
            requests.extend(client.join().map_err(|_| io::Error::other("a client panicked"))??);
        }
        upgraded.map(|()| (windows, requests))
    })?;
    let is_inside = |&(start, end): &(u64, u64)| windows.iter().any(|&(from, to)| start <= to && end >= from);
    let (inside, outside): (Vec<_>, Vec<_>) = requests.into_iter().partition(is_inside);
    let runs =
        |requests: Vec<(u64, u64)>| requests.into_iter().map(|(start, end)| (end - start) as f64 / 1e3).collect();
    Ok((runs(inside), runs(outside)))
}

/// When each request began and ended.
fn client(port: u16, pace: Duration, over: &AtomicBool) -> io::Result<Vec<(u64, u64)>> {
    let mut requests = Vec::new();
    let mut due = Instant::now();
    while !over.load(Ordering::Relaxed) {
        due += pace;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = sys::now();
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        sys::reset_on_close(&stream);
        stream.write_all(b"hello\n")?;
        let mut answer = [0; 16];
        if stream.read(&mut answer)? == 0 {
            return Err(io::Error::other("a request was not answered"));
        }
        requests.push((start, sys::now()));
    }
    Ok(requests)
}
