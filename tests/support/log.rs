//! The lines that all generations of a server write to stderr, in the order of arrival.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use super::DEADLINE;

#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Default)]
struct Lines {
    all: Vec<String>,
    ended: bool,
}

impl Log {
    pub fn of(stderr: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let written = log.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                written.lock().all.push(String::from_utf8_lossy(&line).into_owned());
                written.0 .1.notify_all();
            }
            written.lock().ended = true;
            written.0 .1.notify_all();
        });
        log
    }

    /// A failed test has poisoned the lock, but still prints the lines.
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0 .0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> usize {
        self.lock().all.len()
    }

    /// Returns the lines from number `from` on.
    pub fn since(&self, from: usize) -> Vec<String> {
        self.lock().all[from..].to_vec()
    }

    /// Waits for the first line from number `from` on for which `wanted` holds. Returns its number and the line.
    pub fn wait(&self, from: usize, wanted: impl Fn(&str) -> bool) -> Result<(usize, String), String> {
        let mut next = from;
        self.until(|lines| {
            let found = lines.all[next..].iter().position(|line| wanted(line)).map(|at| next + at);
            next = lines.all.len();
            match found {
                Some(at) => Some(Ok((at, lines.all[at].clone()))),
                None => lines.ended.then(|| Err(format!("no such line, only:\n{}", lines.all[from..].join("\n")))),
            }
        })?
    }

    /// Waits until `done` holds for all lines so far.
    pub fn wait_all(&self, done: impl Fn(&[String]) -> bool) -> Result<(), String> {
        self.until(|lines| done(&lines.all).then_some(()))
    }

    /// Waits until no process has the other end of stderr open.
    pub fn wait_end(&self) -> Result<(), String> {
        self.until(|lines| lines.ended.then_some(()))
    }

    fn until<T>(&self, mut done: impl FnMut(&Lines) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + DEADLINE;
        let mut lines = self.lock();
        loop {
            if let Some(result) = done(&lines) {
                return Ok(result);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("not within {DEADLINE:?}, after:\n{}", lines.all.join("\n")));
            }
            lines = self.0 .1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
