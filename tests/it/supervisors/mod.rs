//! `hold` under real supervisors, each controlled with the commands that an operator would type:
//!
//!     tests/it/supervisors/install
//!     cargo build --features systemd --examples
//!     cargo test --features systemd --test it supervisors -- --ignored --nocapture
//!
//! Each prints a row of a table with the requests and failures of ten upgrades, a failed upgrade, a crash and a stop. A
//! supervisor that is not installed is skipped with a message.

mod oci;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::support::{ask, connect, eventually, example, generation, output, send_signal, wait, Load, Server};

/// A supervisor, as shell commands in its own directory. `$HOLD` is the command line that it runs, and `$SUPERVISOR` is
/// its PID.
struct Supervisor {
    name: &'static str,
    tools: &'static [&'static str],
    start: &'static str,
    /// Prints the PID of the service that the supervisor knows.
    pid: &'static str,
    upgrade: &'static str,
    stop: &'static str,
    /// Prints `expected` if the supervisor has seen the expected end of the service.
    ended: &'static str,
    expected: &'static str,
    /// Ends the supervisor, if the end of the service does not.
    leave: &'static str,
}

const UNSHARE: Supervisor = Supervisor {
    name: "PID 1 of a namespace (unshare)",
    tools: &["unshare"],
    start: "exec unshare --pid --fork --mount-proc --kill-child $HOLD",
    pid: "cat /proc/$SUPERVISOR/task/*/children",
    upgrade: "kill -HUP $(cat /proc/$SUPERVISOR/task/*/children)",
    stop: "kill -TERM $(cat /proc/$SUPERVISOR/task/*/children)",
    ended: "echo $CODE",
    expected: "0",
    leave: "",
};

/// tini is PID 1 of a namespace, and hold its child.
const TINI: Supervisor = Supervisor {
    name: "below tini",
    tools: &["unshare", "tini"],
    start: "exec unshare --pid --fork --mount-proc --kill-child tini -- $HOLD",
    pid: "cat /proc/$(cat /proc/$SUPERVISOR/task/*/children | tr -d ' ')/task/*/children",
    upgrade: "kill -HUP $(cat /proc/$SUPERVISOR/task/*/children)",
    stop: "kill -TERM $(cat /proc/$SUPERVISOR/task/*/children)",
    ended: "echo $CODE",
    expected: "0",
    leave: "",
};

const RUNIT: Supervisor = Supervisor {
    name: "runit (runsv)",
    tools: &["runsv", "sv"],
    start: "mkdir service; printf '#!/bin/sh\\nexec %s\\n' \"$HOLD\" >service/run
            printf '#!/bin/sh\\necho $1 >ended\\n' >service/finish; chmod +x service/*; exec runsv service",
    pid: "cat service/supervise/pid",
    upgrade: "sv hup ./service",
    stop: "sv -w 60 down ./service",
    ended: "cat service/ended",
    expected: "0",
    leave: "sv exit ./service",
};

const S6: Supervisor = Supervisor {
    name: "s6 (s6-supervise)",
    tools: &["s6-supervise", "s6-svc", "s6-svstat"],
    start: "mkdir service; echo 3 >service/notification-fd
            printf '#!/bin/sh\\nexec %s\\n' \"$(echo $HOLD | sed 's/ -- / --notify-fd 3 -- /')\" >service/run
            printf '#!/bin/sh\\necho $1 >ended\\n' >service/finish; chmod +x service/run service/finish
            exec s6-supervise service",
    // It prints nothing until the service has reported that it is ready.
    pid: "[ $(s6-svstat -o ready ./service) = true ] && s6-svstat -o pid ./service",
    upgrade: "s6-svc -h ./service",
    stop: "s6-svc -wD -T 60000 -d ./service",
    ended: "cat service/ended",
    expected: "0",
    leave: "s6-svc -x ./service",
};

const SUPERVISORD: Supervisor = Supervisor {
    name: "supervisord",
    tools: &["supervisord", "supervisorctl"],
    start: "cat >conf <<END
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile=$PWD/pid
[unix_http_server]
file=$PWD/control
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://$PWD/control
[program:server]
command=$HOLD
stopwaitsecs=100
stderr_logfile=$PWD/stderr
stderr_logfile_maxbytes=0
END
            mkfifo stderr; (exec cat <>stderr >&2) & exec supervisord -c conf",
    pid: "supervisorctl -c conf pid server",
    upgrade: "supervisorctl -c conf signal HUP server",
    stop: "supervisorctl -c conf stop server",
    ended: "supervisorctl -c conf status server | grep -o STOPPED",
    expected: "STOPPED",
    leave: "kill $(cat /proc/$SUPERVISOR/task/*/children); supervisorctl -c conf shutdown",
};

