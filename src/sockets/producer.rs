//! Callbacks of the program that produce state for the next generation.

use std::error::Error as StdError;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use crate::error::Error;
use crate::handover::blob;
use crate::handover::entry::Entry;
use crate::key::Key;

type Callback = dyn Fn() -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>> + Send + Sync;

/// A callback of the program that produces state for the next generation.
#[derive(Clone)]
pub(crate) struct Producer {
    pub(super) key: Key,
    /// It is called at the commit and not when the upgrade begins.
    pub(super) at_commit: bool,
    pub(super) callback: Arc<Callback>,
}

impl Producer {
    pub(super) fn produce(&self) -> Result<Entry, Error> {
        // Otherwise a panic would end the service, only because of data for the next generation.
        let produced = panic::catch_unwind(AssertUnwindSafe(|| (self.callback)()));
        let bytes = produced.unwrap_or_else(|_| Err("the callback panicked".into())).map_err(|e| self.failed(e))?;
        let fd = blob::seal(&bytes, blob::LIMIT).map_err(|e| self.failed(e))?;
        Entry::new(self.key.clone(), fd).map_err(|e| self.failed(e))
    }

    pub(super) fn failed(&self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        Error::State { name: self.key.name().to_string_lossy().into_owned(), source: source.into() }
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Producer({})", self.key)
    }
}
