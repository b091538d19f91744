//! How long an upgrade takes.

use std::error::Error;
use std::io;

use crate::chain::{Chain, Server};
use crate::report::{bars, Bar, Table};
use crate::stats::{ratios, Runs};
use crate::{Outcome, Summary};

/// Who is measured: the name in the table, and the server.
type Who = (&'static str, Server);

const OURS: &str = "this library";

/// One upgrade of each in turn, and again; the times in milliseconds.
fn interleaved(who: &[Who], rounds: usize, time: fn(&crate::chain::Upgrade) -> u64) -> io::Result<Vec<Vec<f64>>> {
    let mut chains = Vec::new();
    for (name, server) in who {
        let chain = Chain::start(server).map_err(|e| io::Error::other(format!("{name}: {e}")))?;
        chains.push(chain);
    }
    let mut times = vec![Vec::new(); who.len()];
    // The first round warms up.
    for round in 0..=rounds {
        for ((chain, times), (name, _)) in chains.iter_mut().zip(&mut times).zip(who) {
            let upgrade = chain.upgrade().map_err(|e| io::Error::other(format!("{name}: {e}")))?;
            if round > 0 {
                times.push(time(&upgrade) as f64 / 1e6);
            }
        }
    }
    Ok(times)
}

fn compare(who: &[Who], times: &[Vec<f64>], to: usize) -> String {
    let mut table = Table::new(&["", "ms, median (quartiles)", &format!("ratio to {}", who[to].0)]);
    for ((name, _), runs) in who.iter().zip(times) {
        let show = runs.iter().copied().collect::<Runs>().show(2);
        table.row(vec![(*name).into(), show, ratios(runs, &times[to]).show(2)]);
    }
    format!("{} upgrades each.\n\n{}", times[0].len(), table.markdown())
}

fn picture(title: &str, who: &[Who], times: &[Vec<f64>]) -> String {
    let bar = |((name, _), times): (&Who, &Vec<f64>)| {
        let value = times.iter().copied().collect::<Runs>().median();
        Bar { name: (*name).into(), value, shown: format!("{value:.1} ms"), ours: name.starts_with(OURS) }
    };
    bars(title, true, &who.iter().zip(times).map(bar).collect::<Vec<_>>())
}

/// Against the least that is possible. The same binary, the same number of processes, no probation, nobody sleeps.
pub fn against_bare(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let who = [
        ("bare, fork", Server::new("server", &["way=bare-fork"])),
        ("bare, vfork", Server::new("server", &["way=bare-vfork"])),
        ("bare, shared memory", Server::new("server", &["way=bare-vm"])),
        (OURS, Server::new("server", &["way=auto"])),
        ("this library, fork", Server::new("server", &["way=fork"])),
    ];
    let times = interleaved(&who, if quick { 5 } else { 200 }, |upgrade| upgrade.call)?;
    let text = format!(
        "Bare is fork (or what posix_spawn does, or clone with CLONE_VM), execve, and a byte in a pipe that says ready, \
         written by hand in the same binary.\n\n{}",
        compare(&who, &times, 0)
    );
    let summary = vec![Summary {
        what: "one upgrade, one listener, call to commit".into(),
        against: "fork, execve and a pipe byte by hand",
        measured: ratios(&times[3], &times[0]).show(2),
        goal: "≤ 1.15",
    }];
    Ok(Outcome { text, picture: None, summary })
}

/// Against the library that ours is named after.
pub fn against_old(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let who = [
        (OURS, Server::new("server", &["way=auto", "trigger=signal"])),
        ("bare, fork", Server::new("server", &["way=bare-fork", "trigger=signal"])),
        ("ecdysis 1.1.1, threads", Server::new("old_sync", &["trigger=signal"])),
        ("ecdysis 1.1.1, Tokio", Server::new("old_tokio", &["trigger=signal"])),
    ];
    let times = interleaved(&who, if quick { 2 } else { 20 }, |upgrade| upgrade.committed - upgrade.asked)?;
    let picture = picture("One upgrade, signal to commit (logarithmic)", &who, &times);
    let faster = |against, other: &[f64]| Summary {
        what: "one upgrade, one listener, signal to commit".into(),
        against,
        measured: format!("{} times faster", ratios(other, &times[0]).show(0)),
        goal: "≥ 200 times faster",
    };
    let summary = vec![faster(who[2].0, &times[2]), faster(who[3].0, &times[3])];
    Ok(Outcome { text: compare(&who, &times, 0), picture: Some(("upgrade.svg", picture)), summary })
}

/// What a listener costs.
pub fn listeners(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let counts: &[usize] = if quick { &[1, 100] } else { &[1, 100, 1000, 5000] };
    let server = |way: &str, count: &usize| Server::new("server", &[way]).with("listeners", count);
    let ours: Vec<Who> = counts.iter().map(|n| (OURS, server("way=auto", n))).collect();
    let bare: Vec<Who> = counts.iter().map(|n| ("bare, fork", server("way=bare-fork", n))).collect();
    let both = [ours, bare].concat();
    let times = interleaved(&both, if quick { 3 } else { 25 }, |upgrade| upgrade.call)?;
    let (ours, bare) = times.split_at(counts.len());

    let mut table = Table::new(&[
        "listeners",
        "this library, ms",
        "ratio to one listener",
        "µs a listener more",
        "bare, ms",
        "ratio to bare",
    ]);
    let median = |times: &[f64]| times.iter().copied().collect::<Runs>();
    let mut all = Vec::new();
    for ((&count, ours_n), bare_n) in counts.iter().zip(ours).zip(bare) {
        let more = (median(ours_n).median() - median(&ours[0]).median()) * 1e3 / (count - 1) as f64;
        table.row(vec![
            count.to_string(),
            median(ours_n).show(2),
            ratios(ours_n, &ours[0]).show(2),
            if count == 1 { "–".into() } else { format!("{more:.2}") },
            median(bare_n).show(2),
            ratios(ours_n, bare_n).show(2),
        ]);
        let value = median(ours_n).median();
        all.push(Bar { name: format!("{count} listeners"), value, shown: format!("{value:.1} ms"), ours: true });
    }
    let summary = counts.iter().zip(ours).find(|&(&count, _)| count == 1000).map(|(_, ours_n)| Summary {
        what: "one upgrade, 1,000 listeners".into(),
        against: "one listener",
        measured: ratios(ours_n, &ours[0]).show(2),
        goal: "≤ 2",
    });
    let text = format!("{} upgrades each.\n\n{}", times[0].len(), table.markdown());
    let summary = summary.into_iter().collect();
    Ok(Outcome {
        summary,
        text,
        picture: Some(("listeners.svg", bars("One upgrade with many listeners", false, &all))),
    })
}
