//! Waiting with poll(2) and a deadline.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// The pause before a poll that failed for lack of kernel memory is tried again.
const SCARCE: Duration = Duration::from_millis(50);

/// Waits until one of `events` occurs on `fd`, or a hangup or error, which always count. Returns whether one did within
/// `time`.
pub(crate) fn wait_for(fd: impl AsFd, events: PollFlags, time: Duration) -> bool {
    let deadline = Instant::now().checked_add(time);
    loop {
        let left = deadline.map(time_left);
        match poll(&mut [PollFd::new(&fd, events)], left.as_ref()) {
            Err(e) if should_retry(e) && deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}

/// Returns whether `fd` becomes readable, or reaches its end, within `time`.
pub(crate) fn wait_readable(fd: impl AsFd, time: Duration) -> bool {
    wait_for(fd, PollFlags::IN, time)
}

/// Returns whether a poll that failed with `e` should be tried again, after a pause if the kernel is out of memory: a
/// server that ended because of that would take the service down.
pub(crate) fn should_retry(e: Errno) -> bool {
    let scarce = matches!(e, Errno::NOMEM | Errno::AGAIN);
    if scarce {
        thread::sleep(SCARCE);
    }
    scarce || e == Errno::INTR
}

/// The time until `deadline`, zero if it has passed.
pub(crate) fn time_left(deadline: Instant) -> Timespec {
    timespec(deadline.saturating_duration_since(Instant::now()))
}

/// `time` as the kernel takes it. One that the kernel cannot count is without end.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}
