//! The parent's end of a link: the carrier of a handover, and everything that depends on it.
//!
//! A child inherits: it gets the descriptors across execve under their own numbers, and two pipes for everything else.
//! A process that takes over receives: one socket carries the manifest, the descriptors and the messages in both
//! directions. A child can also receive. The code above this file is the same in both cases.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{shutdown, Shutdown, SocketType};

use super::entry::{Entry, FdRef};
use super::held_open::hold_open;
use super::lines::{send, FromParent, Lines, Read};
use super::manifest::{self, Origin};
use super::scm::{Sender, Sent, CROWDED};
use super::variable::Carrier;
use crate::sys::adopt::nonce;
use crate::sys::net;
use crate::sys::poll::{wait_hangup, wait_readable, Deadline};
use crate::sys::Mode;

/// How a child gets its handover. A process that takes over always gets it over its socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// Descriptors are inherited under their own numbers, and two pipes carry everything else.
    #[default]
    Pipes,
    /// One inherited socket carries everything. When the child starts, it has no other descriptor of its parent. Choose
    /// this if the program closes descriptors that it does not know, or if a wrapper counts them.
    Socket,
}

/// The parent's end. None of its methods blocks.
pub(crate) struct ChildLink {
    /// Carries the manifest, followed by messages. It stays open until this process ends, and the child notices the
    /// end.
    to: Arc<OwnedFd>,
    /// Carries the child's messages. The same as `to` if it is a socket. `None` once this process has given up on the
    /// child.
    from: Option<Arc<OwnedFd>>,
    lines: Lines,
    handover: Sender<Arc<OwnedFd>>,
    /// How much of the handover is sent.
    sent: Sent,
}

/// The space in bytes that a pipe needs beyond the manifest so that the last line fits: one free page, and the unused
/// rest of the manifest's last page.
const ROOM: usize = 8 * 1024;

/// The other end of the link, and the descriptors that a spawned child gets besides stdin, stdout and stderr: its ends of
/// the link, and the entries if it inherits.
///
/// Drop them after the spawn. Otherwise this process keeps the child's ends open and never sees the child's end.
pub(crate) type ChildEnd = (Carrier, Vec<Arc<OwnedFd>>);

impl ChildLink {
    /// Creates the link to a child that inherits.
    pub(crate) fn pipes(origin: &Origin, entries: Vec<Entry>) -> io::Result<(Self, ChildEnd)> {
        // Nonblocking at both ends: each process waits only in a poll with a deadline, never in a read or write.
        let (manifest_read, manifest_write) = net::pipe()?;
        let (status_read, status_write) = net::pipe()?;
        let carrier = Carrier { reader: FdRef::to(&manifest_read)?, writer: FdRef::to(&status_write)? };
        let named = entries.iter().map(|entry| (entry.number(), entry));
        let text = manifest::encode(origin, nonce(carrier.reader.inode), named);
        // A larger pipe only saves the child a wait. If the manifest does not fit, the rest is sent while this process
        // waits for `ready`.
        if text.len() + ROOM > 64 * 1024 {
            net::grow_pipe(&manifest_write, text.len() + ROOM);
        }
        let link = Self::new(manifest_write.into(), status_read.into(), text, Vec::new())?;
        let ends = [manifest_read, status_write].map(Arc::new).into_iter();
        Ok((link, (carrier, ends.chain(entries.into_iter().map(|entry| entry.fd)).collect())))
    }

    /// Creates the link to a child that receives.
    pub(crate) fn socketpair(origin: &Origin, entries: Vec<Entry>) -> io::Result<(Self, ChildEnd)> {
        let (ours, child_end) = net::socketpair(SocketType::STREAM, Mode::Nonblocking)?;
        let reader = FdRef::to(&child_end)?;
        let link = Self::socket(ours.into(), origin, entries, nonce(reader.inode))?;
        Ok((link, (Carrier { reader, writer: reader }, vec![child_end.into()])))
    }

    /// Creates the link to the peer of a nonblocking socket.
    pub(crate) fn socket(
        socket: Arc<OwnedFd>,
        origin: &Origin,
        entries: Vec<Entry>,
        nonce: Option<u64>,
    ) -> io::Result<Self> {
        // Descriptor numbers mean nothing in the other process, so the manifest names descriptors by their order.
        let text = manifest::encode(origin, nonce, (0..).zip(&entries));
        let descriptors = entries.into_iter().map(|entry| entry.fd).collect();
        Self::new(socket.clone(), socket, text, descriptors)
    }

