//! What carries a handover, and all that depends on it.
//!
//! A child inherits: it gets the descriptors across execve under their own numbers, and two pipes for the rest. A
//! stranger receives: one socket carries the manifest, the descriptors and the lines both ways; a child can be fed in
//! this way too. Everything above this file is the same for both.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::fs::{fcntl_getfl, fcntl_setfl, fstat, OFlags};
use rustix::io::Errno;
use rustix::net::{shutdown, socketpair, AddressFamily, Shutdown, SocketFlags, SocketType};
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};

use super::lines::{send, FromParent, Lines, Read};
use super::manifest::{Manifest, Slot, MAX_ENTRIES, MAX_SIZE};
use super::scm::{Limits, Receiver, Sender, Sent};
use super::variable::{Carrier, FdRef};
use crate::error::Error;
use crate::sys::adopt::Adopter;
use crate::sys::poll::{wait_readable, Deadline};
use crate::sys::signal::without_sigpipe;

/// How a child gets its handover. A process that takes over always gets it through its socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// Descriptors are inherited under their own numbers, two pipes carry the rest.
    #[default]
    Pipes,
    /// One inherited socket carries everything. The child holds nothing else of its parent's when it starts, which suits
    /// a program that closes, or a wrapper that counts, the descriptors that it does not know.
    Socket,
}

/// What is handed over: the descriptors stand in the order of the manifest's entries, which name them by their numbers
/// in this process.
pub(crate) struct Handover {
    pub(crate) manifest: Manifest,
    /// Shared with their owners, so that they keep their numbers until the child has its own copies.
    pub(crate) descriptors: Vec<Arc<OwnedFd>>,
}

// ---- the parent's end -------------------------------------------------------------------------------------------

/// The parent's end. Nothing in it ever waits.
pub(crate) struct ChildLink {
    /// The manifest, and words after it. It stays open until this process ends, which the child sees.
    pub(crate) to: Arc<OwnedFd>,
    /// What the child says. The same as `to` if it is a socket.
    pub(crate) from: Arc<OwnedFd>,
    pub(crate) lines: Lines,
    unsent: Unsent,
}

/// What did not go out yet.
enum Unsent {
    Nothing,
    /// Into the pipe.
    Text(Vec<u8>),
    /// Into the socket.
    Message(Sender<Arc<OwnedFd>>),
    /// Into the socket, but not now: see [`Sent::Crowded`].
    Crowded(Sender<Arc<OwnedFd>>),
}

/// How long to wait when the kernel takes no more descriptors; nothing tells when it does.
const CROWDED: Duration = Duration::from_millis(10);

/// What a spawned child holds besides stdin, stdout and stderr. Dropped after the spawn: else the link would not end
/// with the child.
pub(crate) struct ChildEnd {
    pub(crate) carrier: Carrier,
    /// Where the child reports before it runs the new program.
    pub(crate) status: RawFd,
    ends: Vec<OwnedFd>,
    inherited: Vec<Arc<OwnedFd>>,
}

impl ChildEnd {
    /// What survives the execve.
    pub(crate) fn keep(&self) -> Vec<RawFd> {
        let inherited = self.inherited.iter().map(|fd| fd.as_raw_fd());
        inherited.chain(self.ends.iter().map(AsRawFd::as_raw_fd)).collect()
    }
}

