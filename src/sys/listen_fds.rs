//! Taking over the descriptors that the service manager passed, which are known by number only.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{fcntl_getfd, fcntl_setfd, FdFlags};

/// The first descriptor that a service manager passes, SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;

/// Owns the descriptors 3 to 3 + `count`, which the environment says were passed to this very process, and marks them
/// close-on-exec. A second call is refused.
///
/// # Errors
/// One of them is not open, or is somebody's already; then none is owned. Each is named.
pub(crate) fn take(count: usize) -> Result<Vec<OwnedFd>, (RawFd, io::Error)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    // A count beyond what a process can have open is caught at the first number that is not.
    let numbers = (FIRST..).take(count);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err((FIRST, io::Error::new(io::ErrorKind::AlreadyExists, "it was taken before")));
    }
    for fd in numbers.clone() {
        // SAFETY: used for one call that is harmless on any number; a closed one gives EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        match fcntl_getfd(borrowed) {
            Err(e) => return Err((fd, e.into())),
            // What came over an execve cannot be close-on-exec; what is was opened, or taken, by somebody here.
            Ok(flags) if flags.contains(FdFlags::CLOEXEC) => {
                let why = "it is close-on-exec, so other code in this process owns it";
                return Err((fd, io::Error::new(io::ErrorKind::AlreadyExists, why)));
            }
            Ok(_) => {}
        }
    }
    numbers
        .map(|fd| {
            // SAFETY: the manager opened these numbers for this process to own, and named it (LISTEN_PID); they came
            // over the execve, so nobody in this process opened them, and `TAKEN` sees to it that they are owned once.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            fcntl_setfd(&owned, FdFlags::CLOEXEC).map_err(|e| (fd, e.into()))?;
            Ok(owned)
        })
        .collect()
}
