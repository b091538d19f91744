//! State that a program hands to its next generation: bytes in a memory file that nobody can change any more.
//!
//! A blob travels as one descriptor, whatever carries it. It is written and sealed by the parent; the child
//! trusts no byte and no length before it has seen the seals, since a file that can still be cut short would answer
//! the reader with less than was measured.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{fcntl_add_seals, fcntl_get_seals, memfd_create, MemfdFlags, SealFlags};
use rustix::io::Errno;

/// The largest blob that a program may pass.
pub(crate) const LIMIT: u64 = 64 << 20;

/// No byte changes, no byte goes, no byte comes, and it stays so.
fn seals() -> SealFlags {
    SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE
}

/// Puts `bytes` into a new sealed memory file. It is close-on-exec.
///
/// # Errors
///
/// `InvalidInput` for more than `limit` bytes, and what the kernel says (ENOMEM, ENFILE).
pub(crate) fn seal(bytes: &[u8], limit: u64) -> io::Result<OwnedFd> {
    if bytes.len() as u64 > limit {
        let reason = format!("{} bytes are more than the limit of {limit}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag that says "never a program"; some later ones are set up to demand it.
    let fd = match memfd_create("ecdysis-state", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create("ecdysis-state", flags)?,
        result => result?,
    };
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl_add_seals(&file, seals())?;
    Ok(file.into())
}

/// Reads what [`seal`] has written.
///
/// # Errors
///
/// `InvalidData` for a descriptor that is no sealed memory file, or one of more than `limit` bytes; and what the
/// kernel says.
pub(crate) fn open(fd: OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    // Anything but a memory file answers EINVAL here.
    match fcntl_get_seals(fd.as_fd()) {
        Ok(found) if found.contains(seals()) => {}
        Ok(_) | Err(Errno::INVAL) => return Err(invalid("the descriptor is not a sealed memory file".into())),
        Err(error) => return Err(error.into()),
    }
    let file = File::from(fd);
    let size = file.metadata()?.len();
    if size > limit {
        return Err(invalid(format!("{size} bytes are more than the limit of {limit}")));
    }
    let mut bytes = vec![0; size as usize];
    // The offset belongs to everyone who holds the file, so it is neither trusted nor moved.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{fcntl_getfd, FdFlags};

    const LIMIT: u64 = 1000;

    #[test]
    fn bytes_come_back() {
        for bytes in [&b""[..], b"x", &[7; 1000]] {
            let fd = seal(bytes, LIMIT).unwrap();
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            assert_eq!(open(fd, LIMIT).unwrap(), bytes);
        }
    }

    #[test]
    fn nobody_can_change_them() {
        let mut file = File::from(seal(b"state", LIMIT).unwrap());
        assert!(file.write_all(b"other").is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(100).is_err());
        assert_eq!(open(file.into(), LIMIT).unwrap(), b"state");
    }

    #[test]
    fn too_large_is_refused_at_both_ends() {
        assert_eq!(seal(&[0; 1001], LIMIT).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let fd = seal(&[0; 1001], 2000).unwrap();
        assert_eq!(open(fd, LIMIT).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn what_is_not_sealed_is_not_read() {
        let open_memfd = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        let partly = memfd_create("partly", MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&partly, SealFlags::WRITE | SealFlags::GROW).unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let program = OwnedFd::from(File::open("/proc/self/exe").unwrap());
        for fd in [open_memfd, partly, pipe, null, program] {
            assert_eq!(open(fd, 1 << 30).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
