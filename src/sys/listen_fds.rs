//! Adopts the descriptors that the service manager passed, which are known only by number.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{fcntl_getfd, fcntl_setfd, FdFlags};

/// The first descriptor that a service manager passes, SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;

/// Takes ownership of descriptors 3 to 3 + `count`, which were passed to this process according to its environment, and
/// sets close-on-exec on them. A second call is refused.
///
/// # Errors
/// One of them is not open, or other code already owns it. Then this takes no ownership. The error names each of them.
pub(crate) fn take(count: usize) -> Result<Vec<OwnedFd>, (RawFd, io::Error)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    // If the count is larger than a process can have open, the first number that is not open is an error.
    let numbers = (FIRST..).take(count);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err((FIRST, io::Error::new(io::ErrorKind::AlreadyExists, "it was taken before")));
    }
    for fd in numbers.clone() {
        // SAFETY: used for one call that is harmless on any number; a closed one returns EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        match fcntl_getfd(borrowed) {
            Err(e) => return Err((fd, e.into())),
            // A descriptor that has survived execve cannot have close-on-exec. If it has, code in this process has
            // opened or taken it.
            Ok(flags) if flags.contains(FdFlags::CLOEXEC) => {
                let why = "it is close-on-exec, so other code in this process owns it";
                return Err((fd, io::Error::new(io::ErrorKind::AlreadyExists, why)));
            }
            Ok(_) => {}
        }
    }
    numbers
        .map(|fd| {
            // SAFETY: the manager opened these numbers for this process to own, and named it (LISTEN_PID). They have
            // survived execve, so no code in this process has opened them, and `TAKEN` ensures that they are owned only
            // once.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            fcntl_setfd(&owned, FdFlags::CLOEXEC).map_err(|e| (fd, e.into()))?;
            Ok(owned)
        })
        .collect()
}
