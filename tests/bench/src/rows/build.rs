//! The cost of building the library.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

use ecdysis_bench::sys;

use crate::report::Table;
use crate::{Outcome, Summary, HERE};

/// The smallest server with each library.
const OURS: &str = r#"fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut builder = ecdysis::Ecdysis::builder();
    let starting = builder.upgrade_on_signal(1).stop_on_signal(15).start()?;
    let listener = starting.listen_tcp("127.0.0.1:0".parse()?)?;
    let shutdown = starting.shutdown();
    std::thread::spawn(move || shutdown.incoming(&listener).for_each(drop));
    starting.ready()?.run()?;
    Ok(())
}
"#;
const OLD: &str = r#"fn main() -> std::io::Result<()> {
    let mut server = ecdysis::Ecdysis::new();
    let listener = server.listen_tcp(([127, 0, 0, 1], 0).into())?;
    server.ready()?;
    std::thread::spawn(move || listener.incoming().for_each(drop));
    server.upgrade().map_err(|e| std::io::Error::other(e.to_string()))
}
"#;

pub fn build(quick: bool) -> Result<Outcome, Box<dyn Error>> {
    let ours = format!("ecdysis = {{ path = {:?} }}", Path::new(HERE).join("../.."));
    let old = "ecdysis = \"=1.1.1\"";
    let old_sync = "ecdysis = { version = \"=1.1.1\", default-features = false }";
    let mut table = Table::new(&["", "crates", "lines of `cargo tree`", "CPU seconds", "binary, KiB, stripped"]);
    let mut crates_and_cpu = Vec::new();
    for (name, dependency, program) in [
        ("this library", &*ours, OURS),
        ("ecdysis 1.1.1", old, OLD),
        ("ecdysis 1.1.1 without default features", old_sync, OLD),
    ] {
        let cells = measure(dependency, program, quick)?;
        crates_and_cpu.push([0, 2].map(|at: usize| cells[at].parse::<f64>().unwrap_or(f64::NAN)));
        table.row([vec![name.into()], cells].concat());
    }
    let [ours, old, sync] = crates_and_cpu[..] else { return Err("three were built".into()) };
    let line = |what: &str, at: usize, goal| Summary {
        what: what.into(),
        against: "ecdysis 1.1.1: default, sync only",
        measured: format!("1/{:.1}, 1/{:.1}", old[at] / ours[at], sync[at] / ours[at]),
        goal,
    };
    let summary = vec![line("crates compiled", 0, "≤ 1/8"), line("CPU time of a clean release build", 1, "≤ 1/4")];
    let text = format!(
        "A clean release build of a server of ten lines, with its dependencies already downloaded. The number of \
         crates excludes the server itself.\n\n{}",
        table.markdown()
    );
    Ok(Outcome { text, picture: None, summary })
}

fn measure(dependency: &str, program: &str, quick: bool) -> Result<Vec<String>, Box<dyn Error>> {
    let place = std::env::temp_dir().join(format!("ecdysis-bench-{}", std::process::id()));
    let result = measure_in(&place, dependency, program, quick);
    fs::remove_dir_all(&place)?;
    result
}

fn measure_in(place: &Path, dependency: &str, program: &str, quick: bool) -> Result<Vec<String>, Box<dyn Error>> {
    fs::create_dir_all(place.join("src"))?;
    let manifest = format!(
        "[package]\nname = \"least\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[dependencies]\n{dependency}\n\
         [profile.release]\nstrip = true\n[workspace]\n"
    );
    fs::write(place.join("Cargo.toml"), manifest)?;
    fs::write(place.join("src/main.rs"), program)?;
    let cargo = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.args(args).current_dir(place).env("CARGO_TARGET_DIR", place.join("target")).env_remove("RUSTFLAGS");
        let output = command.output()?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!("cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr)))
        }
        .map_err(Box::<dyn Error>::from)
    };
    cargo(&["fetch"])?;
    let tree = cargo(&["tree", "--edges", "normal,build"])?;
    let flat = cargo(&["tree", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"])?;
    let crates: BTreeSet<_> = flat.lines().map(|line| line.trim_end_matches(" (*)")).collect();
    let mut cells = vec![(crates.len() - 1).to_string(), tree.lines().count().to_string()];
    if quick {
        cells.extend(["not measured".into(), "not measured".into()]);
    } else {
        let before = sys::cpu_seconds(true);
        cargo(&["build", "--release", "--offline"])?;
        cells.push(format!("{:.1}", sys::cpu_seconds(true) - before));
        let size = fs::metadata(place.join("target/release/least"))?.len();
        cells.push(format!("{}", size / 1024));
    }
    Ok(cells)
}
