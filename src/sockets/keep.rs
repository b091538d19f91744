//! Stores the program's state, streams and descriptors with the service manager, for the next start of the service.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{fstat, FileType};

use super::late::{pack, produce, TIME};
use super::Sockets;
use crate::error::Error;
use crate::handover::entry::Entry;
use crate::manager::Store;

impl Sockets {
    /// Stores everything that was passed, completely or not at all. Accepting must be paused, as at the commit of an
    /// upgrade. Returns the number of descriptors.
    ///
    /// # Errors
    ///
    /// Those of the callbacks; and [`Error::Prepare`] if the store has no room for everything.
    pub(crate) fn keep_passed(&self, store: &dyn Store, generation: u64) -> Result<usize, Error> {
        let [now, late] = self.registry().producers();
        let end = Instant::now() + TIME;
        let early = produce(now, end)?;
        let known: Vec<Entry> = self.registry().snapshot();
        let late = produce(late, end)?;
        let all: Vec<Entry> = self.registry().snapshot();
        let failed = |source| Error::Prepare { what: "state for the next start", source };
        check(&all, store.capacity(), early.len() + late.len()).map_err(failed)?;

        let is_state = |entry: &Entry| entry.unit.is_none() && !entry.key.kind().has_address();
        let is_known = |entry: &Entry| known.iter().any(|known| Arc::ptr_eq(&known.fd, &entry.fd));
        let (before, since): (Vec<_>, Vec<_>) = all.into_iter().filter(is_state).partition(is_known);
        let count = early.len() + before.len();
        let entries: Vec<Entry> = early.into_iter().chain(before).chain(late).chain(since).collect();
        let number = entries.len();
        pack(entries, generation).and_then(|packed| store.keep_passed(packed, count)).map_err(failed)?;
        Ok(number)
    }
}

/// Checks that the store has room for everything, and that no two descriptors are the same, because the store would
/// keep only one of them. Descriptors without a file (eventfd(2) and the like) share an inode, so they cannot be compared.
fn check(all: &[Entry], capacity: usize, produced: usize) -> io::Result<()> {
    let needed = all.iter().filter(|entry| entry.unit.is_none()).count() + produced + 1;
    if needed > capacity {
        return Err(io::Error::other(format!("FileDescriptorStoreMax= must be at least {needed}, but is {capacity}")));
    }
    let mut seen = HashMap::new();
    for entry in all {
        let stat = fstat(&entry.fd)?;
        let has_file = FileType::from_raw_mode(stat.st_mode) != FileType::Unknown;
        if let Some(other) = seen.insert((stat.st_dev, stat.st_ino), &entry.key).filter(|_| has_file) {
            return Err(io::Error::other(format!(
                "{} and {other} are the same file, which is kept only once",
                entry.key
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn only_the_same_file_is_refused() {
        use super::*;
        use crate::key::Key;
        use rustix::event::epoll;
        use std::os::fd::AsFd;

        let entry = |name: &str, fd: &dyn AsFd| Entry::duplicate(Key::fd(name), fd.as_fd()).unwrap();
        let [one, two] = [(); 2].map(|()| epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        check(&[entry("one", &one), entry("two", &two)], 3, 0).unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let error = check(&[entry("one", &pipe), entry("two", &pipe)], 3, 0).unwrap_err();
        assert!(error.to_string().contains("fd two and fd one are the same file"), "{error}");
    }
}
