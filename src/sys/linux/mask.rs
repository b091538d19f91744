//! Signal masks and dispositions by direct system calls: libc's calls leave out the signals that it uses itself, and
//! write `errno`.

use std::mem::size_of;

use super::calls::call;

/// A set of signals as the kernel has it: bit n - 1 is signal n.
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

    pub(crate) fn has(self, signal: i32) -> bool {
        self.0 & bit(signal) != 0
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Changes the calling thread's mask (`how` as for rt_sigprocmask(2)) and returns the former one, or the errno.
pub(crate) fn change(how: i32, mask: Mask) -> Result<Mask, i32> {
    let mut former = Mask(0);
    let (new, old) = (&raw const mask as usize, &raw mut former as usize);
    // SAFETY: both point at 8 bytes, and 8 is the size of the kernel's set (rt_sigprocmask(2)).
    unsafe { call(libc::SYS_rt_sigprocmask, [how as usize, new, old, size_of::<u64>()])? };
    Ok(former)
}

/// Takes a pending signal that is in `mask`, which the calling thread must block. Does not wait.
pub(crate) fn take_pending(mask: Mask) {
    let now = [0_u64; 2];
    let (set, time) = (&raw const mask as usize, now.as_ptr() as usize);
    // SAFETY: a set of 8 bytes and a zero timespec (rt_sigtimedwait(2)).
    let _ = unsafe { call(libc::SYS_rt_sigtimedwait, [set, 0, time, size_of::<u64>()]) };
}

/// Sets every signal to its default: execve alone would leave ignored ones ignored, and before the execve a handler
/// of the parent's must not run in the child.
///
/// # Safety
///
/// Only for the child of a spawn, whose dispositions are its own.
pub(crate) unsafe fn reset_all() {
    // The kernel's sigaction, all zeros: SIG_DFL, no flags, empty mask.
    let default = [0_u64; 8];
    // SAFETY: as for this function.
    let changed = unsafe { changed() }.unwrap_or(u64::MAX);
    for signal in (1..=64).filter(|signal| changed & bit(*signal) != 0) {
        let arguments = [signal as usize, default.as_ptr() as usize, 0, size_of::<u64>()];
        // SAFETY: `default` is as large as the kernel's struct on every architecture (rt_sigaction(2)). SIGKILL and
        // SIGSTOP give EINVAL, which changes nothing.
        let _ = unsafe { call(libc::SYS_rt_sigaction, arguments) };
    }
}

/// The signals that are ignored or have a handler, from /proc: as a rule six of 64. `None` where /proc does not say.
///
/// # Safety
///
/// Only for the child of a spawn: it leaves a descriptor open until the execve.
unsafe fn changed() -> Option<u64> {
    let path = c"/proc/self/status";
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    let mut status = [0_u8; 4096];
    // SAFETY: `path` is a C string that lives for ever (openat(2)); the kernel writes at most the buffer's length into
    // it (read(2)).
    let length = unsafe {
        let fd = call(libc::SYS_openat, [libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0]).ok()?;
        call(libc::SYS_read, [fd, status.as_mut_ptr() as usize, status.len(), 0]).ok()?
    };
    changed_in(status.get(..length)?)
}

/// No allocation and no panic: for the child of a spawn.
fn changed_in(status: &[u8]) -> Option<u64> {
    let set = |name: &[u8]| {
        let mut lines = status.split(|&byte| byte == b'\n');
        let digits = lines.find_map(|line| line.strip_prefix(name))?.strip_prefix(b"\t")?;
        if digits.len() != 16 {
            return None;
        }
        digits.iter().try_fold(0, |set, &digit| Some(set << 4 | u64::from(char::from(digit).to_digit(16)?)))
    };
    Some(set(b"SigIgn:")? | set(b"SigCgt:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_signals_are_read_from_the_status() {
        let status =
            b"Name:\tserver\nSigBlk:\t0000000000000003\nSigIgn:\t0000000000001000\nSigCgt:\t8000000100000440\nX:\t1\n";
        assert_eq!(changed_in(status), Some(0x8000_0001_0000_1440));
        assert_eq!(changed_in(b"SigIgn:\t0000000000001000\nSigCgt:\t80000001"), None);
        assert_eq!(changed_in(b"SigIgn:\t0000000000001000\n"), None);
        assert_eq!(changed_in(b"SigIgn:\t000000000000100g\nSigCgt:\t0000000000000000\n"), None);
        let ours = std::fs::read("/proc/self/status").unwrap();
        assert!(changed_in(&ours).unwrap() & bit(libc::SIGPIPE) != 0, "std ignores SIGPIPE");
    }
}
