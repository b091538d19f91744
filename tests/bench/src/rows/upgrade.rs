//! The duration of an upgrade.

use std::error::Error;
use std::io;
use std::path::Path;

use ecdysis_bench::sys;

use crate::chain::{free_port, Chain, Driven, Server};
use crate::report::{bars, Bar, Table};
use crate::stats::{ratios, Runs};
use crate::{Outcome, Summary};

/// A measured server, with its name in the table.
type Who = (&'static str, Server);

const OURS: &str = "this library";

/// Upgrades each in turn, for several rounds. Returns the times in milliseconds.
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

/// Returns the ratio to each of those in `to`.
fn compare(who: &[Who], times: &[Vec<f64>], to: &[usize]) -> String {
    let ratio_to = to.iter().map(|to| format!("ratio to {}", who[*to].0));
    let head: Vec<_> = ["".to_owned(), "ms, median (quartiles)".into()].into_iter().chain(ratio_to).collect();
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for ((name, _), runs) in who.iter().zip(times) {
        let show = runs.iter().copied().collect::<Runs>().show(2);
        let ratios = to.iter().map(|to| ratios(runs, &times[*to]).show(2));
        table.row([(*name).into(), show].into_iter().chain(ratios).collect());
    }
    format!("{} upgrades each.\n\n{}", times[0].len(), table.markdown())
}

/// Returns the bare handover with the smallest median. The bare handovers come first.
fn cheapest(times: &[Vec<f64>]) -> usize {
    let median = |at: &usize| times[*at].iter().copied().collect::<Runs>().median();
    (0..times.len()).min_by(|a, b| median(a).total_cmp(&median(b))).unwrap_or(0)
}

fn picture(title: &str, who: &[Who], times: &[Vec<f64>]) -> String {
    let bar = |((name, _), times): (&Who, &Vec<f64>)| {
        let value = times.iter().copied().collect::<Runs>().median();
        Bar { name: (*name).into(), value, shown: format!("{value:.1} ms"), ours: name.starts_with(OURS) }
    };
    bars(title, true, &who.iter().zip(times).map(bar).collect::<Vec<_>>())
}

/// Compares with the least that is possible: the same binary, the same number of processes, no probation, no sleep.
pub fn against_bare(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let mut who = vec![
        ("bare, fork", Server::new("server", &["way=bare-fork"])),
        ("bare, vfork", Server::new("server", &["way=bare-vfork"])),
        ("bare, shared memory", Server::new("server", &["way=bare-vm"])),
        (OURS, Server::new("server", &["way=auto"])),
        ("this library, fork", Server::new("server", &["way=fork"])),
    ];
    if let Some(Some(other)) = crate::AGAINST.get() {
        who.push(("another build", Server::new(other, &["way=auto"])));
        who.push(("another build, fork", Server::new(other, &["way=fork"])));
    }
    let times = interleaved(&who, if quick { 5 } else { 200 }, |upgrade| upgrade.call)?;
    let floor = cheapest(&times[..3]);
    let text = format!(
        "Bare is a hand-written handover in the same binary: fork (or the vfork of posix_spawn, or clone with \
         CLONE_VM), execve, and a byte in a pipe that means ready.\n\n{}",
        compare(&who, &times, &[floor, 0])
    );
    let (to_floor, to_fork) = (ratios(&times[3], &times[floor]).show(2), ratios(&times[3], &times[0]).show(2));
    let summary = vec![Summary {
        what: "one upgrade, one listener, call to commit".into(),
        against: "the cheapest handover by hand, with execve and a pipe byte; the one with fork",
        measured: format!("{to_floor}; {to_fork}"),
        goal: "reported; ≤ 1.15",
    }];
    Ok(Outcome { text, picture: None, summary })
}

/// Compares with version 1.1.1 of the crate with the same name.
pub fn against_old(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let who = [
        (OURS, Server::new("server", &["way=auto", "trigger=signal"])),
        ("bare, shared memory", Server::new("server", &["way=bare-vm", "trigger=signal"])),
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
    Ok(Outcome { text: compare(&who, &times, &[0]), picture: Some(("upgrade.svg", picture)), summary })
}

/// Measures static binaries, because the dynamic loader takes much of a small process's start.
pub fn of_static(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let linked = [
        ("dynamic", "", None),
        ("static-pie", "-Ctarget-feature=+crt-static", Some("static-pie")),
        ("static, no PIE", "-Ctarget-feature=+crt-static -Crelocation-model=static", Some("static")),
    ];
    let mut who = Vec::new();
    for (name, flags, folder) in linked {
        let program = match folder {
            None => "server".into(),
            Some(folder) => {
                crate::build(&["--bin", "server"], flags, Some(folder))?;
                format!("../{folder}/{}/release/server", crate::TARGET)
            }
        };
        who.push((name, Server::new(program, &["way=auto"])));
    }
    let times = interleaved(&who, if quick { 5 } else { 100 }, |upgrade| upgrade.call)?;
    let summary = vec![Summary {
        what: "one upgrade of a static binary: static-pie, no PIE".into(),
        against: "the same, dynamic",
        measured: [1, 2].map(|at: usize| ratios(&times[at], &times[0]).show(2)).join("; "),
        goal: "reported",
    }];
    Ok(Outcome { text: compare(&who, &times, &[0]), picture: None, summary })
}

/// Measures the cost of each listener.
pub fn listeners(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let counts: &[usize] = if quick { &[1, 100] } else { &[1, 100, 1000, 5000] };
    let ways: [&[&str]; 3] = [&["way=auto"], &["way=auto", "transport=socket"], &["way=bare-vm"]];
    let server = |way: &[&str], count: &usize| Server::new("server", way).with("listeners", count);
    let who: Vec<Who> = ways.iter().flat_map(|way| counts.iter().map(|n| (way[0], server(way, n)))).collect();
    let times = interleaved(&who, if quick { 3 } else { 25 }, |upgrade| upgrade.call)?;
    let [ours, socket, bare] = [0, 1, 2].map(|way: usize| &times[way * counts.len()..][..counts.len()]);

    let mut table = Table::new(&[
        "listeners",
        "this library, ms",
        "ratio to one listener",
        "µs a listener more",
        "through a socket, ms",
        "bare, shared memory, ms",
        "ratio to bare",
    ]);
    let mut all = Vec::new();
    for (at, count) in counts.iter().enumerate() {
        let [ours_n, socket_n, bare_n] = [ours, socket, bare].map(|times| times[at].iter().copied().collect::<Runs>());
        let one = ours[0].iter().copied().collect::<Runs>().median();
        let more = (ours_n.median() - one) * 1e3 / (count - 1) as f64;
        table.row(vec![
            count.to_string(),
            ours_n.show(2),
            ratios(&ours[at], &ours[0]).show(2),
            if at == 0 { "–".into() } else { format!("{more:.2}") },
            socket_n.show(2),
            bare_n.show(2),
            ratios(&ours[at], &bare[at]).show(2),
        ]);
        let value = ours_n.median();
        all.push(Bar { name: format!("{count} listeners"), value, shown: format!("{value:.1} ms"), ours: true });
    }
    let text =
        format!("{} upgrades each. Through a socket is `Transport::Socket`.\n\n{}", times[0].len(), table.markdown());
    let summary =
        [(1000, "1,000", "≤ 3.0 ms"), (5000, "5,000", "≤ 13 ms")].into_iter().filter_map(|(many, name, goal)| {
            let at = counts.iter().position(|&count| count == many)?;
            let ms = ours[at].iter().copied().collect::<Runs>().show(2);
            let measured = format!("{ms} ms; {} times", ratios(&ours[at], &bare[at]).show(2));
            Some(Summary {
                what: format!("one upgrade, {name} listeners"),
                against: "the same by hand",
                measured,
                goal,
            })
        });
    let summary = summary.collect();
    Ok(Outcome {
        summary,
        text,
        picture: Some(("listeners.svg", bars("One upgrade with many listeners", false, &all))),
    })
}

/// Compares a process that takes over with one that inherits, from the command that starts it to the commit.
pub fn takeover(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let counts: &[usize] = if quick { &[1, 100] } else { &[1, 1000] };
    let mut table = Table::new(&["listeners", "inheritance, ms", "takeover, ms", "ratio"]);
    let mut summary = Vec::new();
    for count in counts {
        let server = |way: &[&str]| Server::new("server", way).with("listeners", count);
        let mut inheriting = Chain::start(&server(&["way=auto", "trigger=signal"]))?;
        let place = std::env::temp_dir().join(format!("ecdysis-bench-{}.socket", std::process::id()));
        let _removed = Removed(&place);
        let taking = server(&["trigger=signal"]).with("takeover", place.display()).with("port", free_port()?);
        let mut serving = Driven::spawn(taking.command()?)?;
        serving.expect("serving")?;
        let (mut inherited, mut taken) = (Vec::new(), Vec::new());
        for round in 0..if quick { 3 } else { 40 } {
            let upgrade = inheriting.upgrade()?;
            let asked = sys::now();
            let mut next = Driven::spawn(taking.command()?)?;
            next.expect("serving")?;
            let committed: u64 = serving.expect("upgraded")?.number("at")?;
            std::mem::replace(&mut serving, next).finish()?;
            // The first round warms up.
            if round > 0 {
                inherited.push((upgrade.committed - upgrade.asked) as f64 / 1e6);
                taken.push((committed - asked) as f64 / 1e6);
            }
        }
        let show = |times: &[f64]| times.iter().copied().collect::<Runs>().show(2);
        let ratio = ratios(&taken, &inherited).show(2);
        table.row(vec![count.to_string(), show(&inherited), show(&taken), ratio.clone()]);
        if *count == 1000 {
            let what = "takeover of 1,000 listeners".into();
            summary.push(Summary { what, against: "inheritance of the same", measured: ratio, goal: "reported" });
        }
    }
    let text =
        format!("From the signal, or the start of the process that takes over, to the commit.\n\n{}", table.markdown());
    Ok(Outcome { text, picture: None, summary })
}

/// Removes a file that a killed server leaves behind.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}
