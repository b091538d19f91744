//! What the service manager passes at the start: the protocol of sd_listen_fds(3).

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{fstat, fstatfs};
use rustix::process::{getpid, pidfd_open, PidfdFlags};

use crate::sys::listen_fds;

/// A descriptor that the manager passed, and the name that it gave: `FileDescriptorName=` of a socket unit (by default
/// the unit's own name), or the name under which a former run stored it. Several may have one name.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) name: String,
    pub(crate) fd: OwnedFd,
}

/// As many as a process may have open unless the system's limit (fs.nr_open) was raised.
const MAX_PASSED: usize = 1 << 20;

/// Why what was passed cannot be used.
#[derive(Debug)]
pub(crate) struct Unusable {
    pub(crate) what: String,
    pub(crate) source: io::Error,
}

/// Owns what the manager passed to this process, in the manager's order: socket units first, then its store. Empty for
/// a process that no manager started, and for a child of one that it did start. The environment stays as it is.
pub(crate) fn take() -> Result<Vec<Passed>, Unusable> {
    let Some(names) = announced(|name| env::var_os(name), std::process::id(), own_pidfd_id)? else {
        return Ok(Vec::new());
    };
    let fds = listen_fds::take(names.len())
        .map_err(|(fd, source)| Unusable { what: format!("descriptor {fd}"), source })?;
    Ok(names.into_iter().zip(fds).map(|(name, fd)| Passed { name, fd }).collect())
}

/// The names of the descriptors passed to process `me`; `None` when the variables are absent, or for somebody else.
fn announced(
    variable: impl Fn(&str) -> Option<OsString>,
    me: u32,
    own_pidfd_id: impl FnOnce() -> Option<u64>,
) -> Result<Option<Vec<String>>, Unusable> {
    fn number<T: std::str::FromStr>(name: &str, value: &OsString) -> Result<T, Unusable> {
        value.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| malformed(name, value))
    }
    fn malformed(name: &str, value: &OsString) -> Unusable {
        let what = format!("{name}={}", value.to_string_lossy());
        Unusable { what, source: io::ErrorKind::InvalidInput.into() }
    }

    let Some(pid) = variable("LISTEN_PID") else { return Ok(None) };
    if number::<u32>("LISTEN_PID", &pid)? != me {
        return Ok(None);
    }
    // Since systemd 259: tells this process from a later one with the same number. Where the kernel has no such id
    // (before Linux 6.9) there is nothing to compare, and the PID has to do, as in systemd's own library.
    if let Some(id) = variable("LISTEN_PIDFDID") {
        let id: u64 = number("LISTEN_PIDFDID", &id)?;
        if own_pidfd_id().is_some_and(|own| own != id) {
            return Ok(None);
        }
    }
    let Some(count) = variable("LISTEN_FDS") else { return Ok(None) };
    let count = match number::<usize>("LISTEN_FDS", &count)? {
        n if n <= MAX_PASSED => n,
        _ => return Err(malformed("LISTEN_FDS", &count)),
    };
    match variable("LISTEN_FDNAMES") {
        None => Ok(Some(vec!["unknown".into(); count])),
        Some(list) => {
            let names: Vec<String> = match list.to_str() {
                Some("") if count == 0 => Vec::new(),
                Some(list) => list.split(':').map(str::to_owned).collect(),
                None => return Err(malformed("LISTEN_FDNAMES", &list)),
            };
            if names.len() != count {
                let why = format!("{} names for {count} descriptors", names.len());
                let source = io::Error::new(io::ErrorKind::InvalidInput, why);
                return Err(Unusable { what: format!("LISTEN_FDNAMES={}", list.to_string_lossy()), source });
            }
            Ok(Some(names))
        }
    }
}

/// The id that the kernel gave this process for good: the inode of its pidfd, where those have inodes of their own.
fn own_pidfd_id() -> Option<u64> {
    const PIDFS_MAGIC: u64 = 0x5049_4446;
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
    let own_file_system = fstatfs(&pidfd).ok()?.f_type as u64 == PIDFS_MAGIC;
    // An inode number of 32 bits holds only a part of it.
    (own_file_system && cfg!(target_pointer_width = "64")).then(|| fstat(&pidfd).ok().map(|stat| stat.st_ino))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(variables: &[(&str, &str)]) -> Result<Option<Vec<String>>, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        announced(variable, 7, || Some(99)).map_err(|e| format!("{}: {}", e.what, e.source))
    }

    fn some(list: &[&str]) -> Result<Option<Vec<String>>, String> {
        Ok(Some(list.iter().map(|&name| name.to_owned()).collect()))
    }

    #[test]
    fn names_may_repeat_be_empty_or_be_missing() {
        let passed = |count, list| names(&[("LISTEN_PID", "7"), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", list)]);
        assert_eq!(passed("3", "http:http:admin"), some(&["http", "http", "admin"]));
        assert_eq!(passed("2", ":"), some(&["", ""]));
        assert_eq!(passed("1", ""), some(&[""]));
        assert_eq!(passed("0", ""), some(&[]));
        assert_eq!(names(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "2")]), some(&["unknown", "unknown"]));
        assert_eq!(passed("2", "a").unwrap_err(), "LISTEN_FDNAMES=a: 1 names for 2 descriptors");
        assert!(passed("1", "a:b").is_err());
    }

    #[test]
    fn what_is_for_somebody_else_is_left_alone() {
        assert_eq!(names(&[]), Ok(None));
        assert_eq!(names(&[("LISTEN_FDS", "2")]), Ok(None));
        assert_eq!(names(&[("LISTEN_PID", "8"), ("LISTEN_FDS", "2")]), Ok(None));
        let with_id = |id| names(&[("LISTEN_PID", "7"), ("LISTEN_PIDFDID", id), ("LISTEN_FDS", "1")]);
        assert_eq!(with_id("99"), some(&["unknown"]));
        assert_eq!(with_id("98"), Ok(None));
        assert!(with_id("x").is_err());
        let no_id_known = |name: &str| match name {
            "LISTEN_PID" => Some("7".into()),
            "LISTEN_FDS" => Some("1".into()),
            "LISTEN_PIDFDID" => Some("98".into()),
            _ => None,
        };
        assert!(announced(no_id_known, 7, || None).is_ok_and(|names| names.is_some()));
    }

    #[test]
    fn nonsense_is_named() {
        for (variable, value) in
            [("LISTEN_PID", "seven"), ("LISTEN_FDS", "-1"), ("LISTEN_FDS", "many"), ("LISTEN_FDS", "99999999")]
        {
            let error = names(&[("LISTEN_PID", "7"), (variable, value)].into_iter().rev().collect::<Vec<_>>());
            assert!(error.as_ref().is_err_and(|e| e.contains(variable) && e.contains(value)), "{error:?}");
        }
    }

    #[test]
    fn this_process_has_one_id_for_good() {
        assert_eq!(own_pidfd_id(), own_pidfd_id());
    }
}
