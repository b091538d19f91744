//! The running program, and the rights of the next one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{getegid, geteuid, getgid, getuid};

pub(crate) use super::system::program::*;

/// Whether the kernel would give `path` more rights than this process has as its caller: execve(2) would make it secure.
pub(crate) fn becomes_secure(path: &Path) -> bool {
    let Ok(file) = fs::metadata(path) else { return false };
    #[allow(clippy::unnecessary_cast)] // Another type on another system.
    let (set_uid, set_gid) = (libc::S_ISUID as u32, libc::S_ISGID as u32);
    (file.mode() & set_uid != 0 && file.uid() != getuid().as_raw())
        || (file.mode() & set_gid != 0 && file.gid() != getgid().as_raw())
        || (is_secure() && (getuid() != geteuid() || getgid() != getegid() || has_capabilities(path)))
}
