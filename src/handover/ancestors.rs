//! The older generations that still run, and the links to them: the parent, and the generations before it.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::entry::Entry;
use super::held_open::hold_open;
use super::lines::{send, FromChild, FromParent, Lines, Read};
use crate::key::Key;
use crate::logging;
use crate::sys::child::LOOK;
use crate::sys::poll::{wait_hangup, wait_readable, wait_writable, Deadline};
use crate::sys::signal;

/// The generations before this one that were alive when it started.
#[derive(Debug, Default)]
pub(crate) struct Ancestors {
    /// The process that handed over to this one.
    pub(crate) parent: Option<ParentLink>,
    /// The generations before the parent, oldest first.
    pub(crate) older: Vec<Entry>,
    /// The status files of those and of the parent, which they update while they drain.
    pub(crate) statuses: Vec<Entry>,
    /// The pipe to a parent of version 1.1.1, which has no link.
    pub(crate) of_1_1_1: Option<OwnedFd>,
}

impl Ancestors {
    /// Whether another generation handed over to this one.
    pub(crate) fn is_child(&self) -> bool {
        self.parent.is_some() || self.of_1_1_1.is_some()
    }

    /// Returns those that still run, oldest first.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &Entry> {
        let parent = self.parent.as_ref().map(|parent| &parent.writer);
        self.older.iter().chain(parent).filter(|link| link.is_alive())
    }

    /// Returns the file in which that generation writes its status, if it has one.
    pub(crate) fn status_of(&self, link: &Entry) -> Option<&Entry> {
        self.statuses.iter().find(|status| status.key.drain_generation() == link.key.drain_generation())
    }

    /// Whether the parent can still take the commit back.
    pub(crate) fn on_probation(&self) -> bool {
        self.parent.as_ref().is_some_and(|parent| !parent.state().free)
    }

    /// Whether the parent has sent a message or ended since the last call of [`ParentLink::take_requests`].
    pub(crate) fn has_news(&self) -> bool {
        self.parent.as_ref().is_some_and(|parent| parent.receive().news)
    }

    /// Sends a message to the parent. If the parent has ended, the message is not needed.
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
    writer: Entry,
    received: Mutex<Received>,
}

#[derive(Debug, Default)]
struct Received {
    lines: Lines,
    /// Requests that are not handled yet.
    requests: Vec<FromParent>,
    /// A message was read that the event loop has not handled.
    news: bool,
    state: ParentState,
}

/// What this process knows about its parent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParentState {
    pub(crate) committed: bool,
    /// The parent has given up on this process. This process must not accept (again), even if the parent has ended
    /// since then, because the parent may have stopped the service.
    pub(crate) given_up: bool,
    /// The parent has announced this process to the service manager.
    pub(crate) announced: bool,
    pub(crate) ended: bool,
    /// This process may upgrade, because it has received the verdict or the parent has ended.
    pub(crate) free: bool,
}

impl ParentLink {
    /// Creates the link from two descriptors, which may be the same. `lines` contains bytes that were read together
    /// with the manifest.
    pub(crate) fn new(generation: u64, reader: Arc<OwnedFd>, writer: Arc<OwnedFd>, lines: Lines) -> io::Result<Self> {
        let writer = Entry::shared(Key::drain(generation), writer)?;
        Ok(Self { reader, writer, received: Mutex::new(Received { lines, ..Received::default() }) })
    }

    /// Reads everything that the parent has sent, and returns the resulting state.
    pub(crate) fn state(&self) -> ParentState {
        self.receive().state
    }

    /// Returns the requests that the parent has forwarded. Its other messages determine [`state`](Self::state).
    pub(crate) fn take_requests(&self) -> Vec<FromParent> {
        let mut received = self.receive();
        received.news = false;
        mem::take(&mut received.requests)
    }

