//! The number of system calls of an upgrade, counted by strace.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::process::Command;
use std::{fs, io};

use ecdysis_bench::sys;

use crate::chain::{free_port, Driven, Server};
use crate::report::Table;
use crate::{Outcome, Summary};

pub fn syscalls(_quick: bool) -> Result<Outcome, Box<dyn Error>> {
    if Command::new("strace").arg("-V").output().is_err() {
        let text = "strace is not installed: not measured.\n".into();
        return Ok(Outcome { text, picture: None, summary: Vec::new() });
    }
    let who = [
        ("this library", Server::new("server", &["way=auto"])),
        ("this library, fork", Server::new("server", &["way=fork"])),
        ("bare, fork", Server::new("server", &["way=bare-fork"])),
        ("ecdysis 1.1.1, threads", Server::new("old_sync", &[])),
        ("ecdysis 1.1.1, Tokio", Server::new("old_tokio", &["trigger=signal"])),
    ];
    let mut table = Table::new(&[
        "",
        "parent, call to commit",
        "child before execve",
        "child, execve to main",
        "child, main to ready",
        "sum without loading",
        "most frequent in parent and child",
    ]);
    let mut sums = Vec::new();
    for (name, server) in who {
        let counted = count(server).map_err(|e| format!("{name}: {e}"))?;
        let number = |part| counted.get(&part).map_or(0, |calls| calls.values().sum::<usize>());
        let sum = number(Part::Parent) + number(Part::BeforeExec) + number(Part::Child);
        sums.push(sum);
        let mut most: BTreeMap<&str, usize> = BTreeMap::new();
        for part in [Part::Parent, Part::BeforeExec, Part::Child] {
            for (call, n) in counted.get(&part).into_iter().flatten() {
                *most.entry(call).or_default() += n;
            }
        }
        let mut most: Vec<_> = most.into_iter().collect();
        most.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
        let most = most.iter().take(6).map(|(call, n)| format!("{call} {n}")).collect::<Vec<_>>().join(", ");
        table.row(vec![
            name.into(),
            number(Part::Parent).to_string(),
            number(Part::BeforeExec).to_string(),
            number(Part::Loading).to_string(),
            number(Part::Child).to_string(),
            sum.to_string(),
            most,
        ]);
    }
    let summary = vec![Summary {
        what: "system calls of one upgrade, parent and child".into(),
        against: "ecdysis 1.1.1: threads, Tokio",
        measured: format!("{} to {}, {}", sums[0], sums[3], sums[4]),
        goal: "fewer",
    }];
    Ok(Outcome { text: table.markdown(), picture: None, summary })
}

/// The part of an upgrade in which a call was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    Parent,
    BeforeExec,
    Loading,
    Child,
}

type Counted = HashMap<Part, BTreeMap<String, usize>>;

fn count(server: Server) -> Result<Counted, Box<dyn Error>> {
    let trace = std::env::temp_dir().join(format!("ecdysis-bench-{}.trace", std::process::id()));
    let by_signal = server.by_signal();
    let port = free_port()?;
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-s", "16", "-o"]).arg(&trace).arg(server.path()?);
    let mut server = Driven::spawn(server.with("port", port).run_by(command)?)?;
    let parent: i32 = server.expect("serving")?.number("pid")?;
    // Once a request is answered, the accepting threads have started.
    if !super::latency::request(port)? {
        return Err("no answer".into());
    }
    if by_signal {
        sys::signal(parent, libc::SIGHUP);
    } else {
        server.tell("upgrade")?;
    }
    let lines = [server.hear()?, server.hear()?];
    let child = lines.iter().find_map(|line| line.number::<i32>("pid").ok()).ok_or("no child")?;
    sys::signal(child, libc::SIGKILL);
    // strace ends after all processes, and has then written everything.
    server.finish()?;
    let text = fs::read_to_string(&trace)?;
    fs::remove_file(&trace)?;
    Ok(parse(&text, parent, child)?)
}

/// Counts by the marks that the servers write: `main` and `ready` in both, `begin` and `end` in the parent. If a server
/// upgrades inside a call, the signal marks the beginning.
fn parse(text: &str, parent: i32, child: i32) -> io::Result<Counted> {
    let mut counted = Counted::new();
    let mut threads = HashMap::from([(parent, parent), (child, child)]);
    let (mut upgrading, mut child_at) = (false, Part::BeforeExec);
    for line in text.lines() {
        let Some((pid, rest)) = line.split_once(char::is_whitespace) else { continue };
        let (Ok(pid), rest) = (pid.parse::<i32>(), rest.trim_start()) else { continue };
        let process = *threads.get(&pid).unwrap_or(&pid);
        if rest.starts_with("--- SIGHUP") && process == parent {
            upgrading = true;
            continue;
        }
        let resumed = rest.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>"));
        // Calls of a thread count for its process.
        if rest.contains("CLONE_THREAD") || resumed.is_some_and(|(name, _)| name.starts_with("clone")) {
            if let Some(thread) = rest.rsplit_once("= ").and_then(|(_, id)| id.split_whitespace().next()?.parse().ok())
            {
                threads.entry(thread).or_insert(process);
            }
        }
        if resumed.is_some() {
            continue;
        }
        let Some((name, arguments)) = rest.split_once('(') else { continue };
        if name == "write" && arguments.starts_with("-1,") {
            match (arguments.split('"').nth(1), process == parent) {
                (Some("begin"), true) => upgrading = true,
                (Some("end"), true) => upgrading = false,
                (Some("main"), false) => child_at = Part::Child,
                // The child's part ends when the parent is notified. Later calls do not belong to the upgrade.
                (Some("ready"), false) => return_after_ready(&mut threads, child),
                _ => {}
            }
            continue;
        }
        let part = match process {
            p if p == parent && upgrading => Part::Parent,
            p if p == child => child_at,
            _ => continue,
        };
        *counted.entry(part).or_default().entry(name.to_owned()).or_default() += 1;
        if name == "execve" && process == child {
            child_at = Part::Loading;
        }
    }
    if counted.contains_key(&Part::Child) {
        Ok(counted)
    } else {
        Err(io::Error::other("nothing counted"))
    }
}

/// Calls of the child from here on are not counted.
fn return_after_ready(threads: &mut HashMap<i32, i32>, child: i32) {
    threads.values_mut().filter(|process| **process == child).for_each(|process| *process = -1);
}
