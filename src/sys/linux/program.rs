//! The running program and its rights.

use std::fs;
use std::path::{Path, PathBuf};

/// A path that leads to the file of the running program, whatever its name is now.
pub(crate) fn running() -> PathBuf {
    Path::new("/proc/self/exe").to_owned()
}

/// The path of the running program, as far as the kernel knows it.
pub(crate) fn path() -> Option<PathBuf> {
    fs::read_link("/proc/self/exe").ok()
}

/// Whether this process has more rights than its caller, who then must not choose its descriptors.
pub(crate) fn is_secure() -> bool {
    // SAFETY: getauxval(3) reads a table that the kernel made.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}
