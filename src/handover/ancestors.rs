//! The older generations that still run, and the links to them: to the parent, and to those before it.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::entry::Entry;
use super::held_open::hold_open;
use super::lines::{send, FromChild, FromParent, Lines, Read};
use crate::key::Key;
use crate::logging;
use crate::sys::adopt::identity;
use crate::sys::poll::{poll, wait_hangup, wait_readable, Deadline};
use crate::sys::signal;

/// The generations before this one that lived when it began.
#[derive(Debug, Default)]
pub(crate) struct Ancestors {
    /// The one that handed over to this process.
    pub(crate) parent: Option<ParentLink>,
    /// Those before the parent, oldest first.
    pub(crate) older: Vec<DrainLink>,
    /// The pipe to a parent of version 1.1.1, which has no link.
    pub(crate) of_1_1_1: Option<OwnedFd>,
}

impl Ancestors {
    /// Whether another generation handed over to this one.
    pub(crate) fn is_child(&self) -> bool {
        self.parent.is_some() || self.of_1_1_1.is_some()
    }

    /// Those that still run, oldest first.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &DrainLink> {
        let parent = self.parent.as_ref().map(|parent| &parent.writer);
        self.older.iter().chain(parent).filter(|link| link.is_alive())
    }

    /// Whether the parent can still take back what it has handed over.
    pub(crate) fn on_probation(&self) -> bool {
        self.parent.as_ref().is_some_and(|parent| !parent.state().free)
    }

    /// Whether the parent has sent something, or ended, that [`ParentLink::take_requests`] has not been called for since.
    pub(crate) fn has_news(&self) -> bool {
        self.parent.as_ref().is_some_and(|parent| parent.receive().news)
    }

    /// Sends a message to the parent. A parent that has ended does not need it.
    pub(crate) fn send_to_parent(&self, message: &FromChild) {
        if let Some(Err(e)) = self.parent.as_ref().map(|parent| parent.send(message)) {
            logging::debug!("cannot send {message:?} to the parent: {e}");
        }
    }
}

/// The child's end of the link to its parent.
#[derive(Debug)]
pub(crate) struct ParentLink {
    pub(crate) reader: Arc<OwnedFd>,
    writer: DrainLink,
    received: Mutex<Received>,
}

#[derive(Debug, Default)]
struct Received {
    lines: Lines,
    /// Not yet handled.
    requests: Vec<FromParent>,
    /// Something was read that the event loop has not seen.
    news: bool,
    state: ParentState,
}

/// What is known of the parent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParentState {
    pub(crate) committed: bool,
    /// The parent has given this process up. This process must not accept (again), also if the parent has ended since: it
    /// may have stopped the service.
    pub(crate) given_up: bool,
    /// The parent has announced this process to the service manager.
    pub(crate) announced: bool,
    pub(crate) ended: bool,
    /// This process is free to upgrade: the verdict has come, or the end of the parent.
    pub(crate) free: bool,
}

impl ParentLink {
    /// The link over these two descriptors, which may be one. `lines` holds what was read with the manifest.
    pub(crate) fn new(generation: u64, reader: Arc<OwnedFd>, writer: Arc<OwnedFd>, lines: Lines) -> io::Result<Self> {
        let writer = DrainLink { generation, inode: identity(&writer)?, fd: writer };
        Ok(Self { reader, writer, received: Mutex::new(Received { lines, ..Received::default() }) })
    }

    /// Reads everything that the parent has sent, and returns what is known.
    pub(crate) fn state(&self) -> ParentState {
        self.receive().state
    }

    /// What the parent was asked for and passes on. The rest of what it has sent is in [`state`](Self::state).
    pub(crate) fn take_requests(&self) -> Vec<FromParent> {
        let mut received = self.receive();
        received.news = false;
        mem::take(&mut received.requests)
    }

