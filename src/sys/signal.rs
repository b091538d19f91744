//! Signals: the handler that turns one into a readable descriptor, and masks.

use std::io;
use std::mem::{size_of, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::OnceLock;

use rustix::event::{eventfd, EventfdFlags};

use super::raw::call;

/// A set of signals as the kernel has it: bit n - 1 is signal n.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask(u64);

/// What came and nobody took yet. A bit a signal.
static PENDING: AtomicU64 = AtomicU64::new(0);

/// The eventfd that the handler writes to; -1 until there is one. It is never closed, because a handler may run at
/// any time in any thread.
static WAKE: AtomicI32 = AtomicI32::new(-1);
static WAKE_OWNER: OnceLock<OwnedFd> = OnceLock::new();

/// The descriptor that gets readable when a signal came or [`wake`] was called.
pub(crate) fn wake_fd() -> io::Result<BorrowedFd<'static>> {
    if WAKE_OWNER.get().is_none() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // If two threads make one at a time, the second is closed here, before anyone used it.
        let _ = WAKE_OWNER.set(fd);
    }
    let fd = WAKE_OWNER.get().ok_or(io::ErrorKind::Other)?.as_fd();
    WAKE.store(fd.as_raw_fd(), Ordering::Release);
    Ok(fd)
}

/// Makes the descriptor readable.
pub(crate) fn wake() {
    let one = 1_u64.to_ne_bytes();
    let fd = WAKE.load(Ordering::Acquire);
    // SAFETY: `one` is eight bytes, as an eventfd wants them; `fd` is -1 or never closed. Async-signal-safe, and it
    // leaves errno alone, which matters in the handler.
    let _ = unsafe { call(libc::SYS_write, [fd as usize, one.as_ptr() as usize, one.len(), 0]) };
}

/// Takes the signals that came out of the pending set.
pub(crate) fn take_pending() -> impl Iterator<Item = i32> {
    let pending = PENDING.swap(0, Ordering::AcqRel);
    (1..=64).filter(move |signal| pending & bit(*signal) != 0)
}

extern "C" fn handler(signal: libc::c_int) {
    PENDING.fetch_or(bit(signal), Ordering::AcqRel);
    wake();
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Signals whose handler is ours. Restores the former handlers when dropped.
#[derive(Default)]
pub(crate) struct Handlers(Vec<(i32, libc::sigaction)>);

impl Handlers {
    /// Has `signal` wake [`wake_fd`] from now on. System calls that it interrupts go on (SA_RESTART).
    pub(crate) fn install(&mut self, signal: i32) -> io::Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.0.iter().any(|(installed, _)| *installed == signal) {
            return Ok(());
        }
        wake_fd()?;
        let mut former = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: `action` is valid for every field that sigaction(2) reads, and the handler is async-signal-safe.
        let former = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            if libc::sigaction(signal, &action, former.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            former.assume_init()
        };
        self.0.push((signal, former));
        Ok(())
    }
}

impl std::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(signal, _)| signal)).finish()
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for (signal, former) in self.0.drain(..) {
            // SAFETY: `former` is what sigaction(2) gave for this signal.
            unsafe { libc::sigaction(signal, &former, ptr::null_mut()) };
        }
    }
}

/// The calling thread's signal mask.
pub(crate) fn mask() -> io::Result<Mask> {
    change_mask(libc::SIG_BLOCK, Mask(0))
}

/// Blocks every signal in the calling thread, the two that the C library keeps to itself too; gives the former mask.
pub(super) fn block_all() -> io::Result<Mask> {
    change_mask(libc::SIG_BLOCK, Mask(u64::MAX))
}

pub(super) fn set_mask(mask: Mask) -> io::Result<()> {
    set_mask_raw(mask).map_err(io::Error::from_raw_os_error)
}

/// For the child too: no errno.
pub(super) fn set_mask_raw(mask: Mask) -> Result<(), i32> {
    change_mask_raw(libc::SIG_SETMASK, mask).map(drop)
}

fn change_mask(how: i32, mask: Mask) -> io::Result<Mask> {
    change_mask_raw(how, mask).map_err(io::Error::from_raw_os_error)
}

fn change_mask_raw(how: i32, mask: Mask) -> Result<Mask, i32> {
    let mut former = Mask(0);
    let (new, old) = (&raw const mask as usize, &raw mut former as usize);
    // SAFETY: both point at 8 bytes, and 8 is the size of the kernel's set (rt_sigprocmask(2)). The direct call,
    // because libc's leaves out its internal signals.
    unsafe { call(libc::SYS_rt_sigprocmask, [how as usize, new, old, size_of::<u64>()])? };
    Ok(former)
}

/// Sets every signal to its default: execve alone would leave ignored ones ignored, and before the execve a handler
/// of the parent's must not run in the child.
///
/// # Safety
///
/// Only for the child of a spawn, whose dispositions are its own.
pub(super) unsafe fn reset_all() {
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

/// Runs `write`, which may find nobody at the other end of a pipe: that is an error to be returned, whatever the
/// program wants SIGPIPE to do.
pub(crate) fn without_sigpipe<T>(write: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let sigpipe = Mask(bit(libc::SIGPIPE));
    let former = change_mask_raw(libc::SIG_BLOCK, sigpipe);
    let written = write();
    if let Ok(former) = former {
        if matches!(written, Err(rustix::io::Errno::PIPE)) && former.0 & sigpipe.0 == 0 {
            let now = [0_u64; 2];
            let (set, time) = (&raw const sigpipe as usize, now.as_ptr() as usize);
            // SAFETY: a set of 8 bytes and a zero timespec (rt_sigtimedwait(2)). Takes the signal that the write made,
            // which is this thread's own.
            let _ = unsafe { call(libc::SYS_rt_sigtimedwait, [set, 0, time, size_of::<u64>()]) };
        }
        let _ = set_mask_raw(former);
    }
    written
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
