//! How much longer an upgrade takes under `hold`, and the memory of `hold`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::chain::{Chain, Server};
use crate::report::Table;
use crate::stats::Runs;
use crate::{Outcome, Summary, HERE};

pub fn hold(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let hold = build()?;
    let server = || Server::new("server", &["way=auto", "trigger=signal"]);
    let mut chains = [Chain::start(&server())?, Chain::start(&server().below(&hold))?];
    let mut times: [[Vec<f64>; 2]; 2] = Default::default();
    // The first round warms up.
    for round in 0..=if quick { 5 } else { 200 } {
        for (chain, [commit, end]) in chains.iter_mut().zip(&mut times) {
            let upgrade = chain.upgrade()?;
            if round > 0 {
                commit.push((upgrade.committed - upgrade.asked) as f64 / 1e6);
                end.push((upgrade.ended - upgrade.asked) as f64 / 1e6);
            }
        }
    }
    let runs = |times: &[f64]| times.iter().copied().collect::<Runs>();
    let more =
        |of: usize| -> Runs { times[1][of].iter().zip(&times[0][of]).map(|(below, direct)| below - direct).collect() };
    let (commit, end) = (more(0), more(1));
    let mut table = Table::new(&["", "ms to the commit, median (quartiles)", "ms to the end of the parent"]);
    for (name, [commit, end]) in ["the signal to the server", "the signal to `hold`"].iter().zip(&times) {
        table.row(vec![(*name).into(), runs(commit).show(2), runs(end).show(2)]);
    }
    table.row(vec!["more".into(), commit.show(2), end.show(2)]);
    let memory = resident(chains[1].first_pid())?;
    let text = format!(
        "{} upgrades each. The server under `hold` reports to it (`systemd_notify`). Afterward `hold` has \
         {memory:.1} MiB of resident memory.\n\n{}",
        times[0][0].len(),
        table.markdown()
    );
    let summary = vec![
        Summary {
            what: "one upgrade under `hold`, signal to commit".into(),
            against: "without it",
            measured: format!("{} ms more", commit.show(2)),
            goal: "≤ 0.2 ms more",
        },
        Summary {
            what: "memory of `hold`".into(),
            against: "none",
            measured: format!("{memory:.1} MiB"),
            goal: "≤ 3 MiB",
        },
    ];
    Ok(Outcome { text, picture: None, summary })
}

fn build() -> Result<PathBuf, Box<dyn Error>> {
    let project = Path::new(HERE).join("../..");
    let target = project.join("target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["build", "--quiet", "--release", "--example", "hold", "--manifest-path"])
        .arg(project.join("Cargo.toml"));
    match cargo.arg("--target-dir").arg(&target).status()?.success() {
        true => Ok(target.join("release/examples/hold")),
        false => Err("hold does not build".into()),
    }
}

/// Returns the resident memory in MiB.
fn resident(pid: i32) -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse::<f64>()? / 1024.0)
}