/// The foreground job of a terminal.
const TMUX: Supervisor = Supervisor {
    name: "a terminal (tmux), Ctrl-C",
    tools: &["tmux"],
    // Ctrl-C must not end the job's shell before it has seen the job's exit status.
    start: "mkfifo stderr; echo \"trap : INT; $HOLD 2>stderr; echo \\$? >ended\" >job
            tmux -S socket -f /dev/null new-session -d 'exec sh job'; exec cat stderr >&2",
    pid: "cat /proc/$(tmux -S socket list-panes -F '#{pane_pid}')/task/*/children",
    upgrade: "kill -HUP $(cat /proc/$(tmux -S socket list-panes -F '#{pane_pid}')/task/*/children)",
    stop: "tmux -S socket send-keys C-c",
    ended: "cat ended",
    expected: "0",
    leave: "",
};

/// A closed terminal sends SIGHUP, which must not cause an upgrade.
const HANGUP: Supervisor = Supervisor {
    name: "a terminal (tmux), closed",
    start: "mkfifo stderr; tmux -S socket -f /dev/null new-session -d \"exec $HOLD 2>stderr\"
            exec cat stderr >&2",
    pid: "tmux -S socket list-panes -F '#{pane_pid}'",
    upgrade: "kill -HUP $(tmux -S socket list-panes -F '#{pane_pid}')",
    stop: "tmux -S socket kill-session",
    ended: "echo",
    expected: "",
    ..TMUX
};

/// Every process of a supervised service finds this in its environment.
const TAG: &str = "ECDYSIS_TEST_SERVICE";

struct Bed<'a> {
    supervisor: &'a Supervisor,
    server: Server,
    hold: String,
}

impl Bed<'_> {
    /// Runs one of the supervisor's commands. Returns what it prints.
    fn shell(&mut self, command: &str) -> String {
        let output = output(&mut self.command(command));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn command(&self, command: &str) -> Command {
        let mut shell = shell(command, &self.hold);
        shell.current_dir(self.server.dir()).env("SUPERVISOR", self.server.first_pid().to_string());
        shell
    }

    fn service_pid(&mut self) -> u32 {
        let mut pid = None;
        eventually("the supervisor knows the service's PID", || {
            pid = self.shell(self.supervisor.pid).parse().ok();
            pid.is_some()
        });
        pid.unwrap()
    }

    fn upgrade(&mut self, outcome: &str) {
        let output = output(&mut self.command(self.supervisor.upgrade));
        assert!(output.status.success(), "{output:?}");
        let line = self.server.wait("upgrade ");
        assert!(line.starts_with(outcome), "{line}");
    }

    /// Returns all living processes of the service, with their PIDs in their own namespace.
    fn processes(&self) -> Vec<(u32, u32)> {
        let tag = format!("{TAG}={}", self.server.dir().display());
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let tagged = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == tag.as_bytes())
        };
        let inside = |pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
            Some((pid, numbers.split_whitespace().last()?.parse().ok()?))
        };
        pids.filter(tagged).filter_map(inside).collect()
    }

    /// Returns the generation that serves, by its PID outside of the namespace.
    fn serving(&self) -> u32 {
        let inside = self.server.pid();
        self.processes().iter().find(|(_, number)| *number == inside).expect("the server").0
    }
}

fn shell(command: &str, hold: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).env("HOLD", hold).stdin(Stdio::null());
    shell
}

/// Formats the total of a load, for the table.
fn row(load: Load) -> String {
    let counts = load.stop();
    let refused = counts.failures.iter().filter(|(kind, _)| kind.starts_with("Refused")).map(|(_, count)| count);
    assert_eq!(refused.sum::<u64>(), 0, "{counts:?}");
    format!("{}, {} failed", counts.requests, counts.failures.values().sum::<u64>())
}

