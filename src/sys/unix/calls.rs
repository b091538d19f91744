//! Calls for a signal handler and for the child of a fork: libc's functions, with `errno` restored and returned as a
//! value.

use std::ffi::{c_char, c_int, c_long, CStr};
use std::ptr;

use libc::{_exit, poll};

/// Returns the calling thread's `errno`.
fn errno() -> *mut c_int {
    // SAFETY: each function returns the address of the calling thread's errno, which is always valid.
    unsafe {
        #[cfg(target_os = "linux")]
        return libc::__errno_location();
        #[cfg(any(target_vendor = "apple", target_os = "freebsd", target_os = "dragonfly"))]
        return libc::__error();
        #[cfg(any(target_os = "netbsd", target_os = "openbsd"))]
        return libc::__errno();
        #[cfg(any(target_os = "illumos", target_os = "solaris"))]
        return libc::___errno();
    }
}

/// Runs `call`, which returns a negative number and sets `errno` on an error.
fn result(call: impl FnOnce() -> isize) -> Result<usize, i32> {
    // SAFETY: the address belongs to this thread.
    unsafe {
        let before = errno().read();
        let result = call();
        let after = errno().replace(before);
        usize::try_from(result).map_err(|_| after)
    }
}

/// # Safety
///
/// `bytes` points to `length` bytes.
pub(crate) unsafe fn write(fd: c_int, bytes: *const u8, length: usize) -> Result<usize, i32> {
    // SAFETY: as for this function (write(2)).
    result(|| unsafe { libc::write(fd, bytes.cast(), length) })
}

pub(crate) fn chdir(path: &CStr) -> Result<(), i32> {
    // SAFETY: a C string (chdir(2)).
    result(|| unsafe { libc::chdir(path.as_ptr()) as isize }).map(drop)
}

/// Returns only on an error.
///
/// # Safety
///
/// Both arrays end with a null pointer, and their other elements are C strings.
pub(crate) unsafe fn execve(program: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> i32 {
    // SAFETY: as for this function (execve(2)).
    let result = result(|| unsafe { libc::execve(program.as_ptr(), argv.cast(), envp.cast()) as isize });
    result.err().unwrap_or_default()
}

pub(crate) fn exit(status: c_int) -> ! {
    // SAFETY: a plain number (_exit(2)).
    unsafe { _exit(status) }
}

/// Blocks for this many milliseconds.
pub(crate) fn pause(milliseconds: c_long) {
    // SAFETY: no descriptors (poll(2)).
    let _ = result(|| unsafe { poll(ptr::null_mut(), 0, milliseconds as c_int) as isize });
}

/// Sets the descriptor flags of `fd`: FD_CLOEXEC or 0.
///
/// # Safety
///
/// The caller owns the descriptor table.
pub(crate) unsafe fn set_fd_flags(fd: usize, flags: c_int) -> Result<(), i32> {
    // SAFETY: plain numbers (fcntl(2)).
    result(|| unsafe { libc::fcntl(fd as c_int, libc::F_SETFD, flags) as isize }).map(drop)
}
