//! Output of the examples: log lines that cannot block or stop a server, and `--help`.
#![allow(dead_code)] // no example uses all of it

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to stderr, unless it would block. `eprintln!` panics when stderr is closed, and blocks when its reader
/// has stopped. Each line is one write, because several generations share stderr.
pub fn say(line: impl Display) {
    let now = Timespec::default();
    if poll(&mut [PollFd::new(&io::stderr(), PollFlags::OUT)], Some(&now)) == Ok(1) {
        let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
    }
}

/// Prints the comment at the top of `source` and exits, if the first argument is `--help` or `-h`.
pub fn help(source: &str) {
    if std::env::args().nth(1).is_some_and(|arg| arg == "--help" || arg == "-h") {
        let comment = source.lines().map_while(|line| line.strip_prefix("//!"));
        let text: Vec<_> = comment.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let _ = writeln!(io::stdout(), "{}", text.join("\n"));
        std::process::exit(0);
    }
}
