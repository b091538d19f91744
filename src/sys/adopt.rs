//! Turns a descriptor number from the parent into an owned descriptor, after verifying that it is the intended one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{fstat, FileType};
use rustix::io::{fcntl_getfd, fcntl_setfd, ioctl_fionread, FdFlags};

use super::poll::{poll, Deadline};
use super::system::{identity, sweep};

/// Returns the identity of a descriptor besides its number: its inode if it has one, otherwise a new random
/// number.
pub(crate) fn identity(fd: impl AsFd) -> io::Result<u64> {
    Ok(identity::of(&fstat(fd)?))
}

/// Returns the nonce for a manifest: the identity of its carrier, unless the carrier itself can be verified.
pub(crate) fn nonce(carrier: u64) -> Option<u64> {
    (!identity::IS_A_PROOF).then_some(carrier)
}

/// The right to adopt descriptors by number. A process has only one, because a number may be adopted only once.
pub(crate) struct Adopter {
    /// Whether a descriptor was adopted, by number.
    adopted: Vec<bool>,
}

impl Adopter {
    /// Returns `None` if this process already has its adopter.
    pub(crate) fn take() -> Option<Self> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let free = !TAKEN.swap(true, Ordering::AcqRel);
        free.then(|| Self { adopted: Vec::new() })
    }

    /// Takes ownership of descriptor `fd` if it is open, has this type and [`identity`], and was not adopted before, and
    /// sets close-on-exec. Version 1.1.1 hands descriptors over without an identity.
    pub(crate) fn adopt(&mut self, fd: RawFd, file_type: Option<FileType>, wanted: Option<u64>) -> io::Result<OwnedFd> {
        let owned = self.own(fd, file_type, wanted)?;
        fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
        Ok(owned)
    }

    /// Takes ownership like [`adopt`](Self::adopt). [`seal`](Self::seal) sets close-on-exec later, with few system calls
    /// for thousands of listeners.
    pub(crate) fn own(&mut self, fd: RawFd, file_type: Option<FileType>, wanted: Option<u64>) -> io::Result<OwnedFd> {
        let index = usize::try_from(fd).unwrap_or_default();
        if fd <= libc::STDERR_FILENO || self.adopted.get(index) == Some(&true) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        check(fd, file_type, wanted)?;
        // This is no longer than the descriptor table, because this descriptor is open.
        self.adopted.resize(self.adopted.len().max(index + 1), false);
        self.adopted[index] = true;
        // SAFETY: the parent left this descriptor, which its inode identifies, open across execve for this process to
        // own, so no other code in this process has opened it. `adopted` and the single `Adopter` ensure that it is
        // owned only once.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Sets close-on-exec on everything that was adopted.
    ///
    /// The numbers in between may belong to descriptors that the program opened before `start`, for a helper that it
    /// starts later. So a close_range(2) covers only adopted numbers, and those that poll(2) reports as not open. There
    /// are many of the latter, because each listener had its duplicate for the program under the next number. poll(2)
    /// also reports descriptors with O_PATH as not open, so each of these numbers is checked unless the number of open
    /// descriptors, which the kernel reports since Linux 6.2, shows that there is none.
    pub(crate) fn seal(&self) -> io::Result<()> {
        // SAFETY: used for calls that are harmless on any number.
        let borrow = |fd: usize| unsafe { BorrowedFd::borrow_raw(fd as RawFd) };
        let others = (0..self.adopted.len()).filter(|fd| !self.adopted[*fd]);
        let mut others: Vec<_> = others.map(|fd| PollFd::from_borrowed_fd(borrow(fd), PollFlags::empty())).collect();
        // After an error all of them count as open.
        let _ = poll(&mut others, Deadline::after(Duration::ZERO));
        let is_free = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::NVAL);
        let seen = self.adopted.len() - others.iter().filter(|fd| is_free(fd)).count();
        let all_seen = fs::metadata("/proc/self/fd").is_ok_and(|open| open.len() == seen as u64);
        let open = others.iter().filter(|fd| !is_free(fd) || (!all_seen && fcntl_getfd(fd).is_ok()));
        let mut first = 0;
        for end in open.map(|fd| fd.as_fd().as_raw_fd() as usize).chain([self.adopted.len()]) {
            // SAFETY: the open descriptors in this range are adopted. One that another thread has opened since the poll gets
            // close-on-exec, which is harmless to memory.
            if first < end && unsafe { sweep::sweep_range(first, end - 1) }.is_err() {
                let mut adopted = (first..end).filter(|fd| self.adopted[*fd]).map(borrow);
                adopted.try_for_each(|fd| fcntl_setfd(fd, FdFlags::CLOEXEC))?;
            }
            first = end + 1;
        }
        Ok(())
    }
}

/// Checks that `fd` is open and has that type and [`identity`]. Takes no ownership.
pub(crate) fn check(fd: RawFd, file_type: Option<FileType>, wanted: Option<u64>) -> io::Result<()> {
    // SAFETY: used for a call that is harmless on any number; a closed one returns EBADF.
    let stat = fstat(unsafe { BorrowedFd::borrow_raw(fd) })?;
    let actual = FileType::from_raw_mode(stat.st_mode);
    let is_another = wanted.is_some_and(|wanted| !identity::is(&stat, wanted));
    if is_another || file_type.is_some_and(|wanted| wanted != actual) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the descriptor is another file"));
    }
    Ok(())
}

/// Returns whether `fd` can contain a manifest. The parent writes part of it before the child starts, so an empty pipe
/// belongs to another process. This only checks, because that pipe must stay open.
pub(crate) fn may_bring_a_manifest(fd: RawFd) -> bool {
    // SAFETY: used for a call that is harmless on any number; a closed one returns EBADF.
    let bytes = || unsafe { ioctl_fionread(BorrowedFd::borrow_raw(fd)) };
    identity::IS_A_PROOF || bytes().is_ok_and(|bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};
    use rustix::io::dup;
    use std::os::fd::IntoRawFd;

    /// The program may have opened it before `start`, for a helper that it starts later.
    #[test]
    fn a_descriptor_between_adopted_ones_stays_inheritable() {
        // dup(2) returns a descriptor without close-on-exec. A closed one lies in between too.
        let [first, closed, second, between, third] = [(); 5].map(|()| dup(io::stderr()).unwrap());
        let path = rustix::fs::open("/", OFlags::PATH, Mode::empty()).unwrap();
        let last = dup(io::stderr()).unwrap();
        let mut adopter = Adopter { adopted: Vec::new() };
        drop(closed);
        let adopted = [first, second, third, last].map(|fd| adopter.own(fd.into_raw_fd(), None, None).unwrap());
        adopter.seal().unwrap();
        assert!(adopted.iter().all(|fd| fcntl_getfd(fd).unwrap() == FdFlags::CLOEXEC));
        for fd in [between, path] {
            assert_eq!(fcntl_getfd(&fd).unwrap(), FdFlags::empty(), "{fd:?}");
        }
        assert!(adopter.own(adopted[0].as_raw_fd(), None, None).is_err(), "each only once");
    }
}
