//! The descriptors that the server has stored, which a restart passes to it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{fcntl_getfl, fstat, OFlags};

pub struct Store {
    limit: usize,
    entries: Vec<Entry>,
}

pub struct Entry {
    pub name: String,
    pub fd: OwnedFd,
    /// Remove it when the other end hangs up (`FDPOLL=1`).
    polled: bool,
}

impl Store {
    pub fn new(limit: usize) -> Self {
        Self { limit, entries: Vec::new() }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Stores a descriptor, unless it is already stored under that name: every generation stores all of its listeners.
    ///
    /// # Errors
    /// The name cannot be used, or the store is full.
    pub fn put(&mut self, name: &str, fd: OwnedFd, polled: bool) -> Result<(), &'static str> {
        // Names are passed in a list that is separated by colons.
        if !(1..=255).contains(&name.len()) || !name.bytes().all(|b| (b' '..127).contains(&b) && b != b':') {
            return Err("descriptor without a usable name");
        }
        if self.entries.iter().any(|entry| entry.name == name && is_same(entry.fd.as_fd(), fd.as_fd())) {
            return Ok(());
        }
        if self.entries.len() >= self.limit {
            return Err("the store is full");
        }
        self.entries.push(Entry { name: name.to_owned(), fd, polled });
        Ok(())
    }

    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Closes all descriptors of this name.
    pub fn remove(&mut self, name: &str) {
        self.entries.retain(|entry| entry.name != name);
    }

    /// Returns the descriptors to poll for a hangup, in the order that `remove_hung` expects.
    pub fn polled(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.entries.iter().filter(|entry| entry.polled).map(|entry| entry.fd.as_fd())
    }

    /// Closes the polled descriptors for which `hung` is true, in the order of `polled`.
    pub fn remove_hung(&mut self, hung: Vec<bool>) {
        let mut hung = hung.into_iter();
        self.entries.retain(|entry| !(entry.polled && hung.next().unwrap_or(false)));
    }
}

/// Whether both are the same socket, pipe or file, opened with the same access mode.
fn is_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let what = |fd| {
        let (stat, flags) = (fstat(fd).ok()?, fcntl_getfl(fd).ok()?);
        // The two ends of a pipe are one file.
        Some((stat.st_dev, stat.st_ino, flags & OFlags::RWMODE))
    };
    what(a).is_some_and(|a| Some(a) == what(b))
}
