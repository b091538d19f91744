//! Claims: which inherited socket a program gets.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::in_use;
use super::registry::Registry;
use crate::handover::entry::{duplicate, Entry};
use crate::key::Key;
use crate::listen;

impl Registry {
    /// Moves the first inherited socket that `wanted` accepts to the registry's own, and returns a duplicate for the
    /// program.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn claim_if(&mut self, wanted: impl Fn(&Entry) -> bool) -> io::Result<Option<(Key, OwnedFd)>> {
        let Some(at) = self.inherited.iter().position(wanted) else { return Ok(None) };
        let key = self.inherited[at].key.clone();
        Ok(Some((key.clone(), self.claim_at(at, key)?)))
    }

    pub(super) fn claim(&mut self, key: &Key) -> io::Result<Option<OwnedFd>> {
        self.position(key).map(|at| self.claim_at(at, key.clone())).transpose()
    }

    /// Returns the position of the inherited socket that a program gets if it asks for `key`.
    fn position(&self, key: &Key) -> Option<usize> {
        let exact = self.inherited.iter().position(|entry| entry.key == *key);
        exact.or_else(|| self.inherited.iter().position(|entry| key.falls_back_to(&entry.key)))
    }

    /// Removes and returns the inherited socket with this key, if its path no longer leads to it, so that clients
    /// cannot reach it. The caller creates another, or passes this one to [`claim_lost`](Self::claim_lost).
    pub(super) fn take_lost(&mut self, key: &Key) -> Option<Entry> {
        let at = self.position(key)?;
        let file = self.inherited[at].file.filter(|_| self.same_paths)?;
        let path = Path::new(key.name());
        (listen::file_id(path).ok() != Some(file)).then(|| self.inherited.remove(at))?
    }

    /// Claims a socket that [`take_lost`](Self::take_lost) returned, because no other could be created.
    pub(super) fn claim_lost(&mut self, key: &Key, entry: Entry) -> io::Result<OwnedFd> {
        self.inherited.push_front(Entry { key: key.clone(), ..entry });
        self.claim_at(0, key.clone())
    }

    fn claim_at(&mut self, at: usize, key: Key) -> io::Result<OwnedFd> {
        let fd = duplicate(&self.inherited[at].fd)?;
        self.claimed |= key.kind().has_address();
        let entry = self.inherited.remove(at);
        self.ours.extend(entry.map(|entry| Entry { key, ..entry }));
        Ok(fd)
    }

    /// Removes and returns a descriptor that the parent handed over under this key.
    pub(super) fn take(&mut self, key: &Key) -> Option<OwnedFd> {
        let at = self.inherited.iter().position(|entry| entry.key == *key)?;
        let entry = self.inherited.remove(at)?;
        // It is shared only if a running upgrade is handing it over.
        Arc::try_unwrap(entry.fd).or_else(duplicate).ok()
    }

    /// Adds the causes to "address in use", which is hard to understand without them.
    pub(super) fn explain_in_use(&mut self, key: &Key, error: io::Error) -> io::Error {
        let is_child = self.pending.is_some();
        let mut causes = in_use::causes(key, self.inherited.make_contiguous(), &self.ours, is_child);
        let passed = self.passed();
        // One of them is usually the other socket on that address.
        if causes.is_empty() && !passed.is_empty() {
            causes.push(format!("the service manager passed {passed}, which is unclaimed"));
        }
        match causes.is_empty() {
            true => error,
            false => io::Error::new(error.kind(), format!("{error}; {}", causes.join("; "))),
        }
    }

    /// Returns the unclaimed sockets of a unit, as text.
    pub(crate) fn passed(&self) -> String {
        let units = self.inherited.iter();
        let mut list: Vec<_> =
            units.filter_map(|entry| Some(format!("{} as {:?}", entry.key, entry.unit.as_ref()?))).collect();
        list.sort();
        list.join(", ")
    }

    /// Returns whether an unclaimed socket is left that a unit passed by this name.
    #[cfg(all(feature = "systemd_sockets", feature = "tokio_ecdysis"))]
    pub(crate) fn has_passed(&self, name: &str) -> bool {
        self.inherited.iter().any(|entry| entry.unit.as_deref() == Some(name))
    }
}
