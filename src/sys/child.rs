//! The new process of an upgrade: whether it has ended, its exit status, and killing it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{kill_process, waitpid, Pid, Signal, WaitOptions};

use super::peer::{peer_pidfd, PeerCred};
use super::plan::SharedMemory;
use super::poll::{wait_hangup, wait_readable, Deadline};
use super::signal::wake_fd;
use super::system::clone;
use super::Parentage;
use crate::logging;

/// How often to check whether a child without a pidfd has ended.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// How long a killed child may take to end. After [`REAPING`] a signal or a call ends the wait: it may ask for a stop.
const KILLING: Duration = Duration::from_secs(5);

/// How long it may take until a killed child is reaped by our own parent, or released by a debugger. A child ends in less
/// time, unless it hangs in the kernel.
const REAPING: Duration = Duration::from_millis(200);

/// A process that this one has created, or one that takes over.
pub(crate) struct Process {
    /// `None` if it is not visible here.
    pub(super) pid: Option<Pid>,
    /// A descriptor that is readable once the process has ended. `None` if the kernel did not provide one.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(super) parent: Parentage,
    /// The memory that a child reads until its execve.
    pub(super) _memory: Option<SharedMemory>,
}

impl Process {
    /// Returns the process at the other end of `socket`, which has its own supervisor.
    pub(crate) fn at(socket: impl AsFd, peer: &PeerCred) -> Self {
        let pid = peer.pid.and_then(|pid| Pid::from_raw(pid as i32));
        Self { pid, pidfd: peer_pidfd(socket), parent: Parentage::Another, _memory: None }
    }

    /// Returns 0 if it is not visible here.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.map_or(0, |pid| pid.as_raw_nonzero().get() as u32)
    }

    pub(crate) fn is_child(&self) -> bool {
        self.parent != Parentage::Another
    }

    /// Waits for the end of the process. Returns whether it has ended before the deadline.
    pub(crate) fn ends_before(&self, deadline: Deadline) -> bool {
        if let Some(pidfd) = &self.pidfd {
            return wait_readable(pidfd, deadline);
        }
        while !self.has_ended() {
            if deadline.has_passed() || !self.is_child() {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Returns whether the child has ended, or cannot be reaped by this process (any more).
    fn has_ended(&self) -> bool {
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: zeros are a valid siginfo_t, and the call writes only there. (rustix has no waitid for OpenBSD.)
        self.is_child()
            && unsafe {
                let mut status: libc::siginfo_t = std::mem::zeroed();
                libc::waitid(libc::P_PID, self.pid() as libc::id_t, &mut status, options) != 0 || status.si_signo != 0
            }
    }

    /// Lets the child run until it exits, and reaps it later.
    pub(crate) fn reap_later(&self) -> Option<ExitStatus> {
        let pid = self.pid.filter(|_| self.is_child())?;
        let pidfd = self.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok());
        LATE.lock().unwrap_or_else(PoisonError::into_inner).push((pid, pidfd));
        None
    }

    fn survives(&self) -> Option<ExitStatus> {
        logging::error!("child {} cannot be reaped yet: a debugger holds it, or it hangs in the kernel", self.pid());
        self.reap_later()
    }

    /// Whether a killed child ends in time.
    fn dies(&self) -> bool {
        let (reaping, deadline) = (Deadline::after(REAPING), Deadline::after(KILLING));
        let is_asked = || wake_fd().is_ok_and(|wake| wait_readable(wake, Deadline::after(Duration::ZERO)));
        while !self.ends_before(Deadline::after(LOOK)) {
            if deadline.has_passed() || (reaping.has_passed() && is_asked()) {
                return false;
            }
        }
        true
    }

    /// Kills and reaps the child. Returns its exit status, unless another process or another part of this one has
    /// reaped it.
    pub(crate) fn kill_and_reap(&self) -> Option<ExitStatus> {
        let pid = self.pid.filter(|_| self.is_child())?;
        reap_late();
        // A filter may allow only the older call. The child is not reaped before its end, so its PID cannot be reused.
        let killed = self.pidfd.as_ref().is_some_and(|pidfd| clone::kill(pidfd).is_ok());
        if !killed && !self.ends_before(Deadline::after(Duration::ZERO)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        // SIGKILL ends a stopped process too, but not one that hangs in the kernel.
        if !self.dies() {
            return self.survives();
        }
        if let (Some(pidfd), Parentage::OurParent) = (&self.pidfd, self.parent) {
            // Our parent reaps it, and only then does the kernel report its exit status.
            let _ = wait_hangup(pidfd, Deadline::after(REAPING));
            return clone::exit_status(pidfd);
        }
        let deadline = Deadline::after(REAPING);
        loop {
            match waitpid(Some(pid), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => return Some(ExitStatus::from_raw(status.as_raw())),
                // A debugger that traces the child receives its status first, and may delay it.
                Ok(None) if deadline.has_passed() => return self.survives(),
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                // SIGCHLD is ignored, or another part of the program waits for any child.
                Err(_) => return None,
            }
        }
    }
}

/// The exit status of a child, with a hint for a SIGKILL that may be due to a lack of memory.
pub(crate) fn explain_end(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGKILL) => {
            format!("{status}, perhaps out of memory: check memory.max of the cgroup, and the whole machine")
        }
        _ => status.to_string(),
    }
}

/// Children that must still be reaped. Other code of the program may reap one, and then another child may get its PID.
/// So the pidfd identifies it, where there is one.
static LATE: Mutex<Vec<(Pid, Option<OwnedFd>)>> = Mutex::new(Vec::new());

/// Reaps those children that have ended. Returns when to check again, because no event reports their end.
pub(crate) fn reap_late() -> Deadline {
    let mut late = LATE.lock().unwrap_or_else(PoisonError::into_inner);
    late.retain(|(pid, pidfd)| match pidfd {
        Some(pidfd) => matches!(clone::reap(pidfd), Ok(false)),
        None => matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(None)),
    });
    if late.is_empty() {
        Deadline::NEVER
    } else {
        Deadline::after(LOOK)
    }
}
