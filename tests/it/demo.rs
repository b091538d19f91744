//! Short runs of the demo: its counts, its messages when something goes wrong, and that it leaves no process behind.

use std::process::{Child, Command, ExitStatus, Stdio};

use crate::support::{children, example, guard, send_signal, tempdir, wait, wait_exit, Log};
use rustix::process::Signal;
use serde_json::Value;

struct Demo(Child);

impl Demo {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(example("demo"));
        command.args(["--clients", "2", "--every", "100", "--timeout", "60000", "--json"]).args(args);
        Self(guard::mark(&mut command, 0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Returns the processes of its server after the first progress line, which appears one second and some upgrades
    /// after the start.
    fn server(&mut self) -> Vec<u32> {
        Log::of(self.0.stderr.take().unwrap()).wait(0, |_| true).unwrap();
        let server: Vec<u32> = children(self.0.id()).into_keys().collect();
        assert!(!server.is_empty());
        server
    }

    /// Returns the exit status and the last line, as JSON.
    fn wait(mut self) -> (ExitStatus, Value) {
        let status = wait(&mut self.0);
        let out = Log::of(self.0.stdout.take().unwrap());
        out.wait_end().unwrap();
        let out = out.since(0);
        let json = out.last().and_then(|line| serde_json::from_str(line).ok());
        (status, json.unwrap_or_else(|| panic!("no JSON at the end of {out:?}")))
    }
}

impl Drop for Demo {
    /// Its server ends with it, which the test `killed` checks.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn five_upgrades(args: &[&str]) -> Value {
    let (status, json) = Demo::start(&[&["--upgrades", "5"], args].concat()).wait();
    assert_eq!(status.code(), Some(0), "{json}");
    assert!(json["requests"].as_u64().unwrap() > 0, "{json}");
    assert_eq!(json["failed"], 0, "{json}");
    for kind in ["refused", "reset", "eof", "timeout", "other"] {
        assert_eq!(json["failures"][kind], 0, "{json}");
    }
    assert_eq!((&json["upgrades_ok"], &json["upgrades_failed"]), (&5.into(), &0.into()), "{json}");
    assert_eq!(json["generation"], 6, "{json}");
    let (median, worst) = (json["upgrade_ms_median"].as_f64().unwrap(), json["upgrade_ms_max"].as_f64().unwrap());
    assert!(0.0 < median && median <= worst, "{json}");
    for part in ["latency_ms_during_upgrades", "latency_ms_between_upgrades"] {
        let latency = |name| json[part][name].as_f64().unwrap();
        assert!(latency("requests") > 0.0 && latency("p50") <= latency("max"), "{json}");
    }
    json
}

#[test]
fn tcp() {
    let dir = tempdir();
    let [latency, upgrade] = ["latency.svg", "upgrade.svg"].map(|name| dir.path().join(name));
    five_upgrades(&["--plot", latency.to_str().unwrap(), "--picture", upgrade.to_str().unwrap()]);
    let [latency, upgrade] = [latency, upgrade].map(|file| {
        let svg = std::fs::read_to_string(file).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        svg
    });
    assert_eq!(latency.matches(r#"fill-opacity="0.55""#).count(), 5, "each upgrade is marked: {latency}");
    for word in ["SIGHUP", "the new program starts", "it is ready", "commit, "] {
        assert_eq!(upgrade.matches(word).count(), 1, "{word}: {upgrade}");
    }
    assert!(upgrade.matches("generation ").count() >= 4, "two generations in either part: {upgrade}");
}

#[test]
#[cfg_attr(ecdysis_unix, ignore = "abstract names")]
fn unix() {
    five_upgrades(&["--unix"]);
}

#[test]
fn connections_that_are_kept() {
    for args in [&["--keep-alive"][..], &["--keep-alive", "--unix"], &["--http"]] {
        // `--unix` listens on an abstract name.
        if !cfg!(ecdysis_unix) || !args.contains(&"--unix") {
            five_upgrades(args);
        }
    }
}

#[test]
fn udp() {
    let json = five_upgrades(&["--udp"]);
    assert!(json["without_upgrades"]["requests"].as_u64().unwrap() > 0, "{json}");
}

/// With five seconds between upgrades, only the first generation exists when the first progress line appears.
const FAILING: [&str; 4] = ["--every", "5000", "--timeout", "3000"];

/// The demo must be able to report failures. Otherwise its zero would mean nothing.
#[test]
fn server_killed() {
    let mut demo = Demo::start(&FAILING);
    demo.server().into_iter().for_each(|pid| send_signal(pid, Signal::KILL));
    let (status, json) = demo.wait();
    assert_eq!(status.code(), Some(1), "{json}");
    assert!(json["failed"].as_u64().unwrap() > 0, "{json}");
    assert_eq!(json["problem"], "no process of the server is left", "{json}");
}

#[test]
fn server_hangs() {
    let mut demo = Demo::start(&FAILING);
    let server = demo.server();
    server.iter().for_each(|&pid| send_signal(pid, Signal::STOP));
    let (status, json) = demo.wait();
    assert_eq!(status.code(), Some(1), "{json}");
    assert!(json["failures"]["timeout"].as_u64().unwrap() > 0, "{json}");
    assert!(json["problem"].as_str().unwrap().contains("hangs"), "{json}");
    server.into_iter().for_each(wait_exit);
}

#[test]
fn interrupted() {
    let mut demo = Demo::start(&["--upgrades", "1000"]);
    let server = demo.server();
    send_signal(demo.0.id(), Signal::INT);
    let (status, json) = demo.wait();
    assert_eq!(status.code(), Some(130), "{json}");
    assert_eq!((&json["problem"], &json["failed"]), (&"interrupted".into(), &0.into()), "{json}");
    server.into_iter().for_each(wait_exit);
}

#[test]
fn killed() {
    let mut demo = Demo::start(&["--upgrades", "1000"]);
    let server = demo.server();
    drop(demo);
    server.into_iter().for_each(wait_exit);
}
