//! Sockets that a new version does not ask for.

use std::collections::HashSet;
use std::mem;

use super::registry::Registry;
use crate::error::Error;
use crate::key::Key;

/// The outcome for the unclaimed sockets.
#[derive(Debug, Default)]
pub(super) struct Unclaimed {
    /// The inodes of the parent's listeners that this version does not have.
    pub(super) dropped: HashSet<u64>,
    pub(super) infos: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Registry {
    /// Closes unclaimed sockets. Otherwise the kernel would complete handshakes that no process serves. Sockets of a
    /// unit are kept for the next generation, because the manager keeps them open anyway, and passes them only once.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`] if the parent has listeners and none of them was asked for, unless the program has
    /// declared that this is intended; and the error of a failed claim.
    pub(super) fn close_unclaimed(&mut self) -> Result<Unclaimed, Error> {
        if let Some((key, source)) = self.failed.take() {
            return Err(Error::Socket { key, source });
        }
        let is_child = self.pending.is_some();
        let mut unclaimed = Unclaimed::default();
        let passed = self.passed();
        if !passed.is_empty() {
            unclaimed.warnings.push(format!("the service manager passed {passed}, which is unclaimed"));
        }
        let mut closed = mem::take(&mut self.retired);
        for entry in mem::take(&mut self.inherited) {
            if entry.unit.is_some() {
                self.inherited.push_back(entry);
            } else if !entry.key.kind().has_address() {
                unclaimed.infos.push(format!("closed an inherited and unclaimed {}", entry.key));
                self.closed.push((entry.key, entry.file));
            } else {
                let same = |key: &Key| *key == entry.key;
                let claimed = self.ours.iter().filter(|ours| same(&ours.key)).count();
                let what = match (claimed, is_child) {
                    (0, false) => "closed".into(),
                    (0, true) => "the old version serves it until it ends, then closes it".into(),
                    _ => format!("this version asks for {claimed} of the sockets with this key, by their order"),
                };
                unclaimed.warnings.push(format!("the inherited {} is unclaimed: {what}", entry.key));
                closed.push(entry);
            }
        }
        if is_child && !closed.is_empty() && !self.claimed && !self.discards {
            let list: Vec<_> = closed.iter().map(|entry| entry.key.to_string()).collect();
            return Err(Error::NoListener { inherited: list.join(", ") });
        }
        for (key, ..) in self.pending.iter().flatten() {
            let count = |all: &mut dyn Iterator<Item = &Key>| all.filter(|of| *of == key).count();
            let new = count(&mut self.pending.iter().flatten().map(|(key, ..)| key));
            let all = count(&mut self.ours.iter().map(|entry| &entry.key));
            if all > new {
                let old = all - new;
                unclaimed.warnings.push(format!("{key}: {all} sockets with this key, but the old version has {old}"));
            }
        }
        unclaimed.warnings.dedup();
        // The same socket may have been inherited twice but claimed once.
        unclaimed.dropped = closed.iter().map(|entry| entry.inode).collect();
        for ours in &self.ours {
            unclaimed.dropped.remove(&ours.inode);
        }
        self.closed.extend(closed.into_iter().map(|entry| (entry.key, entry.file)));
        let kept = mem::take(&mut self.kept_late);
        self.inherit(kept);
        Ok(unclaimed)
    }
}
