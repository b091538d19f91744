//! The test bed: a real systemd that is booted for one test, its units, their log, and a load.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{example, DEADLINE};

/// Set in the process that runs inside the booted system.
const INSIDE: &str = "ECDYSIS_TEST_UNDER_SYSTEMD";

/// The deadline of a whole test, including the download of systemd.
const TEST_DEADLINE: &str = "300";

/// Runs test `name` under a separate systemd. Outside, it boots systemd and runs this program again. Inside, it calls
/// `test`.
pub fn under_systemd(name: &str, test: impl FnOnce(Machine)) {
    if std::env::var_os(INSIDE).is_some() {
        return test(Machine::new());
    }
    // Only one runs at a time, so that they do not disturb each other.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("timeout")
        .arg(TEST_DEADLINE)
        .arg(directory.join("tests/it/systemd/with-systemd"))
        .arg(directory.join("examples/systemd"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("systemd::{name}"), "--ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "under systemd: {}", output.status);
}

pub struct Machine {
    pub units: PathBuf,
    /// The log of systemd itself.
    pub journal: PathBuf,
    /// The first line of `systemctl --version`.
    pub version: String,
}

impl Machine {
    fn new() -> Self {
        let variable = |name| PathBuf::from(std::env::var_os(name).unwrap());
        let version = text(&run("systemctl", &["--version"])).lines().next().unwrap_or_default().to_owned();
        println!("{version}");
        let machine = Self { units: variable("SYSTEMD_UNITS"), journal: variable("SYSTEMD_LOG"), version };
        machine.install("whoami");
        machine.install("ctl");
        machine
    }

    /// Installs an example as a package would, by renaming it over the old file.
    pub fn install(&self, example_name: &str) {
        self.install_file(example_name, &fs::read(example(example_name)).unwrap());
    }

    pub fn install_file(&self, name: &str, content: &[u8]) {
        let (path, new) = (format!("/usr/local/bin/{name}"), format!("/usr/local/bin/{name}.new"));
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o755).open(&new).unwrap();
        file.write_all(content).unwrap();
        drop(file);
        fs::rename(new, path).unwrap();
    }

    /// Installs a version of the server that runs with these arguments, regardless of its unit.
    pub fn install_version(&self, arguments: &str) {
        self.install_file("whoami.real", &fs::read(example("whoami")).unwrap());
        let script =
            format!("#!/bin/bash\nexec -a /usr/local/bin/whoami /usr/local/bin/whoami.real --systemd {arguments}\n");
        self.install_file("whoami", script.as_bytes());
    }

    /// Creates a service whose stderr goes to the test, with additional unit settings.
    pub fn service(&self, name: &'static str, settings: &str) -> Service<'_> {
        let fifo = PathBuf::from(format!("/run/{name}.stderr"));
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
        let service = Service { name, machine: self, log: Log::of(&fifo) };
        self.set(
            &format!("{name}.service"),
            "test",
            &format!("[Service]\nStandardError=file:{}\n{settings}\n", fifo.display()),
        );
        service
    }

    /// Adds a unit.
    pub fn unit(&self, name: &str, text: &str) {
        fs::write(self.units.join(name), text).unwrap();
        let output = systemctl(&["daemon-reload"]);
        assert!(output.status.success(), "{output:?}");
    }

    /// Adds a drop-in to a unit.
    pub fn set(&self, unit: &str, drop_in: &str, text: &str) {
        let directory = self.units.join(format!("{unit}.d"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(format!("{drop_in}.conf")), text).unwrap();
        let output = systemctl(&["daemon-reload"]);
        assert!(output.status.success(), "{output:?}");
    }

    /// Returns systemd's complaints: a message from a process that is not the main process, a main process that is not
    /// its child (which it would kill without waiting), a timeout, a killed process.
    pub fn complaints(&self) -> Vec<String> {
        let log = String::from_utf8_lossy(&fs::read(&self.journal).unwrap()).into_owned();
        let bad = |line: &&str| {
            ["Got notification", "Supervising", "Killing", "timed out", "Watchdog", "refusing", "left-over"]
                .iter()
                .any(|words| line.contains(words))
        };
        log.lines().filter(bad).map(str::to_owned).collect()
    }
}

pub struct Service<'a> {
    pub name: &'static str,
    machine: &'a Machine,
    pub log: Log,
}

impl Service<'_> {
    pub fn start(&self) {
        self.succeed("start");
    }

    /// Runs a command that must succeed.
    pub fn succeed(&self, command: &str) {
        let output = self.try_to(command);
        assert!(output.status.success(), "systemctl {command} {}: {}", self.name, text(&output));
    }

    pub fn try_to(&self, command: &str) -> Output {
        systemctl(&[command, &self.unit()])
    }

    pub fn unit(&self) -> String {
        format!("{}.service", self.name)
    }

    pub fn get(&self, property: &str) -> String {
        text(&systemctl(&["show", "--value", "-p", property, &self.unit()])).trim().to_owned()
    }

    pub fn main_pid(&self) -> u32 {
        self.get("MainPID").parse().unwrap()
    }

    /// Returns the output of `systemctl status`.
    pub fn status(&self) -> String {
        text(&systemctl(&["status", "--no-pager", "--full", &self.unit()]))
    }

    /// Returns all processes of the service.
    pub fn processes(&self) -> Vec<u32> {
        let group = self.get("ControlGroup");
        if group.is_empty() {
            return Vec::new();
        }
        let list = fs::read_to_string(format!("/sys/fs/cgroup{group}/cgroup.procs")).unwrap_or_default();
        list.lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

/// Prints the available information after a failure.
impl Drop for Service<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = String::from_utf8_lossy(&fs::read(&self.machine.journal).unwrap_or_default()).into_owned();
            println!("--- status\n{}--- systemd\n{log}\n--- stderr\n{}", self.status(), self.log.seen().join("\n"));
        }
    }
}

pub fn systemctl(arguments: &[&str]) -> Output {
    run("systemctl", arguments)
}

/// Runs a command with a deadline.
fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").arg("60").arg(program).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Returns all output of a command.
pub fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// The lines that all generations of a service write to stderr, as they come.
pub struct Log {
    lines: Receiver<String>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Log {
    fn of(fifo: &Path) -> Self {
        // Opened for reading and writing, so that it never reaches EOF and opening never blocks.
        let reader = BufReader::new(File::options().read(true).write(true).open(fifo).unwrap());
        let (sender, lines) = channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = seen.clone();
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                all.lock().unwrap().push(line.clone());
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { lines, seen }
    }

    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the next line that starts with `beginning`, skipping others.
    pub fn expect(&self, beginning: &str) -> String {
        self.within(DEADLINE, beginning)
            .unwrap_or_else(|| panic!("no line {beginning:?} within {DEADLINE:?}: {:#?}", self.seen()))
    }

    /// The same, or `None` if there is no such line within that time.
    pub fn within(&self, time: Duration, beginning: &str) -> Option<String> {
        let until = Instant::now() + time;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with(beginning) => return Some(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("the log has ended: {:#?}", self.seen()),
            }
        }
    }
}