impl ChildLink {
    /// To a child that inherits. As much of the manifest as fits is in its pipe already, so that as a rule the child
    /// needs nothing more from us to decide by itself, should we die.
    pub(crate) fn pipes(handover: Handover) -> Result<(Self, ChildEnd), Error> {
        // Nonblocking at both ends: neither process ever waits in a read or write, only in a poll with a deadline.
        let pipe = || pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from);
        let (manifest_read, manifest_write) = pipe().map_err(prepare("manifest pipe"))?;
        let (status_read, status_write) = pipe().map_err(prepare("status pipe"))?;
        let text = handover.manifest.encode().into_bytes();
        // A larger pipe only saves the child a wait; without it the rest goes while we wait for `ready`.
        if text.len() > 64 * 1024 {
            let _ = fcntl_setpipe_size(&manifest_write, text.len());
        }
        let manifest = named(&manifest_read).map_err(prepare("manifest pipe"))?;
        let status = named(&status_write).map_err(prepare("status pipe"))?;
        let mut link = Self::new(manifest_write.into(), status_read.into(), Unsent::Text(text));
        link.send_some().map_err(prepare("manifest"))?;
        let carrier = Carrier::Pipes { manifest, status };
        let ends = vec![manifest_read, status_write];
        Ok((link, ChildEnd { carrier, status: status.fd, ends, inherited: handover.descriptors }))
    }

    /// To a child that receives.
    pub(crate) fn socketpair(handover: Handover) -> Result<(Self, ChildEnd), Error> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, child_end) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| prepare("handover socket")(e.into()))?;
        let socket = named(&child_end).map_err(prepare("handover socket"))?;
        let mut link = Self::socket(ours.into(), handover)?;
        link.send_some().map_err(prepare("manifest"))?;
        Ok((
            link,
            ChildEnd {
                carrier: Carrier::Socket(socket),
                status: socket.fd,
                ends: vec![child_end],
                inherited: Vec::new(),
            },
        ))
    }

    /// To whoever is at the other end of a nonblocking socket. Nothing is sent yet.
    pub(crate) fn socket(socket: Arc<OwnedFd>, handover: Handover) -> Result<Self, Error> {
        let Handover { mut manifest, descriptors } = handover;
        for (index, entry) in manifest.entries.iter_mut().enumerate() {
            // Numbers mean nothing in the other process.
            entry.slot.number = index as u32;
        }
        let sender = Sender::new(manifest.encode().into_bytes(), descriptors).map_err(prepare("manifest"))?;
        Ok(Self::new(socket.clone(), socket, Unsent::Message(sender)))
    }

    fn new(to: Arc<OwnedFd>, from: Arc<OwnedFd>, unsent: Unsent) -> Self {
        Self { to, from, lines: Lines::default(), unsent }
    }

    /// Sends as much as goes out now.
    pub(crate) fn send_some(&mut self) -> io::Result<()> {
        self.unsent = match mem::replace(&mut self.unsent, Unsent::Nothing) {
            Unsent::Nothing => Unsent::Nothing,
            Unsent::Text(mut text) => {
                write_some(&self.to, &mut text)?;
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

    /// What a poll must look at for news of the child, or for room to send more; and when to try again in any case.
    pub(crate) fn poll_for(&self) -> (Vec<(BorrowedFd<'_>, PollFlags)>, Deadline) {
        let mut fds = vec![(self.from.as_fd(), PollFlags::IN)];
        match self.unsent {
            Unsent::Nothing => {}
            Unsent::Text(_) | Unsent::Message(_) => fds.push((self.to.as_fd(), PollFlags::OUT)),
            Unsent::Crowded(_) => return (fds, Deadline::after(CROWDED)),
        }
        (fds, Deadline::NEVER)
    }

    /// Says something to the child; never waits.
    pub(crate) fn say(&self, word: FromParent) -> io::Result<()> {
        send(&self.to, word.line())
    }

    /// Over a socket: from here on the child gets an error for whatever it says. What it has said before is still to be
    /// read, and the kernel lets no word fall between the two.
    pub(crate) fn stop_hearing(&self) {
        // An error for a pipe, whose child is killed and needs none.
        let _ = shutdown(&self.from, Shutdown::Read);
    }

    /// The next line that the child has said.
    pub(crate) fn next(&mut self) -> io::Result<Read> {
        self.lines.next(self.from.as_fd())
    }
}

fn prepare(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Prepare { what, source }
}

fn named(fd: &OwnedFd) -> io::Result<FdRef> {
    Ok(FdRef { fd: fd.as_raw_fd(), inode: fstat(fd)?.st_ino })
}

/// Writes as much as goes in without waiting, and removes it from `unsent`.
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

// ---- the child's end --------------------------------------------------------------------------------------------

/// What came from the parent, before anything in it was used.
pub(crate) struct Arrived {
    pub(crate) manifest: Manifest,
    pub(crate) descriptors: Descriptors,
    /// What the parent has said after the manifest already.
    pub(crate) rest: Vec<u8>,
}

/// The descriptors that a manifest names.
pub(crate) enum Descriptors {
    /// They are open here under their own numbers.
    Inherited(Adopter),
    /// They came with the manifest, in its order.
    Received(Vec<Option<OwnedFd>>),
}

impl Descriptors {
    /// The one that the manifest means by `slot`, close-on-exec; each can be had once.
    pub(crate) fn take(&mut self, slot: Slot) -> io::Result<OwnedFd> {
        match self {
            Self::Inherited(adopter) => {
                let number = slot.number.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
                adopter.adopt(number, None, slot.inode)
            }
            Self::Received(received) => {
                let fd = received.get_mut(slot.number as usize).and_then(Option::take);
                let fd = fd.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the descriptor did not come"))?;
                if fstat(&fd)?.st_ino != slot.inode {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the descriptor is another file"));
                }
                Ok(fd)
            }
        }
    }
}

/// Reads the manifest from its pipe. The descriptors are here already, for `adopter` to adopt.
pub(crate) fn read(pipe: &OwnedFd, adopter: Adopter, time: Duration) -> io::Result<Arrived> {
    let mut text = Vec::new();
    let deadline = Deadline::after(time);
    let length = loop {
        if let Some(length) = Manifest::length(&text)? {
            break length;
        }
        text.reserve(1 << 16);
        match rustix::io::read(pipe, spare_capacity(&mut text)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_until(pipe, deadline)?,
            Err(e) => return Err(e.into()),
        }
    };
    let rest = text.split_off(length);
    Ok(Arrived { manifest: Manifest::decode(&text)?, descriptors: Descriptors::Inherited(adopter), rest })
}

/// Receives manifest and descriptors from a socket. What is no manifest is given back as the text that it is.
pub(crate) fn receive(socket: &OwnedFd, time: Duration) -> io::Result<Result<Arrived, String>> {
    let deadline = Deadline::after(time);
    let mut receiver = Receiver::new(Limits { bytes: MAX_SIZE, descriptors: MAX_ENTRIES });
    while !receiver.step(socket)? {
        wait_until(socket, deadline)?;
    }
    let (text, rest, received) = receiver.into_parts();
    if !Manifest::is_meant(&text) {
        return Ok(Err(String::from_utf8_lossy(&text).into_owned()));
    }
    let manifest = Manifest::decode(&text)?;
    let received = received.into_iter().map(Some).collect();
    Ok(Ok(Arrived { manifest, descriptors: Descriptors::Received(received), rest }))
}

fn wait_until(fd: &OwnedFd, deadline: Deadline) -> io::Result<()> {
    if wait_readable(fd, deadline) {
        return Ok(());
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// For the end of a connection that this process accepted or made. Its other end is not touched by it.
pub(crate) fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    /// Whether a late `serving` counts is decided once, for both.
    #[test]
    fn a_word_is_heard_or_refused() {
        for _ in 0..2000 {
            let handover = Handover { manifest: Manifest::default(), descriptors: Vec::new() };
            let (mut link, child_end) = ChildLink::socketpair(handover).unwrap();
            let begin = Barrier::new(2);
            thread::scope(|scope| {
                let child = scope.spawn(|| {
                    begin.wait();
                    send(&child_end.ends[0], "serving\n").is_ok()
                });
                begin.wait();
                link.stop_hearing();
                let read = link.next().unwrap();
                let told = child.join().unwrap();
                assert_eq!(read, if told { Read::Line("serving".into()) } else { Read::End });
            });
        }
    }
}
