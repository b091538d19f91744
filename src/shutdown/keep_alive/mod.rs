//! The wait of a thread between two requests on a persistent connection.
//!
//! It adds no system call, because the thread blocks in the read that receives the next request. When the connection
//! has been idle for too long, `shutdown(2)` of the receiving side wakes it. On Linux this ends a blocked read of a TCP
//! connection, but everything that arrives is still delivered. One thread does this for all connections, and only while
//! some are idle.
//!
//! On Unix sockets the peer would get EPIPE, and on other systems data would be lost. There the wait is a poll(2).

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::ioctl_fionread;

use super::gate::Gate;
use crate::sys::poll::{poll, wait_readable, Deadline};
use crate::sys::wake::{wake_reader, STILL_RECEIVES};

/// A connection for [`Shutdown::next_request`](crate::Shutdown::next_request).
pub trait Connection: Read + AsFd + sealed::Sealed {
    #[doc(hidden)]
    const IS_TCP: bool;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! connections {
    ($($stream:ty: $is_tcp:literal),*) => {$(
        impl sealed::Sealed for $stream {}
        impl Connection for $stream {
            const IS_TCP: bool = $is_tcp;
        }
        impl sealed::Sealed for &$stream {}
        impl Connection for &$stream {
            const IS_TCP: bool = $is_tcp;
        }
    )*};
}
connections!(TcpStream: true, UnixStream: false);

/// The longest sleep of the thread that wakes idle connections. An idle connection may last longer by this time.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How long ago the last byte must have arrived before a reader is woken. A reader that has just received something
/// needs a moment to leave the list of idle connections, especially on a busy machine.
const RECENT: Duration = Duration::from_millis(250);

/// How long the connection must be silent before a request counts as complete, if its first bytes arrived just as its
/// reader was woken.
const QUIET: Duration = Duration::from_secs(1);

/// The maximum number of checks for such a silence.
const MAX_QUIET: u32 = 5;

/// The connections that are idle now, in several parts, because each request enters and leaves here.
#[derive(Debug, Default)]
pub(super) struct IdleConnections {
    parts: [Mutex<HashMap<RawFd, Idle>>; 16],
    /// Whether the thread runs.
    watched: AtomicBool,
    /// Held while the thread starts, so that no other reader relies on a thread that then cannot be created.
    starting: Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Idle {
    since: Instant,
    longest: Duration,
    grace: Duration,
    woken: bool,
}

impl Idle {
    /// Returns when the connection closes, given the time at which accepting ended.
    fn until(&self, over: Option<Instant>) -> Deadline {
        let end = Deadline::since(self.since, self.longest);
        over.map_or(end, |over| end.min(Deadline::since(over.max(self.since), self.grace)))
    }
}

/// See [`Shutdown::next_request`](crate::Shutdown::next_request).
pub(super) fn next_request<S: Connection>(
    gate: &Arc<Gate>,
    connections: &Arc<IdleConnections>,
    requests: &mut BufReader<S>,
    longest: Duration,
    grace: Duration,
) -> io::Result<bool> {
    if !requests.buffer().is_empty() {
        return Ok(true);
    }
    let idle = Idle { since: Instant::now(), longest, grace, woken: false };
    let mut woken = false;
    loop {
        let fd = requests.get_ref().as_fd().as_raw_fd();
        let entry = (S::IS_TCP && STILL_RECEIVES).then(|| connections.enter(gate, fd, idle)).flatten();
        let Some(entry) = entry else { break };
        let received = requests.fill_buf().map(<[u8]>::len);
        // This also applies in a later turn: once the reader was woken, a read without data returns 0.
        woken |= entry.leave();
        match received {
            // Data that arrived in the meantime is still delivered.
            Ok(0) if woken && unread(requests) > 0 => {}
            Ok(0) => return Ok(false),
            Ok(_) => {
                if woken {
                    wait_for_the_rest(requests, QUIET);
                }
                return Ok(true);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // The program has set a timeout, or the connection is nonblocking.
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    poll_for_request(gate, requests, &idle)
}

fn poll_for_request<S: Connection>(gate: &Gate, requests: &mut BufReader<S>, idle: &Idle) -> io::Result<bool> {
    loop {
        let over = gate.over_since();
        let mut fds = vec![PollFd::new(requests.get_ref(), PollFlags::IN)];
        fds.extend(over.is_none().then(|| PollFd::new(&gate.over, PollFlags::IN)));
        let ready = poll(&mut fds, idle.until(over))?;
        let readable = !fds[0].revents().is_empty();
        drop(fds);
        if readable {
            match requests.fill_buf() {
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                received => return received.map(|received| !received.is_empty()),
            }
        } else if ready == 0 {
            return Ok(false);
        }
    }
}

/// A request began to arrive in the microsecond between the decision to wake its reader and the wake-up. From now on a
/// read without data returns 0, which the program would mistake for the end of the connection. So wait until the rest
/// of the request has arrived.
fn wait_for_the_rest<S: Connection>(requests: &BufReader<S>, quiet: Duration) {
    let mut before = None;
    for _ in 0..MAX_QUIET {
        let now = Some(unread(requests));
        if now == before {
            break;
        }
        before = now;
        thread::sleep(quiet);
    }
}

fn unread<S: Connection>(requests: &BufReader<S>) -> u64 {
    ioctl_fionread(requests.get_ref()).unwrap_or(0)
}

/// One connection's place in the list of idle connections. Dropping it leaves the list on every way out of the read,
/// including a panic.
struct IdleEntry<'a> {
    connections: &'a IdleConnections,
    fd: RawFd,
}

impl IdleEntry<'_> {
    /// Ends the wait. Returns whether the reader was woken.
    fn leave(self) -> bool {
        let woken = self.connections.part(self.fd).remove(&self.fd).is_some_and(|idle| idle.woken);
        std::mem::forget(self);
        woken
    }
}

impl Drop for IdleEntry<'_> {
    fn drop(&mut self) {
        self.connections.part(self.fd).remove(&self.fd);
    }
}

impl IdleConnections {
    fn part(&self, fd: RawFd) -> MutexGuard<'_, HashMap<RawFd, Idle>> {
        self.parts[fd as usize % self.parts.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `None` if no thread can be created to wake the reader.
    fn enter(self: &Arc<Self>, gate: &Arc<Gate>, fd: RawFd, idle: Idle) -> Option<IdleEntry<'_>> {
        self.part(fd).insert(fd, idle);
        let entry = IdleEntry { connections: self, fd };
        // Check this after the entry is added, because the thread checks the list once more after it has cleared this.
        if !self.watched.load(Ordering::SeqCst) {
            let _starting = self.starting();
            if !self.watched.load(Ordering::SeqCst) {
                let (connections, gate) = (self.clone(), gate.clone());
                let watch = move || {
                    drop(connections.starting());
                    while connections.watch(&gate) {}
                };
                thread::Builder::new().name("ecdysis-idle".into()).spawn(watch).ok()?;
                self.watched.store(true, Ordering::SeqCst);
            }
        }
        Some(entry)
    }

