//! The descriptors that the server has stored, to be passed to it when it is started again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{fcntl_getfl, fstat, OFlags};

pub struct Store {
    limit: usize,
    entries: Vec<Entry>,
}

pub struct Entry {
    pub name: String,
    pub fd: OwnedFd,
    /// Removed when the other end hangs up (`FDPOLL=1`).
    polled: bool,
}

impl Store {
    pub fn new(limit: usize) -> Self {
        Self { limit, entries: Vec::new() }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Keeps a descriptor. One that is stored already by that name is not stored twice: each generation stores its
    /// listeners anew.
    ///
    /// # Errors
    /// Why not: the name, the limit.
    pub fn put(&mut self, name: &str, fd: OwnedFd, polled: bool) -> Result<(), &'static str> {
        // Names are passed in a list with colons between.
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

    /// Those whose hangup is waited for, in the order of `remove_hung`.
    pub fn polled(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.entries.iter().filter(|entry| entry.polled).map(|entry| entry.fd.as_fd())
    }

    /// Closes those for which `hung` says so, of the ones that `polled` has named.
    pub fn remove_hung(&mut self, hung: Vec<bool>) {
        let mut hung = hung.into_iter();
        self.entries.retain(|entry| !(entry.polled && hung.next().unwrap_or(false)));
    }
}

/// The same socket, pipe or file, open for the same.
fn is_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let what = |fd| {
        let (stat, flags) = (fstat(fd).ok()?, fcntl_getfl(fd).ok()?);
        // The two ends of a pipe are one file.
        Some((stat.st_dev, stat.st_ino, flags & OFlags::RWMODE))
    };
    what(a).is_some_and(|a| Some(a) == what(b))
}
