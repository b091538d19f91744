//! A child process: whether it has ended, how, and how it is made to.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{kill_process, waitid, waitpid, Pid, Signal, WaitId, WaitIdOptions, WaitOptions};

use super::plan::{Parentage, SharedMemory};
use super::poll::{wait_hangup, wait_readable, Deadline};
use super::system::clone;
use crate::logging;

/// How often to look whether a child has ended for which there is no pidfd.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// How long a killed child may take to end.
const KILLING: Duration = Duration::from_secs(5);

/// How long a killed child may take to be reaped, by our own parent or after a debugger.
const REAPING: Duration = Duration::from_millis(200);

/// A child process.
pub(crate) struct Spawned {
    pub(crate) pid: Pid,
    /// Readable once the child has ended. `None` where the kernel did not provide one.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) parent: Parentage,
    /// What the child still reads until its execve.
    pub(super) _memory: SharedMemory,
}

impl Spawned {
    /// Waits for the end of the child. Returns whether it has ended before the deadline.
    pub(crate) fn ends_before(&self, deadline: Deadline) -> bool {
        if let Some(pidfd) = &self.pidfd {
            return wait_readable(pidfd, deadline);
        }
        loop {
            if self.is_unreaped() != Ok(false) {
                return true;
            }
            if deadline.has_passed() {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the child has ended and waits to be reaped; ECHILD if it is not ours to reap (any more).
    fn is_unreaped(&self) -> rustix::io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.pid), options).map(|status| status.is_some())
    }

    /// Lets the child end by itself, and reaps it some time after that.
    pub(crate) fn reap_later(&self) -> Option<ExitStatus> {
        reap_later(self.pid)
    }

    /// Kills and reaps the child. Returns how it ended, unless another process or another part of this one has reaped it.
    pub(crate) fn kill_and_reap(&self) -> Option<ExitStatus> {
        let pid = self.pid;
        reap_late();
        // A filter may know only the older call. Before its end nobody has reaped the child, so its number is its own.
        let killed = self.pidfd.as_ref().is_some_and(|pidfd| clone::kill(pidfd).is_ok());
        if !killed && !self.ends_before(Deadline::after(Duration::ZERO)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        // SIGKILL ends a stopped process too, but not one that hangs in the kernel.
        if !self.ends_before(Deadline::after(KILLING)) {
            return survives(pid);
        }
        if let (Some(pidfd), Parentage::OurParent) = (&self.pidfd, self.parent) {
            // Our parent reaps it, and only then does the kernel say how it ended.
            let _ = wait_hangup(pidfd, Deadline::after(REAPING));
            return clone::exit_status(pidfd);
        }
        let deadline = Deadline::after(REAPING);
        loop {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Err(Errno::INTR) => {}
                Ok(Some((_, status))) => return Some(ExitStatus::from_raw(status.as_raw())),
                // A debugger that traces the child receives its status first, and may take its time.
                Ok(None) if deadline.has_passed() => return survives(pid),
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                // SIGCHLD is ignored, or another part of the program waits for any child.
                Err(_) => return None,
            }
        }
    }
}

/// How a child ended, and what to look at if nobody has killed it.
pub(crate) fn explain_end(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGKILL) => {
            format!("{status}, which the kernel sends if memory is short: memory.max of the cgroup, or the machine's")
        }
        _ => status.to_string(),
    }
}

/// Children that are yet to be reaped.
static LATE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn survives(pid: Pid) -> Option<ExitStatus> {
    logging::error!("child {pid} cannot be reaped yet: a debugger holds it, or it hangs in the kernel");
    reap_later(pid)
}

fn reap_later(pid: Pid) -> Option<ExitStatus> {
    LATE.lock().unwrap_or_else(PoisonError::into_inner).push(pid);
    None
}

/// Reaps those children that have ended since. Returns when to look again, because no event reports their end.
pub(crate) fn reap_late() -> Deadline {
    let mut late = LATE.lock().unwrap_or_else(PoisonError::into_inner);
    late.retain(|pid| matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(None)));
    if late.is_empty() {
        Deadline::NEVER
    } else {
        Deadline::after(LOOK)
    }
}
