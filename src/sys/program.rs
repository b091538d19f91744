//! The running program, and the privileges of the next one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{getegid, geteuid, getgid, getuid};

pub(crate) use super::system::program::*;

/// The reason why a privileged program gets no handover.
pub(crate) const SECURE: &str =
    "the program has more rights than its caller (AT_SECURE: set-user-ID, set-group-ID or file \
    capabilities), so it does not trust its environment; use ambient capabilities, or a takeover";

/// Returns whether the kernel would give `path` more privileges than this process has as its caller. Then execve(2)
/// would set AT_SECURE.
pub(crate) fn becomes_secure(path: &Path) -> bool {
    let Ok(file) = fs::metadata(path) else { return false };
    #[allow(clippy::unnecessary_cast)] // The type differs between systems.
    let (set_uid, set_gid) = (libc::S_ISUID as u32, libc::S_ISGID as u32);
    (file.mode() & set_uid != 0 && file.uid() != getuid().as_raw())
        || (file.mode() & set_gid != 0 && file.gid() != getgid().as_raw())
        || (is_secure()
            && (getuid() != geteuid() || getgid() != getegid() || (!getuid().is_root() && has_capabilities(path))))
}
