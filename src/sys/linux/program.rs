//! The running program and its privileges.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::getxattr;

/// Returns a path that leads to the file of the running program, whatever its name is now.
pub(crate) fn running() -> PathBuf {
    Path::new("/proc/self/exe").to_owned()
}

/// Returns the path of the running program, as far as the kernel knows it.
pub(crate) fn path() -> Option<PathBuf> {
    fs::read_link("/proc/self/exe").ok()
}

/// Returns whether this process has more privileges than its caller, which then must not choose its descriptors.
pub(crate) fn is_secure() -> bool {
    // SAFETY: getauxval(3) reads a table that the kernel created.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Returns whether the file at `path` has capabilities.
pub(crate) fn has_capabilities(path: &Path) -> bool {
    getxattr(path, "security.capability", &mut [0_u8; 0][..]).is_ok()
}

/// Returns whether this process is in the first PID namespace of the system, where its PID is the same for every other
/// process.
#[cfg(feature = "systemd_notify")]
pub(crate) fn in_first_pid_namespace() -> bool {
    // PROC_PID_INIT_INO in the kernel's proc_ns.h.
    fs::read_link("/proc/self/ns/pid").is_ok_and(|namespace| namespace.as_os_str() == "pid:[4026531836]")
}

/// Returns an identification of the root of this process and its mount. If it is the same, a path leads to the same file:
/// each mount namespace has its own mounts. (The namespace's own file in /proc would take longer to look up.)
pub(crate) fn mounts() -> Option<String> {
    use rustix::fs::{statx, AtFlags, StatxFlags, CWD};

    let root = statx(CWD, "/", AtFlags::empty(), StatxFlags::INO | StatxFlags::MNT_ID).ok()?;
    // The kernel reports the mount since Linux 5.8.
    let mount = (root.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(root.stx_mnt_id)?;
    Some(format!("{mount}:{}:{}:{}", root.stx_dev_major, root.stx_dev_minor, root.stx_ino))
}

/// Returns the permanent id of this process, see [`pidfd_id`].
#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
pub(crate) fn own_pidfd_id() -> Option<u64> {
    use rustix::process::{getpid, pidfd_open, PidfdFlags};

    pidfd_id(&pidfd_open(getpid(), PidfdFlags::empty()).ok()?)
}

/// Returns the permanent id of a process: the inode of its pidfd, if pidfds have their own inodes (since Linux 6.9).
pub(crate) fn pidfd_id(pidfd: &OwnedFd) -> Option<u64> {
    use rustix::fs::{fstat, fstatfs};

    const PIDFS_MAGIC: u64 = 0x5049_4446;
    let own_file_system = fstatfs(pidfd).ok()?.f_type as u64 == PIDFS_MAGIC;
    // A 32-bit inode number contains only a part of it.
    (own_file_system && cfg!(target_pointer_width = "64")).then(|| fstat(pidfd).ok().map(|stat| stat.st_ino))?
}
