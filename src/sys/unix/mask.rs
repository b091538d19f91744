//! Signal masks and dispositions according to POSIX.

use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;

/// A set of signals.
#[derive(Clone, Copy)]
pub(crate) struct Mask(libc::sigset_t);

impl Mask {
    pub(crate) fn none() -> Self {
        let mut set = MaybeUninit::zeroed();
        // SAFETY: sigemptyset(3) writes the set, for which zeros are valid too.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            Self(set.assume_init())
        }
    }

    pub(crate) fn all() -> Self {
        let mut set = Self::none();
        // SAFETY: the set is a local variable (sigfillset(3)).
        unsafe { libc::sigfillset(&mut set.0) };
        set
    }

    pub(crate) fn of(signal: i32) -> Self {
        let mut set = Self::none();
        // SAFETY: the set is exclusively borrowed, and an invalid signal number is an error (sigaddset(3)).
        unsafe { libc::sigaddset(&mut set.0, signal) };
        set
    }

    pub(crate) fn has(self, signal: i32) -> bool {
        // SAFETY: reads the set (sigismember(3)).
        unsafe { libc::sigismember(&self.0, signal) == 1 }
    }
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((1..=64).filter(|&signal| self.has(signal))).finish()
    }
}

/// Changes the calling thread's mask (`how` as for pthread_sigmask(3)) and returns the former one, or the errno.
pub(crate) fn change(how: i32, mask: Mask) -> Result<Mask, i32> {
    let mut former = Mask::none();
    // SAFETY: both are sets, and the error is returned and not written to errno.
    match unsafe { libc::pthread_sigmask(how, &mask.0, &mut former.0) } {
        0 => Ok(former),
        errno => Err(errno),
    }
}

/// Takes a pending signal that is in `mask`, which the calling thread must block. Does not wait: not every system has
/// sigtimedwait(2), but sigwait(3) returns immediately for a pending signal.
pub(crate) fn take_pending(mask: Mask) {
    let mut pending = Mask::none();
    let mut taken = 0;
    // SAFETY: writes a local set and a number (sigpending(2), sigwait(3)).
    unsafe {
        if libc::sigpending(&mut pending.0) == 0 && (1..=64).any(|signal| mask.has(signal) && pending.has(signal)) {
            libc::sigwait(&mask.0, &mut taken);
        }
    }
}

/// Sets every signal to its default. execve alone would leave ignored signals ignored, and a handler of the parent must
/// not run in the child before the execve.
///
/// # Safety
///
/// Only for the child of a spawn, which has its own dispositions.
pub(crate) unsafe fn reset_all() {
    for signal in 1..=64 {
        // SAFETY: zeros are SIG_DFL, no flags and an empty set (sigaction(2)). For invalid numbers, SIGKILL and SIGSTOP
        // it returns EINVAL and changes nothing.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}