fn is_there(tool: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {tool}")]).stdout(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

fn supervise(supervisor: &Supervisor) {
    if let Some(missing) = supervisor.tools.iter().find(|tool| !is_there(tool)) {
        return println!("skipped: {}: needs {missing}; see tests/it/supervisors/install", supervisor.name);
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: {}: needs root", supervisor.name);
    }
    let (hold, server) = (example("hold"), example("whoami"));
    let programs = hold.parent().unwrap();
    supervise_at(supervisor, programs, [&hold.display().to_string(), &server.display().to_string(), "$PWD"]);
}

/// Runs the whole life of a service. `paths` are the paths of the two programs and of the directory as the service sees
/// them. `programs` is where the programs are.
fn supervise_at(supervisor: &Supervisor, programs: &Path, [hold, server, directory]: [&str; 3]) {
    let dir = crate::support::tempdir();
    let directory = directory.replace("$PWD", &dir.path().display().to_string());
    let wrong = dir.path().join("misbehave");
    let hold = format!(
        "{hold} --stop-timeout 90 -- {server} --systemd --listen 127.0.0.1:0 --probation 50 --drain 60 \
         --misbehave {directory}/misbehave"
    );
    let mut command = shell(supervisor.start, &hold);
    command.current_dir(dir.path()).env(TAG, dir.path()).env("PROGRAMS", programs).stdout(Stdio::null());
    let server = Server::start_in(command, dir);
    let mut bed = Bed { supervisor, server, hold };
    bed.server.wait("hold: ready");
    let (service, addr) = (bed.service_pid(), bed.server.addr());

    let load = Load::on(&addr, 2);
    for expected in 2..=11 {
        bed.upgrade("upgrade ok");
        eventually("the new one answers", || generation(&addr) == expected);
    }
    let counts = load.stop();
    counts.assert_none_failed();
    let upgrades = format!("{}, 0 failed", counts.requests);

    fs::write(&wrong, "exit=3").unwrap();
    let load = Load::on(&addr, 2);
    bed.upgrade("upgrade failed");
    assert_eq!(generation(&addr), 11);
    let failed = row(load);
    fs::remove_file(&wrong).unwrap();

    let load = Load::on(&addr, 2);
    let answered = load.answered();
    eventually("load", || load.answered() > answered + 100);
    let crashed = bed.serving();
    send_signal(crashed, Signal::KILL);
    bed.server.wait("hold: ready");
    let answered = load.answered();
    eventually("load", || load.answered() > answered + 100);
    let crash = row(load);
    assert_eq!(generation(&addr), 1);
    assert_eq!(bed.service_pid(), service, "the service has one PID");

    // A stop waits for the open connection of an old generation, and for that of the new one.
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(connect(&addr).unwrap());
        open.last_mut().unwrap().write_all(b"w").unwrap();
        ask(&addr).unwrap(); // It is accepted after the other one.
        if open.len() == 1 {
            bed.upgrade("upgrade ok");
            eventually("the new one answers", || generation(&addr) == 2);
        }
    }
    let load = Load::on(&addr, 1);
    let answered = load.answered();
    eventually("load", || load.answered() > answered + 100);
    let mut stop = bed.command(supervisor.stop).stdout(Stdio::null()).spawn().unwrap();
    bed.server.wait("hold: stopping");
    // After the stop no process listens, so this load is expected to fail.
    let counts = load.stop();
    let cut =
        counts.failures.iter().filter(|(kind, _)| !kind.starts_with("Refused")).map(|(_, count)| count).sum::<u64>();
    assert!(!bed.server.said().iter().any(|line| line.starts_with("hold: over")), "it has not waited");
    for mut stream in open {
        stream.write_all(b"ho\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("gen="), "{answer:?}");
    }
    let stopped = bed.server.wait("hold: over");
    assert_eq!(stopped, "hold: over code=0");
    assert!(wait(&mut stop).success());
    if supervisor.leave.is_empty() {
        bed.server.wait_all_ended();
    }
    let code = if supervisor.leave.is_empty() { bed.server.exit_code().map(|code| code.to_string()) } else { None };
    let mut ended = String::new();
    eventually("the supervisor has seen the end", || {
        let output = output(bed.command(supervisor.ended).env("CODE", code.as_deref().unwrap_or_default()));
        ended = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ended == supervisor.expected
    });
    bed.shell(supervisor.leave);
    bed.server.wait_all_ended();
    eventually("no process is left", || bed.processes().is_empty());
    println!(
        "| {} | {upgrades} | {crash}, 0 refused | 2 drained, {} requests, {cut} cut | {failed} |",
        supervisor.name, counts.requests
    );
}

macro_rules! tests {
    ($($name:ident: $supervisor:expr;)*) => {$(
        #[test]
        #[ignore = "needs root and a supervisor"]
        fn $name() {
            supervise(&$supervisor);
        }
    )*};
}

tests! {
    pid_1_of_a_namespace: UNSHARE;
    below_tini: TINI;
    runit: RUNIT;
    s6: S6;
    supervisord: SUPERVISORD;
    in_a_terminal: TMUX;
    in_a_terminal_that_is_closed: HANGUP;
}
