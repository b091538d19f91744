//! Files without a name that are open only for reading. There are no seals: a process of the same user that opened the
//! file before its name was removed could still change it.

use std::collections::hash_map::RandomState;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{fcntl_getfl, fstat, FileType, OFlags};

use crate::sys::signal::without_sigxfsz;
use crate::sys::stdio::above_stdio;

/// Returns a close-on-exec descriptor of a file that contains `bytes` and has no name.
pub(crate) fn create(bytes: &[u8]) -> io::Result<OwnedFd> {
    let (mut file, reader) = files()?;
    without_sigxfsz(|| file.write_all(bytes))?;
    Ok(above_stdio(reader.into())?)
}

/// Returns a close-on-exec descriptor of an empty unnamed file.
pub(crate) fn open_for_writing() -> io::Result<OwnedFd> {
    Ok(above_stdio(files()?.0.into())?)
}

/// Opens one unnamed file twice: for reading and writing, and for reading only.
fn files() -> io::Result<(File, File)> {
    let path = env::temp_dir().join(format!(".ecdysis-{:016x}", RandomState::new().build_hasher().finish()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    let reader = File::open(&path);
    fs::remove_file(&path)?;
    Ok((file, reader?))
}

/// Returns an error unless it is a file without a name that is open only for reading.
pub(crate) fn check(fd: impl AsFd) -> io::Result<()> {
    let stat = fstat(&fd)?;
    let read_only = fcntl_getfl(&fd)? & OFlags::ACCMODE == OFlags::RDONLY;
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 0 && read_only {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the descriptor is not a file for state"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_change_the_bytes() {
        let mut file = File::from(create(b"state").unwrap());
        assert!(file.write_all(b"other").is_err());
        assert!(file.set_len(0).is_err());
        check(&file).unwrap();
    }

    #[test]
    fn what_is_another_file_is_refused() {
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let named = OwnedFd::from(File::open(env::current_exe().unwrap()).unwrap());
        for fd in [pipe, null, named] {
            assert_eq!(check(fd).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
