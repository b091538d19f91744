//! Compares this library with a bare handover and with `ecdysis` 1.1.1. The runs that are compared are interleaved.
//!
//! `ecdysis-bench [--quick] [--only ROW]... [--against SERVER] [--list]`: without `--quick`, every row that was run
//! replaces its part of RESULTS.md and its picture. With `--against`, the row `upgrade` also measures another build of
//! this library: SERVER is the absolute path of `server` in the target directory of another checkout's benchmarks.
//! Nothing is written then.

#![deny(unsafe_code)]

mod chain;
mod report;
mod rows;
mod stats;

use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::{fs, io};

use ecdysis_bench::sys;

/// The result of a row.
pub struct Outcome {
    /// Markdown.
    pub text: String,
    /// File name and SVG.
    pub picture: Option<(&'static str, String)>,
    /// Lines of the summary.
    pub summary: Vec<Summary>,
}

/// A line of the summary table.
pub struct Summary {
    pub what: String,
    pub against: &'static str,
    pub measured: String,
    pub goal: &'static str,
}

type Row = fn(quick: bool) -> Result<Outcome, Box<dyn Error>>;

const ROWS: [(&str, &str, Row); 15] = [
    ("upgrade", "One upgrade, one listener, from the call to the commit", rows::upgrade::against_bare),
    ("old", "The same against `ecdysis` 1.1.1, from the signal to the commit", rows::upgrade::against_old),
    ("hold", "One upgrade under `hold`, from the signal", rows::hold::hold),
    ("static", "One upgrade of a static binary", rows::upgrade::of_static),
    ("listeners", "Many listeners", rows::upgrade::listeners),
    ("takeover", "A takeover compared with an inheritance", rows::upgrade::takeover),
    ("stall", "How long a busy thread of the parent stalls", rows::stall::stall),
    ("accept", "Connections accepted per second, one listener", rows::accept::accept),
    ("keep-alive", "Requests per second on connections that stay open", rows::accept::keep_alive),
    ("tasks", "Tasks and guards: waiting for the end, and draining", rows::tasks::tasks),
    ("throughput", "Connections served per second, against `ecdysis` 1.1.1", rows::accept::throughput),
    ("memory", "Memory of a listener and of a connection", rows::memory::memory),
    ("latency", "Latency of requests during upgrades", rows::latency::latency),
    ("syscalls", "System calls of one upgrade, one listener", rows::syscalls::syscalls),
    ("build", "The cost of building", rows::build::build),
];

/// The server of another build of this library.
static AGAINST: OnceLock<Option<String>> = OnceLock::new();

const HERE: &str = env!("CARGO_MANIFEST_DIR");

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut quick = false;
    let mut only = Vec::new();
    let mut against = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--only" => only.push(args.next().ok_or("--only needs a row")?),
            "--against" => against = Some(args.next().ok_or("--against needs a path")?),
            "--help" => {
                let comment = include_str!("main.rs").lines().map_while(|line| line.strip_prefix("//!"));
                comment.for_each(|line| println!("{}", line.trim_start()));
                return Ok(());
            }
            "--list" => {
                ROWS.iter().for_each(|(name, title, _)| println!("{name}: {title}"));
                return Ok(());
            }
            // This program starts itself with these options, as the clients of a server.
            "--load" | "--load-keep" => return Ok(rows::accept::load(args, arg == "--load-keep")?),
            other => return Err(format!("unknown argument {other}: see --help").into()),
        }
    }
    if let Some(unknown) = only.iter().find(|only| !ROWS.iter().any(|(name, ..)| name == only)) {
        return Err(format!("no row {unknown}").into());
    }
    let keeps = !quick && against.is_none();
    AGAINST.get_or_init(|| against);
    sys::adopt_orphans();
    sys::raise_descriptor_limit();
    build(&["--bins"], "", None)?;
    for (name, title, row) in ROWS {
        if !only.is_empty() && !only.iter().any(|only| only == name) {
            continue;
        }
        eprintln!("measuring {name}, load {}", load());
        let outcome = row(quick).map_err(|e| format!("{name}: {e}"))?;
        println!("## {title}\n\n{}", outcome.text);
        if keeps {
            keep(name, title, outcome)?;
        }
    }
    Ok(())
}

