//! Signal masks and dispositions by direct system calls: libc's calls leave out the signals that it uses itself, and
//! write `errno`.

use std::mem::size_of;

use super::calls::call;

/// A set of signals in the kernel's form: bit n - 1 is signal n.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask(u64);

impl Mask {
    pub(crate) fn none() -> Self {
        Self(0)
    }

    pub(crate) fn all() -> Self {
        Self(u64::MAX)
    }

    pub(crate) fn of(signal: i32) -> Self {
        Self(bit(signal))
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Changes the calling thread's mask (`how` as for rt_sigprocmask(2)) and returns the former one, or the errno.
pub(crate) fn change(how: i32, mask: Mask) -> Result<Mask, i32> {
    let mut former = Mask(0);
    let (new, old) = (&raw const mask.0 as usize, &raw mut former.0 as usize);
    // SAFETY: both point to 8 bytes, and 8 is the size of the kernel's set (rt_sigprocmask(2)).
    unsafe { call(libc::SYS_rt_sigprocmask, [how as usize, new, old, size_of::<u64>()])? };
    Ok(former)
}

/// Takes a pending signal that is in `mask`, which the calling thread must block. Does not wait.
pub(crate) fn take_pending(mask: Mask) {
    let now = [0_u64; 2];
    let (set, time) = (&raw const mask.0 as usize, now.as_ptr() as usize);
    // SAFETY: a set of 8 bytes and a zero timespec (rt_sigtimedwait(2)).
    let _ = unsafe { call(libc::SYS_rt_sigtimedwait, [set, 0, time, size_of::<u64>()]) };
}

/// Sets every signal to its default. execve alone would leave ignored signals ignored, and a handler of the parent must
/// not run in the child before the execve.
///
/// # Safety
///
/// Only for the child of a spawn, which has its own dispositions.
pub(crate) unsafe fn reset_all() {
    // The kernel's sigaction, all zeros: SIG_DFL, no flags, empty mask.
    let default = [0_u64; 8];
    // Asking /proc which signals are not at their default would take longer than setting all. CLONE_CLEAR_SIGHAND of
    // clone3(2) would save no call, because it leaves ignored signals ignored.
    for signal in (1..=64).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        let arguments = [signal as usize, default.as_ptr() as usize, 0, size_of::<u64>()];
        // SAFETY: `default` is as large as the kernel's struct on every architecture (rt_sigaction(2)).
        let _ = unsafe { call(libc::SYS_rt_sigaction, arguments) };
    }
}
