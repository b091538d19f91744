//! Sockets that a new version does not ask for.

use std::collections::{HashMap, HashSet};
use std::mem;

use log::Level;

use super::registry::Registry;
use crate::error::Error;
use crate::key::Key;

impl Registry {
    /// Closes unclaimed sockets. Otherwise the kernel would complete handshakes that no process serves. Sockets of a
    /// unit are kept for the next generation, because the manager keeps them open anyway, and passes them only once.
    /// Returns the inodes of the parent's listeners that this version does not have, and adds what to log to `lines`.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`] if the parent has listeners and none of them was asked for, unless the program has
    /// declared that this is intended; and the error of a failed claim.
    pub(super) fn close_unclaimed(&mut self, lines: &mut Vec<(Level, String)>) -> Result<Vec<u64>, Error> {
        if let Some((key, source)) = self.failed.take() {
            return Err(Error::Socket { key, source });
        }
        let is_child = self.pending.is_some();
        let passed = self.passed();
        if !passed.is_empty() {
            lines.push((Level::Warn, format!("the service manager passed {passed}, which is unclaimed")));
        }
        let mut closed = mem::take(&mut self.retired);
        for entry in mem::take(&mut self.inherited) {
            if entry.unit.is_some() {
                self.inherited.push_back(entry);
            } else if !entry.key.kind().has_address() {
                lines.push((Level::Info, format!("closed an inherited and unclaimed {}", entry.key)));
                self.closed.push((entry.key, entry.file));
            } else {
                let same = |key: &Key| *key == entry.key;
                let claimed = self.ours.iter().filter(|ours| same(&ours.key)).count();
                let what = match (claimed, is_child) {
                    (0, false) => "closed".into(),
                    (0, true) => "the old version serves it until it ends, then closes it".into(),
                    _ => format!("this version asks for {claimed} of the sockets with this key, by their order"),
                };
                lines.push((Level::Warn, format!("the inherited {} is unclaimed: {what}", entry.key)));
                closed.push(entry);
            }
        }
        if is_child && !closed.is_empty() && !self.claimed && !self.discards {
            let list: Vec<_> = closed.iter().map(|entry| entry.key.to_string()).collect();
            return Err(Error::NoListener { inherited: list.join(", ") });
        }
        let mut counts = HashMap::<&Key, [usize; 2]>::new();
        for (key, ..) in self.pending.iter().flatten() {
            counts.entry(key).or_default()[0] += 1;
        }
        for entry in &self.ours {
            if let Some([_, all]) = counts.get_mut(&entry.key) {
                *all += 1;
            }
        }
        for (key, [new, all]) in counts.into_iter().filter(|(_, [new, all])| all > new) {
            let old = all - new;
            lines.push((Level::Warn, format!("{key}: {all} sockets with this key, but the old version has {old}")));
        }
        lines.dedup();
        // The same socket may have been inherited twice but claimed once.
        let mut dropped: HashSet<u64> = closed.iter().map(|entry| entry.inode).collect();
        for ours in &self.ours {
            dropped.remove(&ours.inode);
        }
        self.closed.extend(closed.into_iter().map(|entry| (entry.key, entry.file)));
        let kept = mem::take(&mut self.kept_late);
        self.inherit(kept);
        Ok(dropped.into_iter().collect())
    }
}
