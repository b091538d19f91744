//! The cost of many tasks and guards.

use std::error::Error;

use crate::chain::{Driven, Server};
use crate::report::Table;
use crate::stats::{ratios, Runs};
use crate::{Outcome, Summary};

pub fn tasks(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let rounds = if quick { 1 } else { 9 };
    let mut turns: [Vec<f64>; 2] = Default::default();
    for _ in 0..rounds {
        for (i, way) in ["way=over", "way=watch"].into_iter().enumerate() {
            let mut server = Driven::spawn(Server::new("tokio_server", &[way]).command()?)?;
            turns[i].push(server.expect("turn")?.number("ns")?);
        }
    }
    let show = |runs: &[f64], digits| runs.iter().copied().collect::<Runs>().show(digits);
    let mut table = Table::new(&["", "measured"]);
    let turn = format!("{} ns", show(&turns[0], 0));
    table.row(vec!["`over()` created again in each turn of a `select!`, 64 tasks, per turn".into(), turn.clone()]);
    table.row(vec!["the same with Tokio's `watch`".into(), format!("{} ns", show(&turns[1], 0))]);
    for (what, way) in [("10,000 guards that a thread drops", "way=drain-guards"), ("10,000 tasks", "way=drain-tasks")]
    {
        let mut times = Vec::new();
        for _ in 0..rounds {
            let mut server = Driven::spawn(Server::new("tokio_server", &[way]).command()?)?;
            server.expect("ready")?;
            server.tell("stop")?;
            times.push(server.expect("drained")?.number::<f64>("ns")? / 1e6);
        }
        table.row(vec![format!("from a stop to the end of the drain, {what}"), format!("{} ms", show(&times, 2))]);
    }
    let summary = vec![Summary {
        what: "`over()` in a `select!`, 64 tasks".into(),
        against: "Tokio's `watch`",
        measured: format!("{turn}; {} times", ratios(&turns[0], &turns[1]).show(2)),
        goal: "≤ 300 ns",
    }];
    Ok(Outcome { text: table.markdown(), picture: None, summary })
}
