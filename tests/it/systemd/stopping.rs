//! A restart and a crash while an older generation still drains, with both values of `KillMode=` that a server can
//! have. Prints a row for each: how long no process answered, the failures of the load, and whether the drain could
//! finish.

use std::fs;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use super::bed::{systemctl, under_systemd, Machine, Service};
use crate::support::{ask, connect, eventually, generation, Conn, Load};

const ADDRESS: &str = "127.0.0.1:8004";

/// More than any measured time, even on a busy machine, and less than `TimeoutStopSec=`.
const LONGEST: Duration = Duration::from_secs(15);

/// A service with two generations. Half a request was sent on the connection of the older one.
fn drains<'a>(machine: &'a Machine, name: &'static str, mode: &str) -> (Service<'a>, Box<dyn Conn>) {
    let unit = fs::read_to_string(machine.units.join("fdstore.service")).unwrap();
    machine.unit(&format!("{name}.service"), &unit);
    let settings = format!(
        "KillMode={mode}\nExecStart=\nExecStart=/usr/local/bin/whoami --systemd --listen {ADDRESS} --drain 600 \
         --stop-drain 25"
    );
    let service = machine.service(name, &settings);
    service.start();
    let mut open = connect(ADDRESS).unwrap();
    open.write_all(b"w").unwrap();
    ask(ADDRESS).unwrap(); // It is accepted after the other one.
    service.succeed("reload");
    eventually("the new one serves", || generation(ADDRESS) == 2);
    (service, open)
}

/// Sends the rest of the request. Returns whether it was answered.
fn finish(mut open: Box<dyn Conn>) -> bool {
    let mut answer = String::new();
    let _ = open.write_all(b"ho\n").and_then(|()| open.read_to_string(&mut answer).map(drop));
    answer.starts_with("gen=1 ")
}

/// Runs the action under load, which must not be refused, and then waits for an answer.
fn measure(what: &str, act: impl FnOnce() -> bool) {
    let load = Load::on(ADDRESS, 2);
    eventually("load", || load.answered() > 100);
    let began = Instant::now();
    let drained = act();
    ask(ADDRESS).unwrap();
    let outage = began.elapsed();
    let counts = load.stop();
    let refused = counts.failures.iter().filter(|(kind, _)| kind.starts_with("Refused"));
    assert_eq!(refused.map(|(_, count)| count).sum::<u64>(), 0, "{what}: {counts:?}");
    let failed: u64 = counts.failures.values().sum();
    println!("| {what} | {} ms | {}, {failed} failed | drained: {drained} |", outage.as_millis(), counts.requests);
    assert!(outage < LONGEST, "{what}: {outage:?}");
}

/// The old connection ends half a second after the stop began.
fn restart(service: &Service<'_>, open: Box<dyn Conn>) -> bool {
    let unit = service.unit();
    let restarted = thread::spawn(move || systemctl(&["restart", &unit]));
    eventually("it stops", || service.get("ActiveState") == "deactivating");
    // The outage that is measured depends on this time.
    thread::sleep(Duration::from_millis(500));
    let finished = finish(open);
    assert!(restarted.join().unwrap().status.success());
    finished
}

/// The newest generation crashes. The old connection ends after that, if it may.
fn crash(service: &Service<'_>, open: Box<dyn Conn>) -> bool {
    let pid = service.main_pid();
    systemctl(&["kill", "--kill-whom=main", "--signal=KILL", &service.unit()]);
    eventually("started again", || ![0, pid].contains(&service.main_pid()));
    finish(open)
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn while_an_older_generation_drains() {
    under_systemd("stopping::while_an_older_generation_drains", |machine| {
        for (mode, [restarted, crashed]) in
            [("control-group", ["group-restarted", "group-crashed"]), ("mixed", ["mixed-restarted", "mixed-crashed"])]
        {
            let (service, open) = drains(&machine, restarted, mode);
            measure(restarted, || {
                let drained = restart(&service, open);
                assert!(drained, "the drain was cut");
                drained
            });
            service.succeed("stop");
            assert_eq!(service.get("Result"), "success");
            let (service, open) = drains(&machine, crashed, mode);
            measure(crashed, || crash(&service, open));
            service.succeed("stop");
            assert_eq!(service.get("Result"), "success");
        }
        // `mixed` kills all remaining processes when the main process has ended.
        let of_the_default: Vec<_> =
            machine.complaints().into_iter().filter(|line| line.starts_with("group-")).collect();
        assert_eq!(of_the_default, Vec::<String>::new());
    });
}
