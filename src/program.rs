//! What the next generation runs: program path, arguments, environment and directory, resolved when this one starts.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{access, Access};

use crate::handover::variable::VARIABLE;
use crate::sys::program;
use crate::sys::spawn::IfMissing;

/// By these a service manager speaks to the process that it has started itself, and to no other. NOTIFY_SOCKET and
/// WATCHDOG_USEC, though, are for whoever is the main process.
const FOR_THIS_PROCESS_ONLY: [&str; 5] =
    ["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"];

/// How to start the next generation.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// What is executed: no link in it was followed, so that the next upgrade runs what is there then.
    pub(crate) path: PathBuf,
    args: Vec<OsString>,
    directory: Option<PathBuf>,
    directory_chosen: bool,
    env: BTreeMap<OsString, Option<OsString>>,
}

/// What the builder was told to change.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgramOverrides {
    pub(crate) exec: Option<PathBuf>,
    pub(crate) args: Option<Vec<OsString>>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) env: BTreeMap<OsString, Option<OsString>>,
}

impl Program {
    /// Resolves everything that a later chdir, or a later change of a link, would make unfindable.
    pub(crate) fn resolve(changes: &ProgramOverrides) -> Self {
        let mut args = env::args_os();
        let argv0 = args.next().unwrap_or_default();
        let start = start_directory();
        let path = match (&changes.exec, &start) {
            (Some(exec), Some(start)) => start.join(exec),
            (Some(exec), None) => exec.clone(),
            (None, _) => resolve_argv0(&argv0, start.as_deref(), env::var_os("PATH").as_deref()),
        };
        let mut argv = vec![argv0];
        match &changes.args {
            Some(args) => argv.extend(args.iter().cloned()),
            None => argv.extend(args),
        }
        Self {
            path,
            args: argv,
            directory_chosen: changes.directory.is_some(),
            directory: match (&changes.directory, start) {
                (Some(chosen), Some(start)) => Some(start.join(chosen)),
                (Some(chosen), None) => Some(chosen.clone()),
                (None, start) => start,
            },
            env: changes.env.clone(),
        }
    }

    /// The path as execve(2) takes it.
    pub(crate) fn path_c(&self) -> io::Result<CString> {
        c_string(self.path.as_os_str())
    }

    pub(crate) fn argv(&self) -> io::Result<Vec<CString>> {
        self.args.iter().map(|arg| c_string(arg)).collect()
    }

    /// This process's environment with the builder's changes and the handover variable. Ours is never changed: other
    /// threads may read it.
    pub(crate) fn envp(&self, handover: &str) -> io::Result<Vec<CString>> {
        let kept = env::vars_os().filter(|(name, _)| {
            let ours = name == VARIABLE || FOR_THIS_PROCESS_ONLY.iter().any(|known| name == known);
            !ours && !self.env.contains_key(name)
        });
        let set = self.env.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?)));
        let pair = |(name, value): (OsString, OsString)| {
            let mut pair = Vec::with_capacity(name.len() + value.len() + 2);
            pair.extend(name.into_vec());
            pair.push(b'=');
            pair.extend(value.into_vec());
            Ok(CString::new(pair)?)
        };
        kept.chain(set).chain([(VARIABLE.into(), handover.into())]).map(pair).collect()
    }

    /// The chosen directory; or the one this process started in, so that relative paths in the arguments mean what
    /// they meant, unless it is gone.
    pub(crate) fn directory_c(&self) -> io::Result<Option<(CString, IfMissing)>> {
        let if_missing = if self.directory_chosen { IfMissing::Fail } else { IfMissing::Stay };
        self.directory.as_ref().map(|path| Ok((c_string(path.as_os_str())?, if_missing))).transpose()
    }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.to_owned().into_vec())?)
}

/// The directory as the shell names it, if that is right: `getcwd` follows links, so below /srv/current it would pin
/// the release that the link points to now.
fn start_directory() -> Option<PathBuf> {
    let physical = env::current_dir().ok();
    let named = env::var_os("PWD").map(PathBuf::from).filter(|path| path.is_absolute());
    match named {
        Some(named) if physical.as_ref() == Some(&named) || same_file(&named, Path::new(".")) => Some(named),
        _ => physical,
    }
}

/// The path under which this program would be found again.
fn resolve_argv0(argv0: &OsStr, start: Option<&Path>, search: Option<&OsStr>) -> PathBuf {
    let running = program::running();
    let absolute = |path: &Path| start.map_or_else(|| path.to_owned(), |start| start.join(path));
    let named = Path::new(argv0);
    if named.components().count() > 1 || named.is_absolute() {
        let path = absolute(named);
        if runnable(&path) {
            return path;
        }
    } else if !argv0.is_empty() {
        // A bare name may be anybody's (a login shell is called "-sh"): it must lead to what is running.
        let found = env::split_paths(search.unwrap_or_default())
            .map(|dir| absolute(&dir.join(named)))
            .find(|path| runnable(path));
        if let Some(path) = found.filter(|path| same_file(path, &running)) {
            return path;
        }
    }
    // argv[0] is free for anyone to choose; then the kernel's word counts, without what it adds for a removed file.
    let link = program::path().unwrap_or_else(|| absolute(named));
    let mut bytes = link.into_os_string().into_vec();
    if bytes.ends_with(b" (deleted)") {
        bytes.truncate(bytes.len() - b" (deleted)".len());
    }
    OsString::from_vec(bytes).into()
}

fn runnable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file()) && access(path, Access::EXEC_OK).is_ok()
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
