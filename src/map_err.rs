//! Functions for `map_err`, which name the operation that failed.

use std::io;

use crate::error::Error;
use crate::key::Key;

impl Error {
    pub(crate) fn prepare<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Prepare { what, source: source.into() }
    }

    pub(crate) fn handover<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Handover { what, source: source.into() }
    }

    pub(crate) fn socket<E: Into<io::Error>>(key: &Key) -> impl Fn(E) -> Self + '_ {
        move |source| Self::Socket { key: key.clone(), source: source.into() }
    }
}