    /// Sends nothing yet.
    fn new(to: Arc<OwnedFd>, from: Arc<OwnedFd>, text: String, descriptors: Vec<Arc<OwnedFd>>) -> io::Result<Self> {
        let mut handover = Sender::new(text.into_bytes(), descriptors)?;
        handover.is_pipe = !Arc::ptr_eq(&to, &from);
        Ok(Self { to, from: Some(from), lines: Lines::default(), handover, sent: Sent::Blocked })
    }

    /// Sends as much as the kernel accepts now.
    pub(crate) fn send_some(&mut self) -> io::Result<()> {
        self.sent = self.handover.step(&self.to)?;
        Ok(())
    }

    pub(crate) fn is_sent(&self) -> bool {
        self.sent == Sent::All
    }

    /// Returns what to poll for messages of the child and for room to send more, and when to retry in any case.
    pub(crate) fn poll_for(&self) -> (Vec<(BorrowedFd<'_>, PollFlags)>, Deadline) {
        let mut fds: Vec<_> = self.from.iter().map(|from| (from.as_fd(), PollFlags::IN)).collect();
        // poll(2) always reports the error of a pipe without a reader.
        let (room, again) = match self.sent {
            Sent::All => (PollFlags::empty(), Deadline::NEVER),
            Sent::Blocked => (PollFlags::OUT, Deadline::NEVER),
            Sent::Crowded => (PollFlags::empty(), Deadline::after(CROWDED)),
        };
        fds.push((self.to.as_fd(), room));
        (fds, again)
    }

    /// Sends a message to the child, without waiting.
    pub(crate) fn send(&self, message: FromParent) -> io::Result<()> {
        send(&self.to, message.line())
    }

    /// Makes the child's messages fail from now on, while the child can still see that this process is alive.
    pub(crate) fn stop_receiving(&mut self) {
        if let Some(from) = self.from.take() {
            // On a pipe this fails, but closing is enough.
            let _ = shutdown(&from, Shutdown::Read);
        }
    }

    /// Returns the next line that the child has sent.
    pub(crate) fn next(&mut self) -> io::Result<Read> {
        match &self.from {
            Some(from) => self.lines.next(from.as_fd()),
            None => Ok(Read::End),
        }
    }

    /// Waits for a message of the child, or for its end. Returns false if the deadline passes first.
    pub(crate) fn wait(&self, deadline: Deadline) -> bool {
        self.from.as_ref().is_some_and(|from| wait_readable(from, deadline))
    }

    /// Whether the child has closed its end of a pipe. Then it is dead, or will not serve.
    pub(crate) fn is_deaf(&self) -> bool {
        wait_hangup(&self.to, Deadline::after(Duration::ZERO)) != Ok(false)
    }

    pub(crate) fn hold_open(&self) {
        hold_open(self.to.clone());
    }

    /// Call this after a successful upgrade. Keeps the link open while this process lives, and returns the end on which
    /// later generations send.
    pub(crate) fn keep(&mut self) -> Option<(Arc<OwnedFd>, Lines)> {
        let from = self.from.take()?;
        hold_open(self.to.clone());
        hold_open(from.clone());
        Some((from, mem::take(&mut self.lines)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::COMMIT;
    use super::*;

    /// A child that was given up cannot send, but can see that this process is alive.
    #[test]
    fn giving_up_closes_one_direction() {
        let origin = Origin { generation: 1, ..Origin::default() };
        for create in [ChildLink::pipes, ChildLink::socketpair] {
            let (mut link, (_, child_end)) = create(&origin, Vec::new()).unwrap();
            link.send_some().unwrap();
            let (reader, writer) = (&child_end[0], child_end.last().unwrap());
            send(writer, "ready\n").unwrap();
            assert_eq!(link.next().unwrap(), Read::Line("ready".into()));
            link.send(FromParent::Stop).unwrap();
            link.stop_receiving();
            // A process that another test has just forked holds the pipe open until its execve(2).
            let deadline = Deadline::after(COMMIT);
            while send(writer, "serving\n").is_ok() {
                assert!(!deadline.has_passed());
                std::thread::yield_now();
            }
            assert_eq!(link.next().unwrap(), Read::End);
            let mut lines = Lines::default();
            let mut received = Vec::new();
            while let Read::Line(line) = lines.next(reader.as_fd()).unwrap() {
                received.push(line);
            }
            assert_eq!(received.last().unwrap(), "stop");
            assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::Wait);
        }
    }
}
