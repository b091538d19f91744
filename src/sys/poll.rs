//! Waiting with a deadline: poll(2), tried again after the errors that pass.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{self, Errno};

/// A point in time, or never.
///
/// A program may choose any [`Duration`] for a timeout, up to `MAX`, and `Instant + Duration` panics where the sum
/// cannot be represented. Such a point is further away than any process lives, so here it is [`NEVER`](Self::NEVER).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    pub(crate) const NEVER: Self = Self(None);

    /// `time` from now.
    pub(crate) fn after(time: Duration) -> Self {
        Self::since(Instant::now(), time)
    }

    pub(crate) fn since(start: Instant, time: Duration) -> Self {
        Self(start.checked_add(time))
    }

    pub(crate) fn at(time: Instant) -> Self {
        Self(Some(time))
    }

    /// The earlier of the two.
    pub(crate) fn min(self, other: Self) -> Self {
        Self([self.0, other.0].into_iter().flatten().min())
    }

    pub(crate) fn has_passed(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }

    /// The time left, `MAX` for never.
    pub(crate) fn time_left(self) -> Duration {
        self.0.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()))
    }

    /// The time left as poll(2) accepts it; `None` to wait without limit.
    pub(crate) fn left(self) -> Option<Timespec> {
        let left = self.0?.saturating_duration_since(Instant::now());
        // More than the kernel can count is no limit.
        Timespec::try_from(left).ok()
    }
}

/// How long to wait before the next try when the kernel is short of memory or descriptors.
pub(crate) const SCARCE: Duration = Duration::from_millis(50);

/// Waits until one of `fds` is ready or the deadline has passed; returns how many are ready.
///
/// An interrupted wait continues. So does one for which the kernel has no memory, after a pause: a server that ended
/// because of that would take the service down.
pub(crate) fn poll(fds: &mut [PollFd<'_>], deadline: Deadline) -> io::Result<usize> {
    loop {
        match rustix::event::poll(fds, deadline.left().as_ref()) {
            Err(Errno::INTR) => {}
            Err(Errno::NOMEM | Errno::AGAIN) => thread::sleep(SCARCE),
            result => return result,
        }
        if deadline.has_passed() {
            // What became ready meanwhile still counts, but nothing more is waited for.
            return match rustix::event::poll(fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Err(Errno::INTR | Errno::NOMEM | Errno::AGAIN) => Ok(0),
                result => result,
            };
        }
    }
}

/// Waits until `fd` is readable or at its end. False if the deadline passes first, or poll(2) fails.
pub(crate) fn wait_readable(fd: impl AsFd, deadline: Deadline) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], deadline).is_ok_and(|ready| ready > 0)
}

/// Waits until `fd` is writable. False if the deadline passes first, or poll(2) fails.
pub(crate) fn wait_writable(fd: impl AsFd, deadline: Deadline) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::OUT)], deadline).is_ok_and(|ready| ready > 0)
}

/// Waits for a hangup or an error, which poll(2) reports without being asked. What is there to be read stays unread.
pub(crate) fn wait_hangup(fd: impl AsFd, deadline: Deadline) -> io::Result<bool> {
    Ok(poll(&mut [PollFd::new(&fd, PollFlags::empty())], deadline)? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn every_duration_makes_a_deadline() {
        for time in [Duration::MAX, Duration::from_secs(u64::MAX / 2), Duration::from_secs(i64::MAX as u64)] {
            let deadline = Deadline::after(time);
            assert!(!deadline.has_passed());
            let (reader, writer) = pipe().unwrap();
            drop(writer);
            // Returns because the pipe has ended, whatever is left of the time.
            assert!(wait_readable(&reader, deadline), "{time:?}");
        }
        assert!(Deadline::after(Duration::ZERO).has_passed());
        assert_eq!(Deadline::NEVER.min(Deadline::NEVER), Deadline::NEVER);
        let now = Deadline::at(Instant::now());
        assert_eq!((Deadline::NEVER.min(now), now.min(Deadline::NEVER)), (now, now));
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let (reader, writer) = pipe().unwrap();
        assert!(!wait_readable(&reader, Deadline::after(Duration::from_millis(1))));
        assert_eq!(wait_hangup(&reader, Deadline::after(Duration::ZERO)), Ok(false));
        drop(writer);
        assert_eq!(wait_hangup(&reader, Deadline::NEVER), Ok(true));
    }
}
