//! Signals: the handler that makes a descriptor readable, and guards for masks.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::OnceLock;

use rustix::io::Errno;

use super::flag::Flag;
pub(crate) use super::system::mask::Mask;
use super::system::mask::{self, change};

/// The highest signal number. The lowest is 1.
const LAST: usize = 64;

/// Signals that have arrived and were not taken yet, with one bit per signal.
static PENDING: AtomicU64 = AtomicU64::new(0);

/// The previous actions, by signal. They are leaked, because a handler may read one at any time.
static FORMER: [AtomicPtr<libc::sigaction>; LAST + 1] = [const { AtomicPtr::new(ptr::null_mut()) }; LAST + 1];

/// The flag that the handler raises. It is never closed, because a handler may run at any time in any thread.
static WAKE: OnceLock<Flag> = OnceLock::new();

/// Returns the signal's name, as operators write it.
pub(crate) fn name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGWINCH => "SIGWINCH",
        _ => return format!("signal {signal}"),
    };
    name.into()
}

/// Returns the descriptor that becomes readable when a signal arrives or [`wake`] is called.
pub(crate) fn wake_fd() -> io::Result<BorrowedFd<'static>> {
    wake_flag().map(AsFd::as_fd)
}

fn wake_flag() -> io::Result<&'static Flag> {
    match WAKE.get() {
        Some(flag) => Ok(flag),
        // If two threads create one at the same time, the second is closed here, before it is used.
        None => Flag::new(false).map(|flag| WAKE.get_or_init(|| flag)),
    }
}

/// Makes the descriptor readable. The handler calls this too: `get` is one atomic load, and `raise` is async-signal-safe.
pub(crate) fn wake() {
    if let Some(flag) = WAKE.get() {
        flag.raise();
    }
}

/// Makes the descriptor unreadable. Later signals and calls make it readable again.
pub(crate) fn clear_wake() {
    if let Some(flag) = WAKE.get() {
        flag.lower();
    }
}

/// Removes and returns the signals in the pending set.
pub(crate) fn take_pending() -> impl Iterator<Item = i32> {
    let pending = PENDING.swap(0, Ordering::AcqRel);
    (1..=LAST as i32).filter(move |signal| pending & (1 << (signal - 1)) != 0)
}

/// Makes the signal pending again.
pub(crate) fn put_back(signal: i32) {
    PENDING.fetch_or(1 << (signal - 1), Ordering::AcqRel);
    wake();
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    put_back(signal);
    let Some(former) = former(signal) else { return };
    // SAFETY: sigaction(2) returned it for this signal, so its handler was installed to be called with these arguments.
    unsafe {
        match former.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {}
            with_info if former.sa_flags & libc::SA_SIGINFO != 0 => {
                type WithInfo = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, WithInfo>(with_info)(signal, info, context);
            }
            plain => std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(plain)(signal),
        }
    }
}

/// Returns the action that was installed before ours.
fn former(signal: i32) -> Option<&'static libc::sigaction> {
    // SAFETY: the pointer is null or refers to a sigaction that is never freed.
    FORMER.get(signal as usize).and_then(|former| unsafe { former.load(Ordering::Acquire).as_ref() })
}

/// Returns the handler's address, as stored in a sigaction.
fn address() -> usize {
    handler as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize
}

/// Signals with our handler. Restores the former handlers when dropped, unless other code has installed another handler
/// since then, which may call ours.
#[derive(Debug, Default)]
pub(crate) struct Handlers(Vec<i32>);

impl Handlers {
    /// Makes `signal` wake [`wake_fd`] from now on. System calls that it interrupts are restarted (SA_RESTART), and the
    /// handler runs on the thread's alternate stack if it has one (SA_ONSTACK), because the normal stack may be
    /// exhausted. A previously installed handler is called after ours.
    pub(crate) fn install(&mut self, signal: i32) -> io::Result<()> {
        let Some(place) = usize::try_from(signal).ok().filter(|&signal| signal > 0).and_then(|at| FORMER.get(at))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if self.0.contains(&signal) {
            return Ok(());
        }
        wake_flag()?;
        let former = action(signal, None)?;
        if former.sa_sigaction == address() {
            return Ok(());
        }
        // Do this before our handler is installed, because it may run immediately.
        place.store(Box::into_raw(Box::new(former)), Ordering::Release);
        // Signals that must not interrupt the former handler stay blocked.
        let mut ours = former;
        ours.sa_sigaction = address();
        ours.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK | libc::SA_SIGINFO;
        action(signal, Some(&ours))?;
        self.0.push(signal);
        Ok(())
    }

    /// Leaves the handlers installed permanently.
    pub(crate) fn keep(&mut self) {
        self.0.clear();
    }
}

