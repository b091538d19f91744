//! The number of connections accepted per second.

use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;

use ecdysis_bench::sys;

use crate::chain::{free_port, Driven, Server};
use crate::report::{bars, Bar, Table};
use crate::stats::{ratios, Runs};
use crate::{Outcome, Summary};

/// The number of client threads, and the number of connections that each keeps open.
const LOADS: [(usize, usize); 2] = [(2, 16), (16, 1)];

/// Requests per second on persistent connections, with this library's wait between two requests.
pub fn keep_alive(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let (rounds, ms) = if quick { (1, 200) } else { (15, 500) };
    let mut table =
        Table::new(&["clients × connections", "blocking read, 1,000/s", "`next_request`, 1,000/s", "ratio"]);
    let mut summary = Vec::new();
    for (clients, window) in [(1, 1), (2, 4), (2, 32)] {
        let mut rates: [Vec<f64>; 2] = Default::default();
        for round in 0..rounds {
            // Alternate which of the two comes first.
            for i in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let way = ["way=keep-block", "way=keep"][i];
                rates[i].push(measure(way, 1, "--load-keep", clients, window, ms)?.0 / 1e3);
            }
        }
        let [block, keep] = [0, 1].map(|i: usize| rates[i].iter().copied().collect::<Runs>().show(1));
        let ratio = ratios(&rates[1], &rates[0]).show(2);
        table.row(vec![format!("{clients} × {window}"), block, keep, ratio.clone()]);
        let what = format!("keep-alive requests per second, {clients} × {window} connections");
        summary.push(Summary { what, against: "a plain blocking read", measured: ratio, goal: "≥ 0.97" });
    }
    let text = format!("{rounds} rounds of {ms} ms each; a thread for each connection.\n\n{}", table.markdown());
    Ok(Outcome { text, picture: None, summary })
}

/// Each server as in its documentation, with one accepting thread or task.
pub fn throughput(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let (rounds, ms) = if quick { (1, 200) } else { (9, 500) };
    let servers = [
        ("this library, `incoming`", "server"),
        ("ecdysis 1.1.1, blocking", "old_sync"),
        ("this library, Tokio", "tokio_server"),
        ("ecdysis 1.1.1, Tokio", "old_tokio"),
    ];
    let mut rates: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        for (i, (_, program)) in servers.into_iter().enumerate() {
            let server = Server::new(program, &["way=count"]).with("port", free_port()?);
            rates[i].push(measure_server(server, "--load", 2, 16, ms)?.0 / 1e3);
        }
    }
    let mut table = Table::new(&["", "1,000/s", "ratio to 1.1.1"]);
    for (i, (name, _)) in servers.into_iter().enumerate() {
        let runs = rates[i].iter().copied().collect::<Runs>().show(1);
        table.row(vec![name.into(), runs, ratios(&rates[i], &rates[i / 2 * 2 + 1]).show(2)]);
    }
    let summary = vec![Summary {
        what: "connections accepted per second: one thread, one Tokio task".into(),
        against: "ecdysis 1.1.1",
        measured: [0, 2].map(|i: usize| ratios(&rates[i], &rates[i + 1]).show(2)).join("; "),
        goal: "reported",
    }];
    let text = format!("{rounds} rounds of {ms} ms each, interleaved.\n\n{}", table.markdown());
    Ok(Outcome { text, picture: None, summary })
}

