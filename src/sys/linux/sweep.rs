//! The sweep: close-on-exec on every descriptor from 3 up, in the child, between fork and execve.
//!
//! Async-signal-safe: no allocation, no lock, no errno.

use super::calls::{call, set_fd_flags};

/// Sets close-on-exec on every descriptor from 3 up.
///
/// # Safety
///
/// This changes descriptors that other code owns, so only the child of a spawn may call it, which has its own
/// descriptor table.
pub(crate) unsafe fn sweep() -> Result<(), i32> {
    // SAFETY: as for this function.
    unsafe { sweep_range(3, u32::MAX as usize).or_else(|_| sweep_listed()).or_else(|_| sweep_all()) }
}

/// Sets close-on-exec on the descriptors from `first` to `last`. Kernels before 5.11 lack the call or the flag, and
/// filters refuse what they do not know.
///
/// # Safety
///
/// The caller owns every open descriptor in this range.
pub(crate) unsafe fn sweep_range(first: usize, last: usize) -> Result<(), i32> {
    // SAFETY: plain numbers (close_range(2)).
    unsafe { call(libc::SYS_close_range, [first, last, libc::CLOSE_RANGE_CLOEXEC as usize, 0]).map(drop) }
}

/// Sets close-on-exec on every descriptor that /proc/self/fd lists.
unsafe fn sweep_listed() -> Result<(), i32> {
    /// The positions of d_reclen and d_name in a `linux_dirent64` (getdents64(2)).
    const RECLEN: usize = 16;
    const NAME: usize = 19;

    let path = c"/proc/self/fd";
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: `path` is a static C string (openat(2)).
    let dir = unsafe { call(libc::SYS_openat, [libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0])? };
    let mut buffer = [0_u8; 2048];
    loop {
        // SAFETY: the kernel writes at most the buffer's length into it (getdents64(2)).
        let filled = unsafe { call(libc::SYS_getdents64, [dir, buffer.as_mut_ptr() as usize, buffer.len(), 0])? };
        if filled == 0 {
            // `dir` has close-on-exec: execve closes it.
            return Ok(());
        }
        let mut at = 0;
        while at + NAME < filled {
            let length = u16::from_ne_bytes([buffer[at + RECLEN], buffer[at + RECLEN + 1]]) as usize;
            let mut fd = None;
            let mut next = at + NAME;
            while next < filled && buffer[next].is_ascii_digit() {
                fd = Some(fd.unwrap_or(0) * 10 + (buffer[next] - b'0') as usize);
                next += 1;
            }
            if let Some(fd @ 3..) = fd {
                // SAFETY: the caller owns the descriptor table.
                unsafe { set_fd_flags(fd, libc::FD_CLOEXEC)? };
            }
            if length == 0 {
                return Err(libc::EIO);
            }
            at += length;
        }
    }
}

/// Sets close-on-exec on every number up to the limit. This is the last fallback, if /proc is not mounted.
unsafe fn sweep_all() -> Result<(), i32> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit64 (prlimit(2)).
    unsafe { call(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE as usize, 0, &raw mut limit as usize])? };
    // Use the hard limit, because the soft limit may have been lowered below open descriptors. Linux caps it at
    // nr_open.
    for fd in 3..limit.rlim_max.min(1 << 20) as usize {
        // SAFETY: the caller owns the descriptor table. Most numbers return EBADF.
        let _ = unsafe { set_fd_flags(fd, libc::FD_CLOEXEC) };
    }
    Ok(())
}