/// Returns the action of `signal`, and sets a new one if given.
fn action(signal: i32, new: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    let mut former = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `new` is null or valid for every field that sigaction(2) reads, and its handler is async-signal-safe or
    // was installed before. `former` is either written or zero, which is valid too.
    unsafe {
        match libc::sigaction(signal, new.map_or(ptr::null(), ptr::from_ref), former.as_mut_ptr()) {
            0 => Ok(former.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for signal in self.0.drain(..) {
            if action(signal, None).is_ok_and(|current| current.sa_sigaction == address()) {
                let _ = action(signal, former(signal));
            }
        }
    }
}

/// Signals that the calling thread has blocked. Restores the former mask when dropped.
pub(super) struct Blocked(Mask);

impl Blocked {
    pub(super) fn new(signals: Mask) -> io::Result<Self> {
        change(libc::SIG_BLOCK, signals).map(Self).map_err(io::Error::from_raw_os_error)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // This cannot fail: the same call with valid arguments has blocked the signals.
        let _ = change(libc::SIG_SETMASK, self.0);
    }
}

/// Runs `write`. If the pipe has no reader, this returns an error, whatever the program's disposition for SIGPIPE is.
pub(crate) fn without_sigpipe<T>(write: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    without(libc::SIGPIPE, |error| *error == Errno::PIPE, write)
}

/// Runs `write`. If the file would exceed RLIMIT_FSIZE (`LimitFSIZE=0` of a unit also counts for memory files), this
/// returns an error instead of ending the process by SIGXFSZ.
pub(crate) fn without_sigxfsz<T>(write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    without(libc::SIGXFSZ, |error| error.raw_os_error() == Some(libc::EFBIG), write)
}

/// Runs `write` with `signal` blocked, and takes the signal if it was raised together with the error: also if the program
/// blocks it, because the signal would end the process once the program unblocks it.
fn without<T, E>(signal: i32, raised: impl Fn(&E) -> bool, write: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let mask = Mask::of(signal);
    let blocked = Blocked::new(mask);
    let written = write();
    if blocked.is_ok() && written.as_ref().is_err_and(raised) {
        // The signal of the write is pending only for this thread.
        mask::take_pending(mask);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    static CALLED: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn plain(signal: libc::c_int) {
        CALLED.fetch_add(signal as usize, Ordering::SeqCst);
    }

    extern "C" fn with_info(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo.
        let from_signal = unsafe { (*info).si_signo };
        CALLED.fetch_add((signal + from_signal) as usize, Ordering::SeqCst);
    }

    /// One test, because the counter and the pending set belong to the process.
    #[test]
    fn the_former_handler_is_called_and_restored() {
        let signal = libc::SIGWINCH;
        let raise = || {
            CALLED.store(0, Ordering::SeqCst);
            // SAFETY: the signal has a handler in this test.
            unsafe { libc::raise(signal) };
            CALLED.load(Ordering::SeqCst)
        };
        for (handler, flags, calls) in [
            (plain as extern "C" fn(libc::c_int) as usize, 0, signal as usize),
            (with_info as extern "C" fn(_, _, _) as usize, libc::SA_SIGINFO, 2 * signal as usize),
        ] {
            let mut theirs = action(signal, None).unwrap();
            (theirs.sa_sigaction, theirs.sa_flags) = (handler, flags);
            let before = action(signal, Some(&theirs)).unwrap();
            let mut handlers = Handlers::default();
            handlers.install(signal).unwrap();
            assert!(action(signal, None).unwrap().sa_flags & libc::SA_ONSTACK != 0);
            assert_eq!(raise(), calls);
            assert!(take_pending().any(|taken| taken == signal));
            drop(handlers);
            assert_eq!(action(signal, None).unwrap().sa_sigaction, handler);
            assert_eq!(raise(), calls);
            action(signal, Some(&before)).unwrap();
        }

        let mut handlers = Handlers::default();
        handlers.install(signal).unwrap();
        let mut later = action(signal, None).unwrap();
        (later.sa_sigaction, later.sa_flags) = (plain as extern "C" fn(libc::c_int) as usize, 0);
        let ours = action(signal, Some(&later)).unwrap();
        drop(handlers);
        assert_eq!(action(signal, None).unwrap().sa_sigaction, later.sa_sigaction, "a foreign handler stays");
        action(signal, Some(&ours)).unwrap();
    }

    #[test]
    fn the_signal_of_a_failed_write_does_not_stay_pending() {
        let _program = Blocked::new(Mask::of(libc::SIGPIPE)).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        assert_eq!(without_sigpipe(|| rustix::io::write(&writer, b"x")), Err(Errno::PIPE));
        // SAFETY: writes a local set (sigpending(2)), and reads it.
        let pending = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigpending(&mut set);
            libc::sigismember(&set, libc::SIGPIPE)
        };
        assert_eq!(pending, 0);
    }

    #[test]
    fn what_is_no_signal_is_an_error() {
        for signal in [i32::MIN, -1, 0, 65, i32::MAX] {
            assert!(Handlers::default().install(signal).is_err());
        }
    }
}
