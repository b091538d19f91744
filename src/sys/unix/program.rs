//! The running program and its rights.

use std::env;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A path that leads to the file of the running program, as far as the system knows it.
pub(crate) fn running() -> PathBuf {
    path().unwrap_or_default()
}

/// The path of the running program, as far as the system knows it.
pub(crate) fn path() -> Option<PathBuf> {
    env::current_exe().ok()
}

/// Whether this process has more rights than its caller, who then must not choose its descriptors.
pub(crate) fn is_secure() -> bool {
    #[cfg(not(target_os = "linux"))]
    // SAFETY: issetugid(2) has no arguments.
    unsafe {
        unsafe extern "C" {
            fn issetugid() -> std::ffi::c_int;
        }
        issetugid() != 0
    }
    // Where this side is tested. SAFETY: getauxval(3) reads a table that the kernel made.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::getauxval(libc::AT_SECURE) != 0
    }
}

/// Whether the file at `path` has capabilities, which only Linux has.
pub(crate) fn has_capabilities(_path: &Path) -> bool {
    false
}

/// An id that the kernel gives only to this process. There is none.
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
pub(crate) fn own_pidfd_id() -> Option<u64> {
    None
}

/// The same of another process.
pub(crate) fn pidfd_id(_pidfd: &OwnedFd) -> Option<u64> {
    None
}

/// Identifies the mounts that this process sees: where both are the same, a path leads to the same file. Unknown here.
pub(crate) fn mounts() -> Option<String> {
    None
}

/// Whether this process has the same number for every other process. There are no PID namespaces.
#[cfg(feature = "systemd_notify")]
pub(crate) fn in_first_pid_namespace() -> bool {
    true
}
