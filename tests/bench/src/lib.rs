//! The protocol between the servers and the measuring program.
//!
//! A server reads commands from stdin and answers on stdout. Later generations inherit both:
//!
//! | line | means |
//! |---|---|
//! | `upgrade` | in: upgrade now, and end |
//! | `serving pid=` | out: this generation is ready |
//! | `upgraded ns= at=` | out: upgraded: the time from the call to the commit, and when (CLOCK_MONOTONIC) that was |

#![deny(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};

pub mod rate;
#[allow(unsafe_code)]
pub mod sys;

/// A server's arguments, each of the form `name=value`.
pub struct Args(Vec<String>);

impl Args {
    pub fn get() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find_map(|a| a.strip_prefix(name)?.strip_prefix('='))
    }

    pub fn number(&self, name: &str, default: usize) -> usize {
        self.text(name).and_then(|n| n.parse().ok()).unwrap_or(default)
    }

    /// Returns the addresses to listen on: one port on the requested number of loopback addresses.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        let port = self.number("port", 0) as u16;
        (0..self.number("listeners", 1)).map(move |i| {
            let (high, low) = (i / 200, i % 200 + 1);
            SocketAddr::from((Ipv4Addr::new(127, 0, high as u8, low as u8), port))
        })
    }

    /// The trigger of an upgrade: SIGHUP, or a line on stdin.
    pub fn by_signal(&self) -> bool {
        self.text("trigger") == Some("signal")
    }
}

/// Writes each line with one call, because several generations share stdout.
pub fn say(line: &str) {
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
}

pub fn say_serving() {
    say(&format!("serving pid={}", std::process::id()));
}

pub fn say_upgraded(since: u64, committed: u64) {
    say(&format!("upgraded ns={} at={committed}", committed - since));
}

/// Reads one line from stdin and not a byte more, because the rest is for the next generation. Empty at the end.
pub fn hear() -> String {
    let mut stdin = std::mem::ManuallyDrop::new(sys::adopt::<std::fs::File>(0));
    let mut line = String::new();
    let mut byte = [0];
    while matches!(stdin.read(&mut byte), Ok(1)) && byte[0] != b'\n' {
        line.push(byte[0] as char);
    }
    line
}

/// Answers one request: reads a line and writes a line.
pub fn answer(mut stream: impl Read + Write) {
    let mut buffer = [0; 64];
    if matches!(stream.read(&mut buffer), Ok(n) if n > 0) {
        let _ = stream.write_all(b"served\n");
    }
}
