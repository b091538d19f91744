//! The service manager in a build without feature `systemd_notify`: nobody to talk to.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::event::Event;
use crate::listen::FileId;
use crate::{Key, Upgraded};

pub(crate) const ANNOUNCE: Duration = Duration::ZERO;

/// See `manager.rs`, whose place this takes.
#[derive(Debug, Default)]
pub(crate) struct Manager;

impl Manager {
    pub(crate) fn is_there(&self) -> bool {
        false
    }

    pub(crate) fn is_main(&self) -> bool {
        false
    }

    pub(crate) fn become_main(&self, _: bool) {}

    pub(crate) fn hear(&self, _: &Event<'_>) {}

    pub(crate) fn announce(&self, _: &Upgraded, _: bool) {}

    pub(crate) fn asked_again(&self) {}

    pub(crate) fn beat(&self, _: impl FnOnce() -> bool) -> Option<Instant> {
        None
    }

    pub(crate) fn progress(&self, _: usize) {}

    pub(crate) fn room(&self) -> usize {
        0
    }

    pub(crate) fn keep(&self, _: &Key, _: BorrowedFd<'_>, _: Option<FileId>) {}

    pub(crate) fn forget(&self, _: &Key, _: Option<FileId>) {}
}
