//! Turning a descriptor number from the parent into an owned descriptor, after a proof that it is the one meant.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{fstat, FileType};
use rustix::io::{fcntl_setfd, ioctl_fionread, FdFlags};

use super::system::{identity, sweep};

/// What, besides the number, stands for a descriptor: the inode where it has one, otherwise a number made now.
pub(crate) fn identity(fd: impl AsFd) -> io::Result<u64> {
    Ok(identity::of(&fstat(fd)?))
}

/// Whether this can be the descriptor with that identity.
pub(crate) fn is_identical(fd: impl AsFd, to: u64) -> io::Result<bool> {
    Ok(identity::is(&fstat(fd)?, to))
}

/// The nonce for a manifest: the identity of what carries it, unless the carrier itself proves it.
pub(crate) fn nonce(carrier: u64) -> Option<u64> {
    (!identity::IS_A_PROOF).then_some(carrier)
}

/// The right to adopt descriptors by number. There is one in a process, because a number may be adopted once.
pub(crate) struct Adopter {
    /// By number.
    adopted: Vec<bool>,
}

impl Adopter {
    /// `None` when this process had its adopter already.
    pub(crate) fn take() -> Option<Self> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let free = !TAKEN.swap(true, Ordering::AcqRel);
        free.then(|| Self { adopted: Vec::new() })
    }

    /// Owns descriptor `fd` if it is open, of that type and [`identity`], and not adopted before. It gets close-on-exec
    /// by [`close_on_exec`](Self::close_on_exec). Version 1.1.1 hands descriptors over without an identity.
    pub(crate) fn adopt(&mut self, fd: RawFd, file_type: Option<FileType>, wanted: Option<u64>) -> io::Result<OwnedFd> {
        let index = usize::try_from(fd).unwrap_or_default();
        if fd <= libc::STDERR_FILENO || self.adopted.get(index) == Some(&true) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        check(fd, file_type, wanted)?;
        // No longer than the table of descriptors, because this one is open.
        self.adopted.resize(self.adopted.len().max(index + 1), false);
        self.adopted[index] = true;
        // SAFETY: the parent left this descriptor, known by its inode, open over the execve for us to own, so nobody
        // else in this process opened it; `adopted` and the single `Adopter` see to it that it is owned once.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Sets close-on-exec on all that was adopted: thousands of listeners in one call, or one by one where the system does
    /// not have it.
    ///
    /// Between their numbers may be others that this program has opened before its start. They get it as well, as they
    /// would at its next upgrade.
    pub(crate) fn close_on_exec(&self) -> io::Result<()> {
        let mut adopted = (0..).zip(&self.adopted).filter(|(_, adopted)| **adopted).map(|(fd, _)| fd);
        let Some(first) = adopted.clone().next() else { return Ok(()) };
        // SAFETY: closes nothing before an execve.
        if unsafe { sweep::close_on_exec(first as u32, self.adopted.len() as u32 - 1) }.is_ok() {
            return Ok(());
        }
        // SAFETY: a closed one gives EBADF, and no caller has closed any yet.
        Ok(adopted.try_for_each(|fd| fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::CLOEXEC))?)
    }
}

/// Checks that `fd` is open, and of that type and [`identity`]. Owns nothing.
pub(crate) fn check(fd: RawFd, file_type: Option<FileType>, wanted: Option<u64>) -> io::Result<()> {
    // SAFETY: used for a call that is harmless on any number; a closed one gives EBADF.
    let stat = fstat(unsafe { BorrowedFd::borrow_raw(fd) })?;
    let actual = FileType::from_raw_mode(stat.st_mode);
    let is_another = wanted.is_some_and(|wanted| !identity::is(&stat, wanted));
    if is_another || file_type.is_some_and(|wanted| wanted != actual) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the descriptor is another file"));
    }
    Ok(())
}

/// Whether `fd` may bring a manifest. The parent writes some of it before the child starts, so a pipe that is empty is
/// another process's. Only a look, because that one must stay open.
pub(crate) fn may_bring_a_manifest(fd: RawFd) -> bool {
    // SAFETY: used for a call that is harmless on any number; a closed one gives EBADF.
    let bytes = || unsafe { ioctl_fionread(BorrowedFd::borrow_raw(fd)) };
    identity::IS_A_PROOF || bytes().is_ok_and(|bytes| bytes > 0)
}
