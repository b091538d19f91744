//! How many connections a second are accepted.

use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, Read};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;

use ecdysis_bench::sys;

use crate::chain::{Driven, Server};
use crate::report::{bars, Bar, Table};
use crate::stats::{ratios, Runs};
use crate::{Outcome, Summary};

/// Client threads, and how many connections each of them keeps open.
const LOADS: [(usize, usize); 2] = [(2, 16), (16, 1)];

pub fn accept(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let (rounds, ms) = if quick { (1, 200) } else { (9, 500) };
    let mut table = Table::new(&[
        "accepting threads",
        "clients × connections",
        "blocking accept, 1,000/s",
        "`incoming`, 1,000/s",
        "ratio",
        "CPU a connection, ratio",
    ]);
    let (mut all, mut summary) = (Vec::new(), Vec::new());
    for threads in [1, 4, 16] {
        for (clients, window) in LOADS {
            let mut rates: [Vec<f64>; 2] = Default::default();
            let mut costs: [Vec<f64>; 2] = Default::default();
            for _ in 0..rounds {
                for (i, way) in ["way=block", "way=count"].into_iter().enumerate() {
                    let (rate, cpu) = measure(way, threads, clients, window, ms)?;
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

/// Connections a second, and CPU microseconds of the server for one.
fn measure(way: &str, threads: usize, clients: usize, window: usize, ms: u64) -> Result<(f64, f64), Box<dyn Error>> {
    let mut server = Driven::spawn(Server::new("server", &[way]).with("threads", threads).command()?)?;
    let port = server.expect("port")?;
    let port = port.0.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut load = Command::new(std::env::current_exe()?);
    load.args(["--load", &port, &clients.to_string(), &window.to_string()]).stdout(Stdio::piped());
    let mut load = Driven::spawn(load)?;
    load.expect("loading")?;
    let mut rate = |ms| {
        server.tell(&format!("measure {ms}"))?;
        server.expect("rate")
    };
    // The first tenth of the time warms up.
    rate(ms / 10)?;
    let rate = rate(ms)?;
    Ok((rate.number("per_second")?, rate.number("cpu_us")?))
}

/// The clients, in a process of their own: `--load PORT THREADS WINDOW`. Until it is killed.
pub fn load(args: impl Iterator<Item = String>) -> io::Result<()> {
    let numbers: Vec<usize> = args.filter_map(|n| n.parse().ok()).collect();
    let [port, threads, window] = numbers[..] else { return Err(io::ErrorKind::InvalidInput.into()) };
    let connect = move || {
        let stream = TcpStream::connect(("127.0.0.1", port as u16))?;
        sys::reset_on_close(&stream);
        io::Result::Ok(stream)
    };
    let client = move || {
        let mut open = (0..window).map(|_| connect()).collect::<io::Result<VecDeque<_>>>()?;
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
