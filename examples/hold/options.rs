//! The command-line options of `hold`.

use std::ffi::{CString, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use crate::signals;

pub struct Options {
    pub command: Vec<CString>,
    /// The program with the arguments of `--check`.
    pub check: Option<Vec<CString>>,
    pub upgrade_signal: i32,
    pub stop_timeout: Duration,
    pub restarts: (usize, Duration),
    pub store: usize,
    pub watchdog: Option<Duration>,
    pub notify_fd: Option<RawFd>,
}

impl Options {
    pub fn parse() -> Result<Self, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Self {
            command: Vec::new(),
            check: None,
            upgrade_signal: libc::SIGHUP,
            stop_timeout: Duration::from_secs(90),
            restarts: (5, Duration::from_secs(60)),
            store: 256,
            watchdog: None,
            notify_fd: None,
        };
        let mut check = None;
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                Long("check") => check = Some(args.value()?.string()?),
                Long("upgrade-signal") => {
                    let name = args.value()?.string()?;
                    options.upgrade_signal = signals::by_name(&name).ok_or(format!("unknown signal {name}"))?;
                }
                Long("stop-timeout") => options.stop_timeout = args.value()?.parse_with(seconds)?,
                Long("restarts") => {
                    options.restarts = args.value()?.parse_with(|text| {
                        let (count, window) = text.split_once('/').ok_or("N/SECS, as in 5/60")?;
                        Ok::<_, String>((count.parse().map_err(|e| format!("{count}: {e}"))?, seconds(window)?))
                    })?;
                }
                Long("store") => options.store = args.value()?.parse()?,
                Long("watchdog") => options.watchdog = Some(args.value()?.parse_with(seconds)?),
                Long("notify-fd") => options.notify_fd = Some(args.value()?.parse()?),
                // The first word that is not an option starts the command, with or without a `--` before it.
                Value(program) => {
                    let words = std::iter::once(program).chain(args.raw_args()?);
                    options.command = words.map(c_string).collect::<Result<_, _>>()?;
                }
                other => return Err(other.unexpected()),
            }
        }
        let Some(program) = options.command.first() else { return Err("no program to run".into()) };
        if let Some(check) = check {
            let words = check.split_whitespace().map(|word| c_string(word.into()));
            let command = std::iter::once(Ok(program.clone())).chain(words);
            options.check = Some(command.collect::<Result<_, _>>()?);
        }
        // In the child each stored descriptor briefly has two numbers.
        let numbers = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        if numbers.is_some_and(|numbers| options.store as u64 * 2 + 32 > numbers) {
            return Err(format!("--store {}: the limit of open files (ulimit -n) is too low", options.store).into());
        }
        Ok(options)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|e| format!("{text}: {e}"))?;
    // At most a year, so that adding it to any time cannot overflow.
    Duration::try_from_secs_f64(seconds.min(31_536_000.0)).map_err(|e| format!("{text}: {e}"))
}

fn c_string(word: OsString) -> Result<CString, lexopt::Error> {
    CString::new(word.into_vec()).map_err(|_| "an argument has a NUL in it".into())
}
