//! State that a program hands to its next generation: bytes in a sealed memory file, which can no longer change.
//!
//! A blob is handed over as one descriptor. The parent writes and seals it. The child checks the seals before it uses
//! the length or any byte: a file that can still shrink could end before the length that was read.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use crate::sys::blob;

/// The largest blob that a program may pass.
pub(crate) const LIMIT: u64 = 64 << 20;

/// Returns a new sealed memory file with these bytes, close-on-exec.
///
/// # Errors
///
/// `InvalidInput` for more than `limit` bytes, and the errors of memfd_create(2) and write(2).
pub(crate) fn seal(bytes: &[u8], limit: u64) -> io::Result<OwnedFd> {
    if bytes.len() as u64 > limit {
        let reason = format!("{} bytes are more than the limit of {limit}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    blob::create(bytes)
}

/// Reads what [`seal`] wrote.
///
/// # Errors
///
/// `InvalidData` for a descriptor that is not a sealed memory file, or holds more than `limit` bytes; and the errors of
/// fcntl(2) and pread(2).
pub(crate) fn open(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    blob::check(&fd)?;
    let file = File::from(fd);
    let size = file.metadata()?.len();
    if size > limit {
        return Err(invalid(format!("{size} bytes are more than the limit of {limit}")));
    }
    let mut bytes = vec![0; size as usize];
    // All holders of the file share its offset, so read without it.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{fcntl_getfd, FdFlags};

    const LIMIT: u64 = 1000;

    #[test]
    fn bytes_are_read_as_they_were_written() {
        for bytes in [&b""[..], b"x", &[7; 1000]] {
            let fd = seal(bytes, LIMIT).unwrap();
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            assert_eq!(open(fd, LIMIT).unwrap(), bytes);
        }
    }

    #[test]
    fn too_many_bytes_are_refused_at_both_ends() {
        assert_eq!(seal(&[0; 1001], LIMIT).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let fd = seal(&[0; 1001], 2000).unwrap();
        assert_eq!(open(fd, LIMIT).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
