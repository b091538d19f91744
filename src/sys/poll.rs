//! Waiting with a deadline: poll(2), and calls that send, retried after transient errors.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{self, Errno};
use rustix::net::sockopt::{set_socket_timeout, Timeout};

/// A point in time, or never.
///
/// A program may choose any [`Duration`] up to `MAX` as a timeout, and `Instant + Duration` panics if the sum cannot be
/// represented. Such a time is later than the end of any process, so it becomes [`NEVER`](Self::NEVER).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    pub(crate) const NEVER: Self = Self(None);

    /// Returns the deadline `time` from now.
    pub(crate) fn after(time: Duration) -> Self {
        Self::since(Instant::now(), time)
    }

    pub(crate) fn since(start: Instant, time: Duration) -> Self {
        Self(start.checked_add(time))
    }

    pub(crate) fn at(time: Instant) -> Self {
        Self(Some(time))
    }

    /// Returns the earlier of the two.
    pub(crate) fn min(self, other: Self) -> Self {
        Self([self.0, other.0].into_iter().flatten().min())
    }

    pub(crate) fn has_passed(self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }

    /// Returns the time left; `MAX` for never.
    pub(crate) fn time_left(self) -> Duration {
        self.0.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()))
    }

    /// Returns the time left in the form of poll(2); `None` for no limit.
    pub(crate) fn left(self) -> Option<Timespec> {
        // A time that is too long for the kernel means no limit.
        Timespec::try_from(self.time_left()).ok()
    }
}

/// How long to wait before a retry when the kernel is short of memory or descriptors.
pub(crate) const SCARCE: Duration = Duration::from_millis(50);

/// Waits until one of `fds` is ready or the deadline has passed. Returns how many are ready.
///
/// An interrupted wait continues. So does a wait for which the kernel has no memory, after a pause, because such an
/// error must not end the server.
pub(crate) fn poll(fds: &mut [PollFd<'_>], deadline: Deadline) -> io::Result<usize> {
    loop {
        // Descriptors that have become ready at the deadline still count, but there is no further wait.
        let is_last = deadline.has_passed();
        match rustix::event::poll(fds, deadline.left().as_ref()) {
            Err(Errno::INTR | Errno::NOMEM | Errno::AGAIN) if is_last => return Ok(0),
            Err(Errno::INTR) => {}
            Err(Errno::NOMEM | Errno::AGAIN) => thread::sleep(SCARCE),
            result => return result,
        }
    }
}

/// Waits until `fd` is readable or at its end. Returns false if the deadline passes first, or poll(2) fails.
pub(crate) fn wait_readable(fd: impl AsFd, deadline: Deadline) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], deadline).is_ok_and(|ready| ready > 0)
}

/// Waits until `fd` is writable. Returns false if the deadline passes first, or poll(2) fails.
pub(crate) fn wait_writable(fd: impl AsFd, deadline: Deadline) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::OUT)], deadline).is_ok_and(|ready| ready > 0)
}

/// Waits for a hangup or an error, which poll(2) always reports. Leaves pending data unread.
pub(crate) fn wait_hangup(fd: impl AsFd, deadline: Deadline) -> io::Result<bool> {
    Ok(poll(&mut [PollFd::new(&fd, PollFlags::empty())], deadline)? > 0)
}

/// Repeats `call`, which sends or connects on a blocking Unix socket, until it succeeds or fails. If `until` passes
/// first, the error is TIMEDOUT.
///
/// poll(2) cannot wait for room in the queue of a socket that is not connected. SO_SNDTIMEO alone is not a limit,
/// because each signal would restart it.
pub(crate) fn send_until<T>(
    socket: impl AsFd,
    until: Deadline,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        // Zero would mean "no limit". A year is enough, and cannot overflow.
        let left = until.time_left().clamp(Duration::from_millis(1), Duration::from_secs(365 * 24 * 60 * 60));
        set_socket_timeout(&socket, Timeout::Send, Some(left))?;
        match call() {
            Err(Errno::INTR | Errno::AGAIN) if !until.has_passed() => {}
            Err(Errno::INTR | Errno::AGAIN) => return Err(Errno::TIMEDOUT),
            result => return result,
        }
    }
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
            // This returns because of the end of the pipe, long before the deadline.
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
