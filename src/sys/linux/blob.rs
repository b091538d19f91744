//! Memory files whose contents can be sealed (memfd_create(2), F_ADD_SEALS in fcntl(2)).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{fcntl_add_seals, fcntl_get_seals, memfd_create, MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::sys::signal::without_sigxfsz;
use crate::sys::stdio::above_stdio;

/// With these seals the file can no longer be changed, shortened or extended, and the seals cannot be lifted.
fn seals() -> SealFlags {
    SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE
}

/// Returns a close-on-exec descriptor of an empty unnamed file.
pub(crate) fn open_for_writing() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag that forbids execution. Some later ones are configured to require it.
    let fd = match memfd_create("ecdysis-state", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create("ecdysis-state", flags)?,
        result => result?,
    };
    Ok(above_stdio(fd)?)
}

/// Returns a close-on-exec descriptor of a file that contains `bytes` and can no longer be changed.
pub(crate) fn create(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(open_for_writing()?);
    without_sigxfsz(|| file.write_all(bytes))?;
    fcntl_add_seals(&file, seals())?;
    Ok(file.into())
}

/// Returns an error unless [`create`] created the file. A file that can still be shortened could end before the length
/// that was read.
pub(crate) fn check(fd: impl AsFd) -> io::Result<()> {
    match fcntl_get_seals(fd) {
        Ok(found) if found.contains(seals()) => Ok(()),
        // Files of any other type return EINVAL.
        Ok(_) | Err(Errno::INVAL) => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "the descriptor is not a sealed memory file"))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_change_the_bytes() {
        let mut file = File::from(create(b"state").unwrap());
        assert!(file.write_all(b"other").is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(100).is_err());
        check(&file).unwrap();
    }

    #[test]
    fn what_is_not_sealed_is_refused() {
        let open_memfd = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        let partly = memfd_create("partly", MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&partly, SealFlags::WRITE | SealFlags::GROW).unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let program = OwnedFd::from(File::open("/proc/self/exe").unwrap());
        for fd in [open_memfd, partly, pipe, null, program] {
            assert_eq!(check(fd).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
