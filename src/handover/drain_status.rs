//! The status of a draining generation: an unnamed memory file that is passed from child to child. Later generations
//! read it without asking the older one, so a frozen generation does not delay them.

use std::io;
use std::process;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::{pread, pwrite};

use super::entry::Entry;
use crate::key::Key;
use crate::sys::blob;
use crate::sys::signal::without_sigxfsz;

/// The status of this generation.
pub(crate) struct DrainStatus {
    pub(crate) entry: Entry,
    /// The start of this generation, in milliseconds since 1970.
    began: u128,
}

impl DrainStatus {
    pub(crate) fn new(generation: u64, began: Instant) -> io::Result<Self> {
        let entry = Entry::new(Key::drain_status(generation), blob::open_for_writing()?)?;
        Ok(Self { entry, began: now().saturating_sub(began.elapsed().as_millis()) })
    }

    /// Writes the number of remaining connections. The line always has the same length.
    pub(crate) fn write(&self, connections: usize) {
        let line = format!("{:>10} {:>20} {connections:>20}\n", process::id(), self.began);
        let _ = without_sigxfsz(|| Ok(pwrite(&self.entry.fd, line.as_bytes(), 0)?));
    }
}

/// Returns the PID, the age and the number of connections that another generation has written.
pub(crate) fn read(entry: &Entry) -> Option<(u32, Duration, usize)> {
    let mut line = [0; 53];
    pread(&entry.fd, &mut line, 0).ok()?;
    let mut words = std::str::from_utf8(&line).ok()?.split_whitespace();
    let (pid, began) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let age = u64::try_from(now().saturating_sub(began)).ok()?;
    Some((pid, Duration::from_millis(age), words.next()?.parse().ok()?))
}

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
