//! Callbacks of the program that produce state for the next generation.

use std::error::Error as StdError;
use std::fmt;
use std::os::fd::OwnedFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use crate::error::Error;
use crate::handover::blob;
use crate::key::Key;

type Callback = dyn Fn() -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>> + Send + Sync;

/// A callback of the program that produces state when an upgrade begins.
#[derive(Clone)]
pub(crate) struct Producer(Arc<Callback>);

impl Producer {
    pub(super) fn new(
        produce: impl Fn() -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(produce))
    }

    pub(crate) fn produce(&self, key: &Key) -> Result<OwnedFd, Error> {
        let failed = |source| Error::State { name: String::from_utf8_lossy(key.raw_name()).into_owned(), source };
        // A panic that went on would end the service because of data that is only handed on.
        let produced = panic::catch_unwind(AssertUnwindSafe(|| (self.0)()));
        let bytes = produced.unwrap_or_else(|_| Err("the callback panicked".into())).map_err(failed)?;
        blob::seal(&bytes, blob::LIMIT).map_err(|e| failed(e.into()))
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Producer")
    }
}
