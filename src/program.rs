//! The program of the next generation: path, arguments, environment and directory, resolved when this generation
//! starts.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{access, Access};

use crate::handover::from_1_1_1::VARIABLES;
use crate::handover::variable::VARIABLE;
use crate::sys::plan::IfMissing;
use crate::sys::program::{self, SECURE};

/// Variables of a service manager that are meant only for the process that it has started itself. (NOTIFY_SOCKET and
/// WATCHDOG_USEC are meant for the main process, whichever that is.)
const FOR_THIS_PROCESS_ONLY: [&str; 5] =
    ["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"];

/// Changes to the program of the next generation, compared with this one. The builder has one, and
/// [`Builder::before_upgrade`](crate::Builder::before_upgrade) gets another at each upgrade.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    exec: Option<PathBuf>,
    args: Option<Vec<OsString>>,
    directory: Option<PathBuf>,
    env: BTreeMap<OsString, Option<OsString>>,
}

impl Changes {
    /// Sets the program. A relative path starts at the directory in which this process was started. Links are not
    /// resolved.
    pub fn exec(&mut self, program: impl AsRef<Path>) -> &mut Self {
        self.exec = Some(program.as_ref().to_owned());
        self
    }

    /// Sets the arguments, without `argv[0]`.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.args = Some(args.into_iter().map(Into::into).collect());
        self
    }

    /// Sets a variable in the environment.
    pub fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.env.insert(name.into(), Some(value.into()));
        self
    }

    /// Removes a variable from the environment.
    pub fn env_remove(&mut self, name: impl Into<OsString>) -> &mut Self {
        self.env.insert(name.into(), None);
        self
    }

    /// Sets the directory in which the program starts.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.directory = Some(path.as_ref().to_owned());
        self
    }
}

/// How to start the next generation.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The program file. No link in the path is resolved, so that the next upgrade runs the file that is there then.
    pub(crate) path: PathBuf,
    args: Vec<OsString>,
    /// The directory in which this process was started; empty if it is unknown.
    start: PathBuf,
    /// The chosen directory; or the one in which this process was started, so that relative paths in the arguments keep
    /// their meaning, unless it is gone.
    directory: (PathBuf, IfMissing),
    env: BTreeMap<OsString, Option<OsString>>,
}

impl Program {
    /// Returns this process's program. Resolves everything that could not be found after a later chdir or a change of a
    /// link.
    pub(crate) fn running() -> Self {
        let args: Vec<_> = env::args_os().collect();
        if program::is_secure() {
            // A caller with fewer privileges chooses argv[0], PATH, PWD and the directory, and may also have linked the
            // running file into its own directory.
            let (path, directory) = (program::running(), (PathBuf::new(), IfMissing::Stay));
            return Self { path, args, start: "/".into(), directory, env: BTreeMap::new() };
        }
        let start = start_directory();
        let argv0 = args.first().cloned().unwrap_or_default();
        let path = resolve_argv0(&argv0, &start, env::var_os("PATH").as_deref());
        let directory = (start.clone(), IfMissing::Stay);
        Self { path, args, start, directory, env: BTreeMap::new() }
    }

    pub(crate) fn with(mut self, changes: &Changes) -> Self {
        if let Some(exec) = &changes.exec {
            self.path = self.start.join(exec);
        }
        if let Some(args) = &changes.args {
            self.args.truncate(1);
            self.args.extend_from_slice(args);
        }
        if let Some(directory) = &changes.directory {
            self.directory = (self.start.join(directory), IfMissing::Fail);
        }
        self.env.extend(changes.env.clone());
        self
    }

    /// Sets or removes a variable of the next generation.
    #[cfg(feature = "systemd_notify")]
    pub(crate) fn set_env(&mut self, name: &str, value: Option<&str>) {
        self.env.insert(name.into(), value.map(Into::into));
    }

    /// Returns whether the path contains a version, like `/opt/app-1.2/bin/app`, and no link that could be changed to
    /// another version.
    pub(crate) fn names_its_version(&self) -> bool {
        let version = |part: &[u8]| part.windows(3).any(|at| matches!(at, [b'0'..=b'9', b'.', b'0'..=b'9']));
        let is_versioned = self.path.iter().any(|part| version(part.as_bytes()));
        is_versioned && fs::canonicalize(&self.path).is_ok_and(|real| real == self.path)
    }

    /// Returns the path in the form that execve(2) needs.
    ///
    /// # Errors
    ///
    /// The next generation could not use its handover, because it could not trust its environment.
    pub(crate) fn path_c(&self) -> io::Result<CString> {
        if program::becomes_secure(&self.path) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, SECURE));
        }
        c_string(self.path.as_os_str())
    }

    pub(crate) fn argv(&self) -> io::Result<Vec<CString>> {
        self.args.iter().map(|arg| c_string(arg)).collect()
    }

    /// Returns this process's environment with the builder's changes and the handover variable. The environment itself
    /// is never changed, because other threads may read it.
    pub(crate) fn envp(&self, handover: &str) -> io::Result<Vec<CString>> {
        let kept = env::vars_os().filter(|(name, _)| {
            let ours = name == VARIABLE || FOR_THIS_PROCESS_ONLY.iter().chain(&VARIABLES).any(|known| name == known);
            !ours && !self.env.contains_key(name)
        });
        let set = self.env.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?)));
        let pair =
            |(name, value): (OsString, OsString)| Ok(CString::new([name.as_bytes(), value.as_bytes()].join(&b'='))?);
        kept.chain(set).chain([(VARIABLE.into(), handover.into())]).map(pair).collect()
    }

    pub(crate) fn directory_c(&self) -> io::Result<(CString, IfMissing)> {
        Ok((c_string(self.directory.0.as_os_str())?, self.directory.1))
    }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.to_owned().into_vec())?)
}

/// Returns the directory as the shell names it, if that is correct. `getcwd` resolves links, so below /srv/current it
/// would pin the release to which the link points now.
fn start_directory() -> PathBuf {
    let physical = env::current_dir().unwrap_or_default();
    let named = env::var_os("PWD").map(PathBuf::from).filter(|path| path.is_absolute());
    match named {
        Some(named) if physical == named || same_file(&named, Path::new(".")) => named,
        _ => physical,
    }
}

/// Returns the path under which this program would be found again.
fn resolve_argv0(argv0: &OsStr, start: &Path, search: Option<&OsStr>) -> PathBuf {
    let running = program::running();
    let named = Path::new(argv0);
    if named.components().count() > 1 || named.is_absolute() {
        let path = start.join(named);
        if runnable(&path) {
            return path;
        }
    } else if !argv0.is_empty() {
        // A bare name may be arbitrary (a login shell is called "-sh"), so it must lead to the running program.
        let found = env::split_paths(search.unwrap_or_default())
            .map(|dir| start.join(dir).join(named))
            .find(|path| runnable(path));
        if let Some(path) = found.filter(|path| same_file(path, &running)) {
            return path;
        }
    }
    // argv[0] can be arbitrary. Then use the path that the kernel knows, without the suffix that it adds for a removed
    // file.
    let link = program::path().unwrap_or_else(|| start.join(named)).into_os_string().into_vec();
    OsStr::from_bytes(link.strip_suffix(b" (deleted)").unwrap_or(&link)).into()
}

fn runnable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file()) && access(path, Access::EXEC_OK).is_ok()
}

fn same_file(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    id(a).is_some_and(|a| id(b) == Some(a))
}
