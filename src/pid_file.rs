//! The PID file: written completely or not at all, and restored or removed only while it names this process.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::listen::is_out_of_reach;
use crate::logging;
use crate::sys::signal::without_sigxfsz;

/// The PID file of a program, if it has one. This is the only place that knows the path.
#[derive(Debug, Default)]
pub(crate) struct PidFile(Mutex<Option<PathBuf>>);

impl PidFile {
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self(Mutex::new(path))
    }

    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn set(&self, path: &Path) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    }

    fn path(&self) -> Option<PathBuf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn write(&self) -> Result<(), Error> {
        self.replace().map(Replaced::keep)
    }

    /// Writes the file. The previous contents are restored when the result is dropped, unless it is kept.
    pub(crate) fn replace(&self) -> Result<Replaced, Error> {
        let Some(path) = self.path() else { return Ok(Replaced(None)) };
        let before = read(&path).ok();
        match write(&path) {
            Ok(()) => Ok(Replaced(Some((path, before)))),
            Err(source) => Err(Error::PidFile { path, source }),
        }
    }

    /// Returns the file, if this process can neither replace it nor write to it.
    pub(crate) fn out_of_reach(&self) -> Option<PathBuf> {
        self.path().filter(|path| is_out_of_reach(path) && open_in_place(path).is_err())
    }

    /// Call this after a failed upgrade, whose child may have written its own PID.
    pub(crate) fn rewrite(&self) {
        if self.path().is_some_and(|path| is_ours(&path).unwrap_or(false)) {
            return;
        }
        if let Err(e) = self.write() {
            logging::error!("{e}");
        }
    }

    /// At a final stop, removes the file if it names this process.
    pub(crate) fn remove(&self) {
        let Some(path) = self.path() else { return };
        if let Err(e) = restore(&path, None) {
            logging::warn!("cannot remove PID file {}: {e}", path.display());
        }
    }
}

/// A written PID file, and what it contained before.
#[must_use = "dropping this restores the previous contents"]
pub(crate) struct Replaced(Option<(PathBuf, Option<Vec<u8>>)>);

impl Replaced {
    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let Some((path, before)) = &self.0 else { return };
        if let Err(e) = restore(path, before.as_deref()) {
            logging::warn!("cannot restore PID file {}: {e}", path.display());
        }
    }
}

/// Writes this process's PID to `path`, with mode 0644, through a new file that is renamed. A symlink at `path` is
/// replaced, never followed.
fn write(path: &Path) -> io::Result<()> {
    replace(path, format!("{}\n", process::id()).as_bytes())
}

/// Restores the previous contents, unless another process has written the file since. If there were none, removes the
/// file, or empties it if it cannot be removed.
fn restore(path: &Path, before: Option<&[u8]>) -> io::Result<()> {
    match before {
        _ if !is_ours(path)? => Ok(()),
        Some(before) => replace(path, before),
        None => fs::remove_file(path).or_else(|e| open_in_place(path)?.set_len(0).map_err(|_| e)),
    }
}

/// Writes a new file and renames it. Writes in place if that is not possible: in a directory that this user cannot
/// write to, as packages set it up; on a mount point, as containers share it; or on a full disk.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    rename_over(path, content).or_else(|e| overwrite(path, content).map_err(|_| e))
}

/// The content is written with one short write, so a reader sees either the old or the new content.
fn overwrite(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = open_in_place(path)?;
    without_sigxfsz(|| file.write_all(content))?;
    file.set_len(content.len() as u64)
}

/// Opens an existing file. In a directory like /tmp another user may have created it, and could then write any PID to it.
/// So the file must belong to this user or to root, and no other user may be able to write to it.
fn open_in_place(path: &Path) -> io::Result<File> {
    let file = open(path, OpenOptions::new().write(true))?;
    let found = file.metadata()?;
    let owner_is_trusted = [0, rustix::process::geteuid().as_raw()].contains(&found.uid());
    if found.is_file() && owner_is_trusted && found.mode() & 0o002 == 0 {
        return Ok(file);
    }
    Err(io::ErrorKind::PermissionDenied.into())
}

/// Returns the contents, but at most 4096 bytes. A PID file is shorter.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open(path, OpenOptions::new().read(true))?.take(1 << 12).read_to_end(&mut content)?;
    Ok(content)
}

/// Opens an existing file, never through a symlink: another user may have created that, and it may lead to a secret or to
/// an endless device. Without O_NONBLOCK a named pipe would block until another process opens its other end.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

fn rename_over(path: &Path, content: &[u8]) -> io::Result<()> {
    // In the same directory, because rename works only within one file system.
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let new = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), process::id()));
    // A process with the same PID may have been killed between the two steps below.
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
    let written = (|| {
        // Set the mode regardless of the umask.
        file.set_permissions(Permissions::from_mode(0o644))?;
        without_sigxfsz(|| file.write_all(content))?;
        fs::rename(&new, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

fn is_ours(path: &Path) -> io::Result<bool> {
    match read(path) {
        Ok(pid) => Ok(pid.trim_ascii() == process::id().to_string().as_bytes()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_whole_with_its_mode_and_never_through_a_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, path) = (dir.path().join("victim"), dir.path().join("pid"));
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        write(&path).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        let file = fs::symlink_metadata(&path).unwrap();
        assert!(file.is_file());
        assert_eq!(file.permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }

    /// In a directory like /tmp another user may have created them.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_pipe_does_not_block_and_a_symlink_is_not_read() {
        use rustix::fs::{mknodat, FileType, Mode, CWD};
        use std::sync::mpsc;
        use std::thread;
        use std::time::Duration;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let file = PidFile::new(Some(path.clone()));
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let (done, written) = mpsc::channel();
        thread::spawn(move || done.send(file.write().is_ok()));
        assert_eq!(written.recv_timeout(Duration::from_secs(60)), Ok(true));
        fs::remove_file(&path).unwrap();

        let secret = dir.path().join("secret");
        fs::write(&secret, "precious").unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        drop(PidFile::new(Some(path.clone())).replace().unwrap());
        assert!(!path.exists(), "the contents of the secret were restored, readable for everyone");
    }

    #[test]
    fn only_ours_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        restore(&path, None).unwrap();
        fs::write(&path, "1\n").unwrap();
        restore(&path, None).unwrap();
        assert!(path.exists());
        write(&path).unwrap();
        restore(&path, None).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_was_before_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let read = || fs::read_to_string(&path).unwrap();
        write(&path).unwrap();
        restore(&path, Some(b"1\n")).unwrap();
        assert_eq!(read(), "1\n");
        restore(&path, Some(b"2\n")).unwrap();
        assert_eq!(read(), "1\n", "another process has written since");
        write(&path).unwrap();
        restore(&path, None).unwrap();
        assert!(!path.exists());
    }
}
