//! Sends a command to a server's control socket (`Builder::control_on_socket`). The exit code is the outcome, so `ctl`
//! suits `ExecReload=`.
//!
//!     cargo run --example http -- 127.0.0.1:8000 /tmp/http.control     # and then in a second terminal:
//!     cargo run --example ctl -- /tmp/http.control upgrade             # upgraded: generation 2 serves as pid 812, …
//!     cargo run --example ctl -- /tmp/http.control status              # pid 812, generation 2, up 3.1 s, serving …
//!     cargo run --example ctl -- /tmp/http.control stop                # stopped: the process has ended
//!
//! `cargo install --path . --example ctl` installs it. Programs can call `ecdysis::control::request`.
//!
//!     ctl SOCKET upgrade|stop|partial-stop|rollback|status
//!       --json               print the outcome as one line of JSON
//!       --timeout SECONDS    how long to wait (120); the command continues in the server after that
//!
//! Exit code 0: done. 1: the command failed, and the server serves as before. 2: refused, because another upgrade or a
//! stop is in progress; or wrong usage. 3: no server at the socket. 4: no answer in time, or the server ended without an
//! answer. The outcome goes to stdout if the exit code is 0, otherwise to stderr. JSON always goes to stdout.

mod support;

use serde_json::{json, Map, Value};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: ctl SOCKET upgrade|stop|partial-stop|rollback|status [--json] [--timeout SECONDS]";

fn main() -> ExitCode {
    support::help(include_str!("ctl.rs"));
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = writeln!(io::stderr(), "ctl: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let outcome = match ask(&options) {
        Ok(answer) => Outcome::of(&options.command, &answer),
        Err(error) => error,
    };
    // Not `println!`, which would panic if stdout is closed: the exit code must still be the outcome.
    let _ = match (options.json, outcome.code) {
        (true, _) => writeln!(io::stdout(), "{}", outcome.json()),
        (false, 0) => writeln!(io::stdout(), "{}", outcome.words),
        (false, _) => writeln!(io::stderr(), "ctl: {}", outcome.words),
    };
    ExitCode::from(outcome.code)
}

struct Options {
    socket: PathBuf,
    command: String,
    json: bool,
    timeout: Duration,
}

impl Options {
    fn parse() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        let (mut words, mut json, mut timeout) = (Vec::new(), false, Duration::from_secs(120));
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                Value(word) => words.push(word),
                Long("json") => json = true,
                Long("timeout") => {
                    timeout = args.value()?.parse_with(|s| Duration::try_from_secs_f64(s.parse().unwrap_or(-1.0)))?
                }
                other => return Err(other.unexpected()),
            }
        }
        let [socket, command] = words.try_into().map_err(|_| "a socket and a command are required")?;
        let command = command.string()?;
        match &*command {
            "upgrade" | "stop" | "partial-stop" | "rollback" | "status" => {}
            other => return Err(format!("unknown command {other:?}").into()),
        }
        Ok(Self { socket: socket.into(), command, json, timeout })
    }
}

/// The outcome of the command, as text for people and as fields for programs.
struct Outcome {
    code: u8,
    /// A name for programs.
    name: &'static str,
    words: String,
    fields: Map<String, Value>,
}

impl Outcome {
    fn new(code: u8, name: &'static str, words: impl Into<String>) -> Self {
        Self { code, name, words: words.into(), fields: Map::new() }
    }

    /// Interprets the server's answer to this command.
    fn of(command: &str, answer: &str) -> Self {
        let (word, rest) = answer.split_once([' ', ':']).unwrap_or((answer, ""));
        match (command, word) {
            (_, "failed") => Self::new(1, "failed", format!("failed: {}", rest.trim())),
            (_, "busy") => Self::new(2, "busy", "busy: another upgrade is under way"),
            ("stop", "stopping") => Self::new(0, "stopped", "stopped: the process has ended"),
            ("partial-stop", "stopping") => {
                Self::new(0, "partially-stopped", "partially stopped: the process has ended")
            }
            ("rollback", "rolled") => Self::new(0, "rolled-back", "rolled back: the earlier version serves again"),
            ("upgrade" | "rollback" | "status", "stopping") => Self::new(2, "stopping", "the server is stopping"),
            ("upgrade", "upgraded") => {
                let fields = fields(rest);
                let words = format!(
                    "upgraded: generation {} serves as pid {}, committed after {} ms",
                    text(&fields, "generation"),
                    text(&fields, "pid"),
                    text(&fields, "ms")
                );
                Self { code: 0, name: "upgraded", words, fields }
            }
            ("status", _) if answer.starts_with("pid=") => {
                let fields = fields(answer);
                Self { code: 0, name: "status", words: status(&fields), fields }
            }
            _ => Self::new(4, "no-answer", format!("the server gave no answer that ctl knows: {answer:?}")),
        }
    }

