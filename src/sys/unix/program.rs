//! The running program and its privileges.

use std::env;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Returns a path that leads to the file of the running program, as far as the system knows it.
pub(crate) fn running() -> PathBuf {
    path().unwrap_or_default()
}

/// Returns the path of the running program, as far as the system knows it.
pub(crate) fn path() -> Option<PathBuf> {
    env::current_exe().ok()
}

/// Returns whether this process has more privileges than its caller, which then must not choose its descriptors.
pub(crate) fn is_secure() -> bool {
    #[cfg(not(target_os = "linux"))]
    // SAFETY: issetugid(2) has no arguments.
    unsafe {
        unsafe extern "C" {
            fn issetugid() -> std::ffi::c_int;
        }
        issetugid() != 0
    }
    // For tests of these fallbacks on Linux. SAFETY: getauxval(3) reads a table that the kernel created.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::getauxval(libc::AT_SECURE) != 0
    }
}

/// Returns whether the file at `path` has capabilities. Only Linux has these.
pub(crate) fn has_capabilities(_path: &Path) -> bool {
    false
}

/// Returns the permanent id of this process. These systems have none.
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
pub(crate) fn own_pidfd_id() -> Option<u64> {
    None
}

/// The same for another process.
pub(crate) fn pidfd_id(_pidfd: &OwnedFd) -> Option<u64> {
    None
}

/// Returns an identification of the mounts that this process sees. It is unknown on these systems.
pub(crate) fn mounts() -> Option<String> {
    None
}

/// Returns whether this process has the same PID for every other process. There are no PID namespaces.
#[cfg(feature = "systemd_notify")]
pub(crate) fn in_first_pid_namespace() -> bool {
    true
}