    /// Reads everything that has arrived. Any thread may call this, also while the event loop waits for the parent's
    /// messages, which would then never see a `stop` that is already read. So this wakes the loop.
    fn receive(&self) -> MutexGuard<'_, Received> {
        let mut guard = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let Received { lines, requests, state, news } = &mut *guard;
        while !state.ended {
            let next = lines.next(self.reader.as_fd());
            if !matches!(next, Ok(Read::Wait)) && !mem::replace(news, true) {
                signal::wake();
            }
            match next {
                Ok(Read::Line(line)) => match FromParent::parse(&line) {
                    Some(FromParent::Commit) => state.committed = true,
                    Some(FromParent::Stop) => state.given_up = true,
                    Some(FromParent::Main) => state.announced = true,
                    Some(FromParent::Verdict) => state.free = true,
                    Some(request) => requests.push(request),
                    // A message that only later versions know.
                    None => logging::debug!("the parent sent an unknown message {line:?}"),
                },
                Ok(Read::Wait) => break,
                Ok(Read::End) => {
                    state.ended = true;
                    state.free |= !state.given_up;
                }
                // A parent that breaks the protocol is not dead, but of no more use.
                Ok(Read::Garbage(_)) | Err(_) => {
                    state.given_up |= !state.free;
                    state.ended = true;
                }
            }
        }
        guard
    }

    /// Waits until this is known of the parent, at most `time`. Returns what is known then.
    pub(crate) fn wait_for(&self, time: Duration, known: impl Fn(&ParentState) -> bool) -> ParentState {
        let deadline = Deadline::after(time);
        loop {
            let state = self.state();
            if known(&state) || !wait_readable(&self.reader, deadline) {
                return state;
            }
        }
    }

    /// Whether the parent has closed the end on which it receives: it is dead, or has given this process up.
    pub(crate) fn is_deaf(&self) -> bool {
        !self.writer.is_alive()
    }

    /// Tells the two apart: a parent that gives up sends that first and stays, one that is dead closes the link.
    pub(crate) fn is_dead(&self, time: Duration) -> bool {
        let state = self.wait_for(time, |state| state.given_up || state.ended);
        state.ended && !state.given_up
    }

    /// Sends a message, without waiting.
    pub(crate) fn send(&self, message: &FromChild) -> io::Result<()> {
        send(&self.writer.fd, &message.line())
    }

    /// Sends a message, waiting for room in the link at most until `deadline`.
    pub(crate) fn send_by(&self, message: &FromChild, deadline: Deadline) -> io::Result<()> {
        loop {
            match self.send(message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !deadline.has_passed() => {
                    poll(&mut [PollFd::new(&self.writer.fd, PollFlags::OUT)], deadline)?;
                }
                result => return result,
            }
        }
    }

    /// Waits until the parent has ended, which closes its end of the link, at most `time`. Messages stay unread.
    pub(crate) fn wait_end(&self, time: Duration) -> io::Result<bool> {
        Ok(wait_hangup(&self.reader, Deadline::after(time))?)
    }

    /// Keeps the link open until this process or the parent ends, whatever the program drops.
    pub(crate) fn hold_open(&self) {
        hold_open(self.reader.clone());
        hold_open(self.writer.fd.clone());
    }
}

/// The status pipe, or socket, of an older generation, on which it is asked to end its drain. Handed on from child to
/// child.
#[derive(Debug)]
pub(crate) struct DrainLink {
    pub(crate) generation: u64,
    pub(crate) inode: u64,
    pub(crate) fd: Arc<OwnedFd>,
}

impl DrainLink {
    /// A pipe without a reader reports an error, a socket without a peer a hangup (poll(2)).
    fn is_alive(&self) -> bool {
        matches!(wait_hangup(&self.fd, Deadline::after(Duration::ZERO)), Ok(false))
    }

    pub(crate) fn end_drain(&self, within: Duration) {
        // An error means that it has ended, and its drain with it.
        let _ = send(&self.fd, &FromChild::EndDrain(within).line());
    }

    pub(crate) fn entry(&self) -> Entry {
        let (key, fd) = (Key::drain(self.generation), self.fd.clone());
        Entry { key, fd, inode: self.inode, file: None, unit: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net::socketpair;

    /// Read by another thread, say, just before the event loop waits.
    #[test]
    fn what_was_read_and_not_seen_is_news() {
        let (ours, parents) = socketpair(rustix::net::SocketType::STREAM, crate::sys::Mode::Nonblocking).unwrap();
        let ours = Arc::new(ours);
        let parent = ParentLink::new(1, ours.clone(), ours, Lines::default()).unwrap();
        let ancestors = Ancestors { parent: Some(parent), ..Ancestors::default() };
        assert!(!ancestors.has_news());
        send(&parents, FromParent::Stop.line()).unwrap();
        let parent = ancestors.parent.as_ref().unwrap();
        assert!(parent.state().given_up);
        assert!(ancestors.has_news());
        assert!(parent.take_requests().is_empty());
        assert!(!ancestors.has_news());
        drop(parents);
        assert!(parent.state().ended && ancestors.has_news());
    }
}
