//! A descriptor with its description: in the registry, in a handover, and, as only a number, in a manifest.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::io::fcntl_dupfd_cloexec;

use crate::key::Key;
use crate::listen::FileId;
use crate::sys::adopt::identity;
use crate::sys::stdio::above_stdio;

/// A descriptor with its description. In a manifest, `F` is its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry<F = Arc<OwnedFd>> {
    pub(crate) key: Key,
    /// Shared with a running upgrade: if a socket is retired during the upgrade, it keeps its number until the upgrade
    /// ends.
    pub(crate) fd: F,
    /// Verifies that a number refers to this descriptor.
    pub(crate) inode: u64,
    /// The file of a Unix socket, if a generation of this service has bound it.
    pub(crate) file: Option<FileId>,
    /// The name by which a unit of the service manager passed it. The manager keeps it open while the unit is active,
    /// regardless of this process.
    pub(crate) unit: Option<String>,
}

impl Entry {
    pub(crate) fn new(key: Key, fd: OwnedFd) -> io::Result<Self> {
        Self::shared(key, above_stdio(fd)?.into())
    }

    pub(crate) fn shared(key: Key, fd: Arc<OwnedFd>) -> io::Result<Self> {
        Ok(Self { key, inode: identity(&fd)?, fd, file: None, unit: None })
    }

    pub(crate) fn duplicate(key: Key, fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::new(key, duplicate(fd)?)
    }

    pub(crate) fn number(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl<F> Entry<F> {
    pub(crate) fn with_fd<G>(self, fd: G) -> Entry<G> {
        let Self { key, inode, file, unit, .. } = self;
        Entry { key, fd, inode, file, unit }
    }
}

/// A descriptor of the parent, by number and inode. Over a socket the number is its index among those sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FdRef {
    pub(crate) fd: RawFd,
    pub(crate) inode: u64,
}

impl FdRef {
    pub(crate) fn to(fd: &OwnedFd) -> io::Result<Self> {
        Ok(Self { fd: fd.as_raw_fd(), inode: identity(fd)? })
    }
}

/// Returns a copy with the lowest free number from 3 up, so that numbers do not climb from generation to generation.
pub(crate) fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(fd, 3)?)
}
