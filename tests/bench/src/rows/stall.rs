//! How long the parent's other threads stall during an upgrade.

use std::error::Error;

use crate::chain::{free_port, Driven, Server};
use crate::report::{bars, Bar, Table};
use crate::stats::Runs;
use crate::{Outcome, Summary};

/// A thread of the parent repeatedly writes to its heap (4 KiB pages, all touched) and reads the clock. The longest
/// time between two readings is the stall. The child refuses, so that several upgrades can use one heap.
pub fn stall(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let (sizes, runs): (&[usize], _) = if quick { (&[0, 256], 2) } else { (&[0, 1024, 4096, 8192], 9) };
    let mut table = Table::new(&[
        "heap, GiB",
        "shared memory, stall ms",
        "no upgrade, ms",
        "upgrade took ms",
        "fork, stall ms",
        "no upgrade, ms",
        "upgrade took ms",
    ]);
    let mut all = Vec::new();
    let mut stalls = Vec::new();
    for &size in sizes {
        let mut cells = vec![format!("{}", size as f64 / 1024.0)];
        for way in ["way=auto", "way=fork"] {
            let measured = measure(way, size, runs)?;
            let stall = measured[0].median();
            cells.extend(measured.map(|runs| runs.show(2)));
            let way = if way == "way=fork" { "fork" } else { "shared memory" };
            if way != "fork" {
                stalls.push(format!("{stall:.2}"));
            }
            let name = format!("{} GiB, {way}", size as f64 / 1024.0);
            all.push(Bar { name, value: stall, shown: format!("{stall:.2} ms"), ours: way != "fork" });
        }
        table.row(cells);
    }
    let text = format!(
        "{runs} upgrades each. \"No upgrade\" is the longest time between two readings of the clock during the same \
         time without an upgrade, which is due to the scheduler.\n\n{}",
        table.markdown()
    );
    let sizes: Vec<_> = sizes.iter().map(|size| format!("{}", *size as f64 / 1024.0)).collect();
    let summary = vec![Summary {
        what: format!("stall of a busy thread in an upgrade, heap of {} GiB", sizes.join(", ")),
        against: "none",
        measured: format!("{} ms", stalls.join(", ")),
        goal: "flat",
    }];
    Ok(Outcome {
        summary,
        text,
        picture: Some(("stall.svg", bars("Stall of a busy thread during an upgrade", true, &all))),
    })
}

/// Returns the stall, the same without an upgrade, and the duration of the upgrade, in milliseconds.
fn measure(way: &str, mib: usize, runs: usize) -> Result<[Runs; 3], Box<dyn Error>> {
    let server = Server::new("server", &[way]).with("heap", mib).with("port", free_port()?);
    let mut server = Driven::spawn(server.command()?)?;
    server.expect("serving")?;
    server.expect("touched")?;
    let mut lines = Vec::new();
    for _ in 0..runs {
        server.tell("upgrade")?;
        lines.push(server.expect("stall")?);
    }
    let ms = |name| lines.iter().map(|line| line.number::<f64>(name).map(|ns| ns / 1e6)).collect::<Result<Runs, _>>();
    Ok([ms("ns")?, ms("quiet")?, ms("took")?])
}