    /// Reads everything that has arrived, and wakes the event loop. Any thread may call this while the event loop waits
    /// for the parent's messages. Without the wake-up the loop would never notice a `stop` that another thread has
    /// read.
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
                    // A later version may send messages that this one does not know.
                    None => logging::debug!("the parent sent an unknown message {line:?}"),
                },
                Ok(Read::Wait) => break,
                Ok(Read::End) => {
                    state.ended = true;
                    state.free |= !state.given_up;
                }
                // A parent that breaks the protocol is not dead, but its messages are no longer usable.
                Ok(Read::Garbage(_)) | Err(_) => {
                    state.given_up |= !state.free;
                    state.ended = true;
                }
            }
        }
        guard
    }

    /// Waits until the parent has this state, for at most `time`. Returns the state then.
    pub(crate) fn wait_for(&self, time: Duration, known: impl Fn(&ParentState) -> bool) -> ParentState {
        let deadline = Deadline::after(time);
        loop {
            let state = self.state();
            if known(&state) || deadline.has_passed() {
                return state;
            }
            // Another thread, such as the one that watches the probation, may read what arrives before this one sees it.
            wait_readable(&self.reader, deadline.min(Deadline::after(LOOK)));
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.writer.generation()
    }

    /// Whether the parent has closed the end on which it receives. Then it is dead, or has given up on this process.
    pub(crate) fn is_deaf(&self) -> bool {
        !self.writer.is_alive()
    }

    /// Distinguishes the two cases: a parent that gives up sends `stop` first and keeps its writing end open, whereas a
    /// dead parent closes the link.
    pub(crate) fn is_dead(&self, time: Duration) -> bool {
        let state = self.wait_for(time, |state| state.given_up || state.ended);
        state.ended && !state.given_up
    }

    /// Sends a message, without waiting.
    pub(crate) fn send(&self, message: &FromChild) -> io::Result<()> {
        send(&self.writer.fd, &message.line())
    }

    /// Sends a message, and waits for room in the link until `deadline`.
    pub(crate) fn send_by(&self, message: &FromChild, deadline: Deadline) -> io::Result<()> {
        loop {
            match self.send(message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait_writable(&self.writer.fd, deadline) => {}
                result => return result,
            }
        }
    }

    /// Waits until the parent has ended, which closes its end of the link, for at most `time`. Leaves messages unread.
    pub(crate) fn wait_end(&self, time: Duration) -> io::Result<bool> {
        Ok(wait_hangup(&self.reader, Deadline::after(time))?)
    }

    /// Keeps the link open until this process or the parent ends, regardless of what the program drops.
    pub(crate) fn hold_open(&self) {
        hold_open(self.reader.clone());
        hold_open(self.writer.fd.clone());
    }
}

/// For an entry of the kind `drain`: the status pipe or socket of an older generation, which can be asked on it to end
/// its drain. It is passed from child to child.
impl Entry {
    pub(crate) fn generation(&self) -> u64 {
        self.key.drain_generation().unwrap_or_default()
    }

    /// A pipe without a reader reports an error, a socket without a peer a hangup (poll(2)).
    fn is_alive(&self) -> bool {
        matches!(wait_hangup(&self.fd, Deadline::after(Duration::ZERO)), Ok(false))
    }

    pub(crate) fn end_drain(&self, within: Duration) {
        // An error means that the generation has ended, and so has its drain.
        let _ = send(&self.fd, &FromChild::EndDrain(within).line());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net::socketpair;

    /// For example, another thread reads it just before the event loop waits.
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

    #[test]
    fn a_wait_sees_what_another_thread_has_read() {
        for _ in 0..20 {
            let (ours, parents) = socketpair(rustix::net::SocketType::STREAM, crate::sys::Mode::Nonblocking).unwrap();
            let ours = Arc::new(ours);
            let parent = ParentLink::new(1, ours.clone(), ours, Lines::default()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| while !parent.state().given_up {});
                scope.spawn(|| send(&parents, FromParent::Stop.line()).unwrap());
                let began = std::time::Instant::now();
                assert!(parent.wait_for(Duration::from_secs(60), |state| state.given_up).given_up);
                assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
            });
        }
    }
}
