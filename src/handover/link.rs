//! The parent's end of a link: the carrier of a handover, and everything that depends on it.
//!
//! A child inherits: it gets the descriptors across execve under their own numbers, and two pipes for everything else.
//! A process that takes over receives: one socket carries the manifest, the descriptors and the messages in both
//! directions. A child can also receive. The code above this file is the same in both cases.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};
use rustix::io::Errno;
use rustix::net::{shutdown, Shutdown, SocketType};

use super::entry::{Entry, FdRef};
use super::held_open::hold_open;
use super::lines::{send, FromParent, Lines, Read};
use super::manifest::{self, Origin};
use super::scm::{Sender, Sent, LAST_LINE};
use super::variable::Carrier;
use crate::error::Error;
use crate::sys::adopt::nonce;
use crate::sys::net;
use crate::sys::poll::{wait_hangup, wait_writable, Deadline};
use crate::sys::signal::without_sigpipe;
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

/// The data that is handed over.
pub(crate) struct Handover {
    pub(crate) origin: Origin,
    pub(crate) entries: Vec<Entry>,
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
    unsent: Unsent,
}

/// The data that is not sent yet.
enum Unsent {
    Nothing,
    /// For the pipe.
    Text(Vec<u8>),
    /// For the socket.
    Message(Sender<Arc<OwnedFd>>),
    /// For the socket, to be retried after a pause: see [`Sent::Crowded`].
    Crowded(Sender<Arc<OwnedFd>>),
}

/// The free space that a pipe needs beyond the manifest so that the last line fits: one page.
const ROOM: usize = 8 * 1024;

/// How long to wait when the kernel accepts no more descriptors. No event reports when it accepts them again.
const CROWDED: Duration = Duration::from_millis(10);

/// The descriptors that a spawned child gets besides stdin, stdout and stderr.
///
/// Drop this after the spawn. Otherwise this process keeps the child's ends open and never sees the child's end.
pub(crate) struct ChildEnd {
    pub(crate) carrier: Carrier,
    ends: Vec<OwnedFd>,
    inherited: Vec<Entry>,
}

impl ChildEnd {
    /// The descriptors that survive the execve.
    pub(crate) fn keep(&self) -> Vec<RawFd> {
        let inherited = self.inherited.iter().map(Entry::number);
        inherited.chain(self.ends.iter().map(AsRawFd::as_raw_fd)).collect()
    }
}

impl ChildLink {
    /// Creates the link to a child that inherits. As much of the manifest as fits is already written to the pipe, so
    /// that the child can usually proceed on its own if this process dies.
    pub(crate) fn pipes(handover: Handover) -> Result<(Self, ChildEnd), Error> {
        // Nonblocking at both ends: each process waits only in a poll with a deadline, never in a read or write.
        let (manifest_read, manifest_write) = net::pipe().map_err(Error::prepare("manifest pipe"))?;
        let (status_read, status_write) = net::pipe().map_err(Error::prepare("status pipe"))?;
        let Handover { origin, entries } = handover;
        let reader = FdRef::to(&manifest_read).map_err(Error::prepare("manifest pipe"))?;
        let writer = FdRef::to(&status_write).map_err(Error::prepare("status pipe"))?;
        let named = entries.iter().map(|entry| (entry.number(), entry));
        let text = manifest::encode(&origin, nonce(reader.inode), named).into_bytes();
        // A larger pipe only saves the child a wait. If the manifest does not fit, the rest is sent while this process
        // waits for `ready`.
        if text.len() + ROOM > 64 * 1024 {
            net::grow_pipe(&manifest_write, text.len() + ROOM);
        }
        let mut link = Self::new(manifest_write.into(), status_read.into(), Unsent::Text(text));
        link.send_some().map_err(Error::prepare("manifest"))?;
        let ends = vec![manifest_read, status_write];
        Ok((link, ChildEnd { carrier: Carrier { reader, writer }, ends, inherited: entries }))
    }

    /// Creates the link to a child that receives.
    pub(crate) fn socketpair(handover: Handover) -> Result<(Self, ChildEnd), Error> {
        let pair = net::socketpair(SocketType::STREAM, Mode::Nonblocking);
        let (ours, child_end) = pair.map_err(Error::prepare("handover socket"))?;
        let reader = FdRef::to(&child_end).map_err(Error::prepare("handover socket"))?;
        let mut link = Self::over_socket(ours.into(), handover, nonce(reader.inode))?;
        link.send_some().map_err(Error::prepare("manifest"))?;
        let carrier = Carrier { reader, writer: reader };
        Ok((link, ChildEnd { carrier, ends: vec![child_end], inherited: Vec::new() }))
    }

