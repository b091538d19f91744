//! What was passed, for the next start of the service instead of a child: in the store of the service manager.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::late::{produce, TIME};
use super::Sockets;
use crate::error::Error;
use crate::handover::blob;
use crate::handover::entry::Entry;
use crate::handover::manifest::{self, Origin};
use crate::manager::Store;

impl Sockets {
    /// Stores what was passed, whole or not at all. Accepting is paused, as at the commit of an upgrade. Returns the number
    /// of descriptors.
    ///
    /// # Errors
    ///
    /// Those of the callbacks; and [`Error::Prepare`] if the store has no room for everything.
    pub(crate) fn keep_passed(&self, store: &dyn Store, generation: u64) -> Result<usize, Error> {
        let producers = self.registry().producers.clone();
        let (late, now): (Vec<_>, Vec<_>) = producers.into_iter().partition(|producer| producer.at_commit);
        let end = Instant::now() + TIME;
        let early = produce(now, end)?;
        let known: Vec<Entry> = self.registry().snapshot();
        let late = produce(late, end)?;
        let all: Vec<Entry> = self.registry().snapshot();
        let failed = |source| Error::Prepare { what: "state for the next start", source };
        check(&all, store.capacity(), early.len() + late.len()).map_err(failed)?;

        let is_state = |entry: &Entry| entry.unit.is_none() && !entry.key.kind().has_address();
        let is_known = |entry: &Entry| known.iter().any(|known| known.inode == entry.inode && known.key == entry.key);
        let (before, since): (Vec<_>, Vec<_>) = all.into_iter().filter(is_state).partition(is_known);
        let count = early.len() + before.len();
        let entries: Vec<Entry> = early.into_iter().chain(before).chain(late).chain(since).collect();
        let text = manifest::encode(&Origin { generation, ..Origin::default() }, (0..).zip(&entries));
        let text = blob::seal(text.as_bytes(), manifest::MAX_SIZE as u64).map_err(failed)?;
        let number = entries.len();
        let descriptors = [Arc::new(text)].into_iter().chain(entries.into_iter().map(|entry| entry.fd)).collect();
        store.keep_passed(descriptors, count).map_err(failed)?;
        Ok(number)
    }
}

/// Whether the store has room for everything, and a place for each descriptor: of two that are the same it keeps one.
fn check(all: &[Entry], capacity: usize, produced: usize) -> io::Result<()> {
    let needed = all.iter().filter(|entry| entry.unit.is_none()).count() + produced + 1;
    if needed > capacity {
        return Err(io::Error::other(format!("it needs FileDescriptorStoreMax={needed}, which is {capacity}")));
    }
    let mut seen = HashMap::new();
    for entry in all {
        if let Some(other) = seen.insert(entry.inode, &entry.key) {
            return Err(io::Error::other(format!(
                "{} and {other} are the same file, which is kept only once",
                entry.key
            )));
        }
    }
    Ok(())
}