    fn starting(&self) -> MutexGuard<'_, ()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the readers whose time is over, and sleeps until the next one is due. Returns false when no connection is
    /// idle.
    fn watch(&self, gate: &Gate) -> bool {
        let over = gate.over_since();
        let Some(next) = self.wake(over).or_else(|| {
            self.watched.store(false, Ordering::SeqCst);
            // A connection that was added before this was cleared relies on this thread.
            self.wake(over).filter(|_| !self.watched.swap(true, Ordering::SeqCst))
        }) else {
            return false;
        };
        let next = next.min(Deadline::after(LONGEST_SLEEP));
        match over {
            None => drop(wait_readable(&gate.over, next)),
            Some(_) => drop(poll(&mut [], next)),
        }
        true
    }

    /// Wakes the readers whose time is over. Returns when the next one is due, or `None` if no connection is idle.
    fn wake(&self, over: Option<Instant>) -> Option<Deadline> {
        let mut next = None;
        for part in &self.parts {
            for (fd, idle) in part.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
                let mut until = idle.until(over);
                if until.has_passed() && !idle.woken {
                    // Hold the lock, which the reader takes before it can close the connection.
                    idle.woken = wake_reader(*fd, RECENT);
                    // A reader with a new request leaves the list on its own.
                    until = Deadline::after(RECENT);
                }
                let until = if idle.woken { Deadline::NEVER } else { until };
                next = Some(next.map_or(until, |next: Deadline| next.min(until)));
            }
        }
        next
    }
}

#[cfg(test)]
mod tests;
