//! The older generations that still run, and the links to them: to the parent, and to those before it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::entry::Entry;
use super::lines::{send, FromChild, FromParent, Lines, Read};
use crate::key::Key;
use crate::logging;
use crate::sys::adopt::identity;
use crate::sys::poll::{poll, wait_hangup, wait_readable, Deadline};

/// The generations before this one that lived when it began.
#[derive(Debug, Default)]
pub(crate) struct Ancestors {
    /// The one that handed over to this process.
    pub(crate) parent: Option<ParentLink>,
    /// Those before the parent, oldest first.
    pub(crate) older: Vec<DrainLink>,
}

impl Ancestors {
    /// Those that still run, oldest first.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &DrainLink> {
        let parent = self.parent.as_ref().map(|parent| &parent.writer);
        self.older.iter().chain(parent).filter(|link| link.is_alive())
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
    ended: AtomicBool,
}

/// What the parent has sent.
#[derive(Debug, Default)]
struct Received {
    lines: Lines,
    /// Not yet handled.
    messages: VecDeque<FromParent>,
    /// The parent has announced this process to the service manager.
    main: bool,
}

/// Whether the service manager listens to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    Yes,
    NotYet,
    /// The parent ended without announcing this process.
    Never,
}

impl ParentLink {
    /// The link over these two descriptors, which may be one. `lines` holds what was read with the manifest.
    pub(crate) fn new(generation: u64, reader: Arc<OwnedFd>, writer: Arc<OwnedFd>, lines: Lines) -> io::Result<Self> {
        let writer = DrainLink { generation, inode: identity(&writer)?, fd: writer };
        let received = Mutex::new(Received { lines, ..Received::default() });
        Ok(Self { reader, writer, received, ended: AtomicBool::new(false) })
    }

    /// The next message of the parent; none once it has ended.
    pub(crate) fn next_message(&self) -> Option<FromParent> {
        self.receive().messages.pop_front()
    }

    /// Returns whether the parent has announced this process to the service manager.
    pub(crate) fn announced(&self) -> Announced {
        match self.receive().main {
            true => Announced::Yes,
            false if self.has_ended() => Announced::Never,
            false => Announced::NotYet,
        }
    }

    /// Waits for the parent's announcement, or its end, at most `time`. Other messages stay in the queue.
    pub(crate) fn wait_announced(&self, time: Duration) -> Announced {
        let deadline = Deadline::after(time);
        loop {
            match self.announced() {
                Announced::NotYet => {}
                known => return known,
            }
            if !wait_readable(&self.reader, deadline) {
                return Announced::NotYet;
            }
        }
    }

    /// Reads what can be read now.
    fn receive(&self) -> MutexGuard<'_, Received> {
        let mut guard = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let received = &mut *guard;
        while !self.has_ended() {
            match received.lines.next(self.reader.as_fd()) {
                Ok(Read::Line(line)) => match FromParent::parse(&line) {
                    Some(FromParent::Main) => received.main = true,
                    Some(message) => received.messages.push_back(message),
                    // A message that only later versions know.
                    None => logging::debug!("the parent sent an unknown message {line:?}"),
                },
                Ok(Read::Wait) => break,
                Ok(Read::End | Read::Garbage(_)) | Err(_) => self.ended.store(true, Ordering::Relaxed),
            }
        }
        guard
    }

    /// Returns whether the end of the parent has been read.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
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

    pub(crate) fn end_drain(&self) {
        // An error means that it has ended, and its drain with it.
        let _ = send(&self.fd, &FromChild::EndDrain.line());
    }

    pub(crate) fn entry(&self) -> Entry {
        let (key, fd) = (Key::drain(self.generation), self.fd.clone());
        Entry { key, fd, inode: self.inode, file: None, unit: None }
    }
}