/// Builds the servers, because `cargo run` has built only this program. With `flags` for the compiler they need another
/// target directory, beside that of this program.
fn build(which: &[&str], flags: &str, folder: Option<&str>) -> Result<(), Box<dyn Error>> {
    let exe = std::env::current_exe()?;
    let target = exe.parent().and_then(Path::parent).ok_or("this program lies in no target directory")?;
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["build", "--quiet", "--release", "--manifest-path"])
        .arg(Path::new(HERE).join("Cargo.toml"))
        .args(which);
    cargo.arg("--target-dir").arg(folder.map_or(target.to_owned(), |folder| target.join(folder)));
    if !flags.is_empty() {
        // With an explicit target, the flags do not apply to build scripts and procedural macros.
        cargo.env("RUSTFLAGS", flags).args(["--target", TARGET]);
    }
    if cargo.status()?.success() {
        Ok(())
    } else {
        Err("the servers do not build".into())
    }
}

/// The target for which this program was built.
const TARGET: &str = env!("TARGET");

/// Writes one row's section of RESULTS.md and its picture. The others stay as they are.
fn keep(name: &str, title: &str, outcome: Outcome) -> io::Result<()> {
    let path = Path::new(HERE).join("RESULTS.md");
    let before = fs::read_to_string(&path).unwrap_or_default();
    let mut summary = String::new();
    let mut sections = String::new();
    for (row, ..) in ROWS {
        let begin = format!("{ROW}{row} -->\n");
        let section = if row == name {
            // The summary line is also stored here, because the next run may measure only another row.
            let summary: String = outcome.summary.iter().map(Summary::comment).collect();
            let picture = outcome.picture.as_ref().map(|(file, _)| format!("\n![{title}]({file})\n"));
            let picture = picture.unwrap_or_default();
            format!("{summary}\n## {title}\n\n{}{picture}\n{}\n\n", outcome.text, facts()?)
        } else {
            let old = before.split_once(&begin).map(|(_, rest)| rest.split(ROW).next().unwrap_or(rest));
            old.map(|old| format!("{}\n\n", old.trim_end())).unwrap_or_default()
        };
        let lines = section.lines().filter_map(|line| line.strip_prefix(SUMMARY)?.strip_suffix("-->"));
        lines.for_each(|line| summary += &format!("{line}\n"));
        if !section.is_empty() {
            sections += &format!("{begin}{section}");
        }
    }
    let text = format!(
        "# Results\n\nWritten by `cargo run --release --manifest-path tests/bench/Cargo.toml`. The values in a table \
         come from interleaved runs within the same minutes. A ratio is the median of the rounds' ratios, with the \
        quartiles in parentheses.\n\n| what | against | measured | goal \
         |\n|---|---|---|---|\n{summary}\n{sections}"
    );
    if let Some((file, svg)) = outcome.picture {
        fs::write(Path::new(HERE).join(file), svg)?;
    }
    fs::write(path, text.trim_end().to_owned() + "\n")
}

const ROW: &str = "<!-- row ";
const SUMMARY: &str = "<!-- summary ";

impl Summary {
    fn comment(&self) -> String {
        let Self { what, against, measured, goal } = self;
        format!("{SUMMARY}| {what} | {against} | {measured} | {goal} |-->\n")
    }
}

/// Describes the machine, without its name.
fn facts() -> io::Result<String> {
    let cores = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel = kernel.split('-').next().unwrap_or_default().trim();
    let memory = fs::read_to_string("/proc/meminfo")?;
    let kib: f64 = memory.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(f64::NAN);
    let gib = kib / f64::from(1 << 20);
    Ok(format!("*{cores} cores, {gib:.0} GiB, Linux {kernel}, load average {}.*", load()))
}

fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split_whitespace().next().unwrap_or("unknown").to_owned()
}
