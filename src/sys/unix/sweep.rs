//! The sweep: close-on-exec on every number from 3 up to the limit of descriptors, in the child, between fork and execve.
//!
//! Async-signal-safe: no allocation, no lock.

use super::calls::set_fd_flags;

/// The highest number that is tried. Trying a million takes about a tenth of a second.
const MOST: u64 = 1 << 20;

/// Sets close-on-exec on every descriptor from 3 up.
///
/// # Safety
///
/// This changes descriptors that other code owns, so only the child of a spawn may call it, which has its own
/// descriptor table.
pub(crate) unsafe fn sweep() -> Result<(), i32> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit (getrlimit(2)). After an error it is 0, so everything is tried.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    #[allow(clippy::unnecessary_cast)] // The type differs between systems.
    let limit = if known { (limit.rlim_max as u64).min(MOST) } else { MOST };
    // Use the hard limit, because the soft limit may have been lowered below open descriptors.
    for fd in 3..limit as usize {
        // SAFETY: the caller owns the descriptor table. Most numbers return EBADF.
        let _ = unsafe { set_fd_flags(fd, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Always fails, so the caller sets close-on-exec on each descriptor.
///
/// # Safety
///
/// There are no conditions. The implementation for Linux has some.
pub(crate) unsafe fn sweep_range(_first: usize, _last: usize) -> Result<(), i32> {
    Err(libc::ENOSYS)
}