pub fn accept(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let (rounds, ms) = if quick { (1, 200) } else { (9, 500) };
    let mut table = Table::new(&[
        "accepting threads",
        "clients × connections",
        "blocking accept, 1,000/s",
        "`incoming`, 1,000/s",
        "ratio",
        "CPU per connection, ratio",
    ]);
    let (mut all, mut summary) = (Vec::new(), Vec::new());
    for threads in [1, 4, 16] {
        for (clients, window) in LOADS {
            let mut rates: [Vec<f64>; 2] = Default::default();
            let mut costs: [Vec<f64>; 2] = Default::default();
            for _ in 0..rounds {
                for (i, way) in ["way=block", "way=count"].into_iter().enumerate() {
                    let (rate, cpu) = measure(way, threads, "--load", clients, window, ms)?;
                    rates[i].push(rate / 1e3);
                    costs[i].push(cpu);
                }
            }
            let runs = |runs: &[f64]| runs.iter().copied().collect::<Runs>();
            table.row(vec![
                threads.to_string(),
                format!("{clients} × {window}"),
                runs(&rates[0]).show(1),
                runs(&rates[1]).show(1),
                ratios(&rates[1], &rates[0]).show(2),
                ratios(&costs[1], &costs[0]).show(2),
            ]);
            summary.push(Summary {
                what: format!("connections accepted per second, {threads} threads, {clients} × {window} clients"),
                against: "blocking accept",
                measured: ratios(&rates[1], &rates[0]).show(2),
                goal: "≥ 1.0",
            });
            if (clients, window) == LOADS[0] {
                for (rates, ours) in rates.iter().zip([false, true]) {
                    let value = runs(rates).median();
                    let name = format!("{threads} threads, {}", if ours { "incoming" } else { "blocking accept" });
                    all.push(Bar { name, value, shown: format!("{value:.1}"), ours });
                }
            }
        }
    }
    let text = format!(
        "{rounds} rounds of {ms} ms each; the server accepts and closes, the clients connect, read the end and connect \
         again, on the same cores.\n\n{}",
        table.markdown()
    );
    Ok(Outcome {
        summary,
        text,
        picture: Some(("accept.svg", bars("1,000 connections accepted per second", false, &all))),
    })
}

/// Connections per second, and CPU microseconds of the server per connection.
fn measure(
    way: &str,
    threads: usize,
    load: &str,
    clients: usize,
    window: usize,
    ms: u64,
) -> Result<(f64, f64), Box<dyn Error>> {
    measure_server(Server::new("server", &[way]).with("threads", threads), load, clients, window, ms)
}

fn measure_server(
    server: Server,
    load: &str,
    clients: usize,
    window: usize,
    ms: u64,
) -> Result<(f64, f64), Box<dyn Error>> {
    let mut server = Driven::spawn(server.command()?)?;
    let port = server.expect("port")?;
    let port = port.0.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let how = load;
    let mut load = Command::new(std::env::current_exe()?);
    load.args([how, &port, &clients.to_string(), &window.to_string()]).stdout(Stdio::piped());
    let mut load = Driven::spawn(load)?;
    load.expect("loading")?;
    let mut rate = |ms| {
        server.tell(&format!("measure {ms}"))?;
        server.expect("rate")
    };
    // The first tenth of the time is a warm-up.
    rate(ms / 10)?;
    let rate = rate(ms)?;
    Ok((rate.number("per_second")?, rate.number("cpu_us")?))
}

/// The clients, in a separate process that runs until it is killed: `--load PORT THREADS WINDOW`, or `--load-keep` for
/// persistent connections.
pub fn load(args: impl Iterator<Item = String>, keep: bool) -> io::Result<()> {
    let numbers: Vec<usize> = args.filter_map(|n| n.parse().ok()).collect();
    let [port, threads, window] = numbers[..] else { return Err(io::ErrorKind::InvalidInput.into()) };
    let connect = move || {
        let stream = TcpStream::connect(("127.0.0.1", port as u16))?;
        sys::reset_on_close(&stream);
        io::Result::Ok(stream)
    };
    let client = move || {
        let mut open = (0..window).map(|_| connect()).collect::<io::Result<VecDeque<_>>>()?;
        if keep {
            loop {
                open.iter_mut().try_for_each(|stream| stream.write_all(b"a request\n"))?;
                open.iter_mut().try_for_each(|stream| stream.read_exact(&mut [0; 7]))?;
            }
        }
        while let Some(mut oldest) = open.pop_front() {
            let _ = oldest.read(&mut [0]);
            drop(oldest);
            open.push_back(connect()?);
        }
        io::Result::Ok(())
    };
    let clients: Vec<_> = (0..threads).map(|_| thread::spawn(client)).collect();
    ecdysis_bench::say("loading");
    clients.into_iter().for_each(|client| drop(client.join()));
    Ok(())
}