    /// Creates the link to the peer of a nonblocking socket. Sends nothing yet.
    pub(crate) fn socket(socket: Arc<OwnedFd>, handover: Handover) -> Result<Self, Error> {
        Self::over_socket(socket, handover, None)
    }

    fn over_socket(socket: Arc<OwnedFd>, handover: Handover, nonce: Option<u64>) -> Result<Self, Error> {
        let Handover { origin, entries } = handover;
        // Descriptor numbers mean nothing in the other process, so the manifest names descriptors by their order.
        let text = manifest::encode(&origin, nonce, (0..).zip(&entries)).into_bytes();
        let descriptors = entries.into_iter().map(|entry| entry.fd).collect();
        let sender = Sender::new(text, descriptors).map_err(Error::prepare("manifest"))?;
        Ok(Self::new(socket.clone(), socket, Unsent::Message(sender)))
    }

    fn new(to: Arc<OwnedFd>, from: Arc<OwnedFd>, unsent: Unsent) -> Self {
        Self { to, from: Some(from), lines: Lines::default(), unsent }
    }

    /// Sends as much as the kernel accepts now.
    pub(crate) fn send_some(&mut self) -> io::Result<()> {
        self.unsent = match mem::replace(&mut self.unsent, Unsent::Nothing) {
            Unsent::Nothing => Unsent::Nothing,
            Unsent::Text(mut text) => {
                let last_line = text.split_off(text.len().saturating_sub(LAST_LINE));
                write_some(&self.to, &mut text)?;
                let rest = text.len();
                text.extend(last_line);
                // The last line is sent separately, as over a socket: see `LAST_LINE`.
                if rest == 0 && wait_writable(&self.to, Deadline::after(Duration::ZERO)) {
                    write_some(&self.to, &mut text)?;
                }
                if text.is_empty() {
                    Unsent::Nothing
                } else {
                    Unsent::Text(text)
                }
            }
            Unsent::Message(mut sender) | Unsent::Crowded(mut sender) => match sender.step(&self.to)? {
                Sent::All => Unsent::Nothing,
                Sent::Blocked => Unsent::Message(sender),
                Sent::Crowded => Unsent::Crowded(sender),
            },
        };
        Ok(())
    }

    pub(crate) fn is_sent(&self) -> bool {
        matches!(self.unsent, Unsent::Nothing)
    }

    /// Returns what to poll for messages of the child and for room to send more, and when to retry in any case.
    pub(crate) fn poll_for(&self) -> (Vec<(BorrowedFd<'_>, PollFlags)>, Deadline) {
        let mut fds: Vec<_> = self.from.iter().map(|from| (from.as_fd(), PollFlags::IN)).collect();
        // poll(2) always reports the error of a pipe without a reader.
        let (room, again) = match self.unsent {
            Unsent::Nothing => (PollFlags::empty(), Deadline::NEVER),
            Unsent::Text(_) | Unsent::Message(_) => (PollFlags::OUT, Deadline::NEVER),
            Unsent::Crowded(_) => (PollFlags::empty(), Deadline::after(CROWDED)),
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

/// Writes as much as possible without waiting, and removes it from `unsent`.
fn write_some(fd: &OwnedFd, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        match without_sigpipe(|| rustix::io::write(fd, unsent)) {
            Ok(n) => drop(unsent.drain(..n)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Makes this end of a connection nonblocking. The other end keeps its own mode.
pub(crate) fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that was given up cannot send, but can see that this process is alive.
    #[test]
    fn giving_up_closes_one_direction() {
        let handover = || Handover { origin: Origin::default(), entries: Vec::new() };
        for (mut link, child_end) in [ChildLink::pipes(handover()).unwrap(), ChildLink::socketpair(handover()).unwrap()]
        {
            let (reader, writer) = (&child_end.ends[0], child_end.ends.last().unwrap());
            send(writer, "ready\n").unwrap();
            assert_eq!(link.next().unwrap(), Read::Line("ready".into()));
            link.send(FromParent::Stop).unwrap();
            link.stop_receiving();
            assert!(send(writer, "serving\n").is_err());
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
