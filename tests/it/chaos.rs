//! Sends random bursts of signals to every generation and to the shells that start some of them. Afterward one version
//! serves.
//!
//! A seed determines everything except the scheduling. `CHAOS_SEEDS=FIRST..END` chooses the seeds:
//!
//!     CHAOS_SEEDS=0..200 cargo test --test it chaos::
//!
//! SIGHUP and SIGTERM end a shell, so a shell often dies instead of the server that it has started.

use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use rustix::process::Signal;

/// The seeds of a normal test run.
const SAMPLE: Range<u64> = 0..10;

/// The number of seeds that run in parallel. Their servers spend most of the time waiting.
const AT_ONCE: usize = 4;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

#[test]
fn one_version_serves_whatever_the_signals() {
    let seeds = match std::env::var("CHAOS_SEEDS") {
        Ok(seeds) => {
            let (first, end) = seeds.split_once("..").expect("CHAOS_SEEDS=FIRST..END");
            first.parse().unwrap()..end.parse().unwrap()
        }
        Err(_) => SAMPLE,
    };
    let next = AtomicU64::new(seeds.start);
    let (failed, sum) = (Mutex::new(Vec::new()), Mutex::new([0; 3]));
    let worker = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds.end {
            return;
        }
        match thread::spawn(move || chaos(seed)).join() {
            Ok(counts) => sum.lock().unwrap().iter_mut().zip(counts).for_each(|(sum, count)| *sum += count),
            Err(_) => failed.lock().unwrap().push(seed),
        }
    };
    thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(worker))));
    let (failed, [upgrades, failures, stops]) = (failed.into_inner().unwrap(), sum.into_inner().unwrap());
    println!("seeds {seeds:?}: {upgrades} upgrades, {failures} failed ones, {stops} services stopped");
    assert!(failed.is_empty(), "seeds {failed:?} of {seeds:?} failed");
    assert!(upgrades > 0 && failures > 0, "nothing happened");
}

/// The numbers of upgrades, of failed upgrades, and of services that were stopped.
fn chaos(seed: u64) -> [usize; 3] {
    let mut random = Random(seed);
    let random = &mut random;
    let probation = random.one_of(&["0", "20", "300"]);
    let transport = random.one_of(&["pipes", "socket"]);
    let fork = random.one_of(&[None, Some("--fork")]);
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    // The program is a shell that waits for the server, or the server itself.
    let (wrap, shell, how) = (path("wrap"), path("shell"), path("how"));
    let text = "[ -e 'SHELL' ] || exec WHOAMI \"$@\"\nWHOAMI \"$@\"\nexit $?";
    script(&wrap, &text.replace("SHELL", &shell).replace("WHOAMI", &whoami_in_shell()));
    let args =
        ["--listen", &own_address(), "--drain", "30", "--ready-timeout", "1500", "--exec", &wrap, "--misbehave", &how];
    let server =
        Server::whoami(args.iter().chain(&["--probation", probation, "--transport", transport]).chain(fork.as_ref()));
    let load = Load::paced(&[server.addr(), server.addr()], Duration::from_millis(2));
    // Used only in the message of a failure.
    let mut done = Script { text: format!("seed {seed}: probation {probation}, {transport} {fork:?}"), failed: true };

    let stops = random.below(4) == 0;
    let mut stop_sent = false;
    let mut one = Some(server.first_pid());
    for _ in 0..3 {
        match random.below(2) {
            0 => drop(fs::remove_file(&shell)),
            _ => fs::write(&shell, "").unwrap(),
        }
        let word = random.one_of(&["", "", "", "sleep=100", "sleep=2500", "exit=3", "refuse=no", "slow-listen"]);
        fs::write(&how, word).unwrap();
        write!(done.text, "; shell {}, child {word:?}:", fs::exists(&shell).unwrap()).unwrap();
        stop_sent |= burst(&server, random, stops, &mut done.text);
        one = settled(&server, stop_sent, &done.text);
        if one.is_none() {
            break;
        }
    }
    let counts = load.stop();
    if !stop_sent {
        counts.assert_none_failed();
    }
    if let Some(pid) = one {
        guard::try_send_signal(pid, Signal::TERM);
    }
    server.wait_all_ended();
    let refused = connect(&server.addr()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    done.failed = false;
    let count = |start| server.said().iter().filter(|line| line.starts_with(start)).count();
    [count("upgrade ok"), count("upgrade failed"), usize::from(one.is_none())]
}

/// The actions so far, for the message of a failure.
struct Script {
    text: String,
    failed: bool,
}

impl Drop for Script {
    fn drop(&mut self) {
        if self.failed {
            eprintln!("{}", self.text);
        }
    }
}

/// True if a server was asked to stop.
fn burst(server: &Server, random: &mut Random, stops: bool, script: &mut String) -> bool {
    let mut stop_sent = false;
    // A freeze beyond the 5 seconds of the protocol makes the test slow, so it is rare.
    let mut long = random.below(6) == 0;
    let first = server.pid();
    for step in 0..2 + random.below(8) {
        let processes = server.processes();
        let Some(to) = processes.get(random.below(processes.len().max(1))) else { break };
        let (to, is_shell) =
            (if step == 0 { first } else { *to }, try_status_field(*to, "Name").as_deref() == Some("wrap"));
        let signal = match random.below(if stops { 15 } else { 12 }) {
            _ if step == 0 => Signal::HUP,
            0..5 => Signal::HUP,
            5..8 => Signal::STOP,
            8..11 => Signal::CONT,
            11 if is_shell => Signal::KILL,
            11 => Signal::CONT,
            _ => Signal::TERM,
        };
        let sent = guard::try_send_signal(to, signal);
        stop_sent |= sent && signal == Signal::TERM && !is_shell;
        let pause = match random.below(4) {
            0 => 0,
            1 => random.below(3),
            2 => random.below(40),
            _ if long && signal == Signal::STOP => {
                long = false;
                5500
            }
            _ => random.below(400),
        };
        let what = if is_shell { "shell " } else { "" };
        write!(script, " {signal:?} {what}{to} {pause} ms,").unwrap();
        // This is part of the pattern, and does not wait for an event.
        let until = Instant::now() + Duration::from_millis(pause as u64);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            thread::park_timeout(left);
        }
    }
    stop_sent
}

/// Continues all processes, and waits until one process is left and answers every connection, or none after a stop.
#[track_caller]
fn settled(server: &Server, stop_sent: bool, script: &str) -> Option<u32> {
    server.signal_all(Signal::CONT);
    let addr = server.addr();
    let servers = || {
        let is_shell = |pid: &u32| try_status_field(*pid, "Name").as_deref() == Some("wrap");
        server.processes().into_iter().filter(|pid| !is_shell(pid)).collect::<Vec<_>>()
    };
    let mut outcome = None;
    let settles = try_eventually("one version alone", || {
        let (before, said) = (servers(), server.log.len());
        outcome = match before.as_slice() {
            [] if stop_sent => Some(None),
            [one] => {
                let answers = (0..20).map(|_| ask(&addr).ok().and_then(|answer| try_field::<u32>(&answer, "pid")));
                let all_from_it = answers.into_iter().all(|pid| pid == Some(*one));
                (all_from_it && servers() == before && server.log.len() == said).then_some(Some(*one))
            }
            _ => None,
        };
        outcome.is_some()
    });
    if let Err(error) = settles {
        panic!("{error}: processes {:?}; {script}", servers());
    }
    outcome.unwrap()
}