    fn json(&self) -> Value {
        let mut all = Map::from_iter([("outcome".into(), json!(self.name)), ("exit".into(), json!(self.code))]);
        match self.fields.is_empty() {
            true => drop(all.insert("message".into(), json!(self.words))),
            false => all.extend(self.fields.clone()),
        }
        Value::Object(all)
    }
}

/// Parses `key=value` words with percent-escaped values. `socket` may occur any number of times, and `draining` is a list.
fn fields(line: &str) -> Map<String, Value> {
    let mut fields = Map::new();
    for (key, value) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
        let value = unescape(value);
        let number = |text: &str| text.parse::<u64>().map(|n| json!(n)).or(text.parse::<f64>().map(|n| json!(n)));
        match key {
            "socket" => {
                let sockets = fields.entry("sockets").or_insert_with(|| json!([]));
                sockets.as_array_mut().expect("made above").push(json!(value));
            }
            "draining" => {
                let generations: Vec<_> = value.split(',').filter_map(|text| number(text).ok()).collect();
                fields.insert(key.into(), json!(generations));
            }
            _ => drop(fields.insert(key.into(), number(&value).unwrap_or_else(|_| json!(value)))),
        }
    }
    fields
}

/// A field as text; `?` if it is missing, because a server of another version may omit it.
fn text(fields: &Map<String, Value>, key: &str) -> String {
    match fields.get(key) {
        None => "?".into(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Decodes percent escapes such as `%20`. Anything else stays as it is.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [byte, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| *byte == b'%') {
            Some(escaped) => (bytes.push(escaped), rest = &tail[2..]),
            None => (bytes.push(*byte), rest = tail),
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn status(fields: &Map<String, Value>) -> String {
    let text = |key| text(fields, key);
    let up = fields.get("uptime_ms").and_then(Value::as_f64).unwrap_or(f64::NAN) / 1e3;
    let mut words = format!(
        "pid {}, generation {}, up {up:.1} s, {}, connections: {}",
        text("pid"),
        text("generation"),
        text("phase"),
        text("connections")
    );
    let list = |key: &str| fields.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    for generation in list("draining") {
        words += &format!("\n  generation {generation} still drains");
    }
    for socket in list("sockets") {
        words += &format!("\n  {}", socket.as_str().unwrap_or_default());
    }
    words
}

/// Sends the command and returns the one line of answer. The server then closes the connection; after a stop, it does so
/// when it ends.
fn ask(options: &Options) -> Result<String, Outcome> {
    let _spinner = Spinner::start(&options.command);
    ecdysis::control::request(&options.socket, &options.command, options.timeout).map_err(|error| match error.kind() {
        ErrorKind::TimedOut => {
            let words =
                format!("no answer within {} s; the command continues in the server", options.timeout.as_secs_f64());
            Outcome::new(4, "no-answer", words)
        }
        ErrorKind::UnexpectedEof => {
            Outcome::new(4, "no-answer", "no answer: the server has ended, or does not trust this user")
        }
        _ => Outcome::new(3, "unreachable", error.to_string()),
    })
}

/// Shows on a terminal what `ctl` waits for, and for how long it has waited.
struct Spinner(Option<(Sender<()>, JoinHandle<()>)>);

impl Spinner {
    fn start(what: &str) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let (what, since, (end, ended)) = (what.to_owned(), Instant::now(), channel());
        let thread = thread::spawn(move || {
            for sign in ['|', '/', '-', '\\'].into_iter().cycle() {
                let waited = ended.recv_timeout(Duration::from_millis(100));
                if waited != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                let _ = write!(io::stderr(), "\r{sign} {what} {:.1} s", since.elapsed().as_secs_f64());
            }
            let _ = write!(io::stderr(), "\r\x1b[K");
        });
        Self(Some((end, thread)))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}
