//! The child's half of a handover: reads the manifest, and takes ownership of the descriptors that it names.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::io::Errno;

use super::ancestors::{Ancestors, DrainLink, ParentLink};
use super::blob;
use super::entry::{Entry, FdRef};
use super::lines::{Lines, COMMIT};
use super::manifest::{malformed, Manifest, Origin, MAX_ENTRIES, MAX_SIZE};
use super::scm::{self, Receiver};
use crate::error::Error;
use crate::key::Kind;
use crate::logging;
use crate::sys::adopt::{is_identical, nonce, Adopter};
use crate::sys::poll::{wait_readable, Deadline};

/// The data received from the parent, before any of it is used.
pub(crate) struct Arrived {
    manifest: Manifest,
    descriptors: Descriptors,
    /// The bytes that were read after the manifest.
    rest: Vec<u8>,
}

/// The handover that a child has received from its parent. Empty in a first generation.
#[derive(Default)]
pub(crate) struct Inherited {
    /// The identification of the parent.
    pub(crate) origin: Origin,
    /// This process takes over. Its parent did not start it.
    pub(crate) is_takeover: bool,
    pub(crate) entries: Vec<Entry>,
    pub(crate) ancestors: Ancestors,
}

impl Arrived {
    /// Whether the variable means this manifest, if the inode in the variable has not already verified that.
    pub(crate) fn is_of(&self, end: FdRef) -> bool {
        nonce(end.inode).is_none_or(|nonce| self.manifest.nonce == Some(nonce))
    }

    /// Takes ownership of the descriptors that the manifest names. The link to the parent consists of `reader` and
    /// `writer`, which may be one socket.
    pub(crate) fn unpack(self, reader: Arc<OwnedFd>, writer: Arc<OwnedFd>) -> Result<Inherited, Error> {
        let (origin, lines) = (self.manifest.origin.clone(), Lines::with(self.rest.clone()));
        let parent =
            ParentLink::new(origin.generation, reader, writer, lines).map_err(Error::handover("status link"))?;
        // A process that comes too late must not even hold the sockets.
        if parent.state().given_up || (parent.is_deaf() && !parent.is_dead(COMMIT)) {
            return Err(Error::GivenUp);
        }
        let (mut older, mut statuses) = (Vec::new(), Vec::new());
        let mut entries = self.into_entries()?;
        entries.retain(|entry| {
            let Some(generation) = entry.key.drain_generation() else { return true };
            if entry.key.kind() == Kind::DrainStatus {
                statuses.push(entry.clone());
            } else {
                older.push(DrainLink { generation, inode: entry.inode, fd: entry.fd.clone() });
            }
            false
        });
        Ok(Inherited {
            origin,
            is_takeover: false,
            entries,
            ancestors: Ancestors { parent: Some(parent), older, statuses, of_1_1_1: None },
        })
    }

    /// Takes ownership of the descriptors that the manifest names.
    pub(crate) fn into_entries(self) -> Result<Vec<Entry>, Error> {
        let Self { manifest: Manifest { entries: named, unknown, .. }, mut descriptors, .. } = self;
        let own = |entry: Entry<RawFd>| {
            let fd = descriptors.take(entry.fd_ref()).map_err(Error::socket(&entry.key))?;
            Ok(entry.with_fd(Arc::new(fd)))
        };
        let entries = named.into_iter().map(own).collect::<Result<_, Error>>()?;
        descriptors.seal().map_err(Error::handover("descriptors"))?;
        for fd in unknown {
            // Take ownership to close it, because this version cannot use it.
            drop(descriptors.take(fd));
            logging::info!("closed a descriptor of an unknown kind");
        }
        Ok(entries)
    }
}

/// The descriptors that a manifest names.
enum Descriptors {
    /// They were inherited and are open under their own numbers.
    Inherited(Adopter),
    /// They were received with the manifest, in its order.
    Received(Vec<Option<OwnedFd>>),
}

impl Descriptors {
    /// Sets close-on-exec on those that were taken.
    fn seal(&self) -> io::Result<()> {
        match self {
            Self::Inherited(adopter) => adopter.seal(),
            Self::Received(_) => Ok(()),
        }
    }

    /// Takes ownership of the descriptor that the manifest means. Works once for each.
    fn take(&mut self, fd: FdRef) -> io::Result<OwnedFd> {
        match self {
            Self::Inherited(adopter) => adopter.own(fd.fd, None, Some(fd.inode)),
            Self::Received(received) => {
                let index = usize::try_from(fd.fd).map_err(|_| io::ErrorKind::InvalidInput)?;
                let owned = received.get_mut(index).and_then(Option::take);
                let owned =
                    owned.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the descriptor is missing"))?;
                if !is_identical(&owned, fd.inode)? {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the descriptor is another file"));
                }
                Ok(owned)
            }
        }
    }
}

/// Reads the manifest from its pipe. The descriptors are already open here, for `adopter` to adopt.
pub(crate) fn read(pipe: &OwnedFd, adopter: Adopter, time: Duration) -> io::Result<Arrived> {
    let mut text = Vec::new();
    let deadline = Deadline::after(time);
    // The position up to which the last line was searched for. It may arrive in two pieces.
    let mut searched: usize = 0;
    let length = loop {
        if let Some(length) = scm::length(&text, searched.saturating_sub(scm::END.len())) {
            break length;
        }
        if text.len() > MAX_SIZE {
            return Err(malformed(0, "too large"));
        }
        searched = text.len();
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

/// Receives manifest and descriptors from a socket. If the text is not a manifest, it is returned as the inner error.
pub(crate) fn receive(socket: &OwnedFd, time: Duration) -> io::Result<Result<Arrived, String>> {
    let deadline = Deadline::after(time);
    let mut receiver = Receiver::new(MAX_SIZE, MAX_ENTRIES);
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

/// Receives the data that is sent at the commit, without waiting. The manifest is the first descriptor, a sealed memory
/// file, so that everything fits into the buffer of the socket.
pub(crate) fn receive_late(socket: &OwnedFd) -> io::Result<Arrived> {
    let mut receiver = Receiver::new(MAX_ENTRIES, MAX_ENTRIES);
    if !receiver.step(socket)? {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "not everything was sent"));
    }
    let (_, _, received) = receiver.into_parts();
    with_text(received)
}

/// Received together: the text of a manifest in a sealed memory file, and the descriptors that it names.
pub(crate) fn with_text(received: Vec<OwnedFd>) -> io::Result<Arrived> {
    let mut received = received.into_iter();
    let text = received.next().ok_or(io::ErrorKind::InvalidData)?;
    let text = blob::open(text, MAX_SIZE as u64)?;
    let descriptors = Descriptors::Received(received.map(Some).collect());
    Ok(Arrived { manifest: Manifest::decode(&text)?, descriptors, rest: Vec::new() })
}

fn wait_until(fd: &OwnedFd, deadline: Deadline) -> io::Result<()> {
    if wait_readable(fd, deadline) {
        return Ok(());
    }
    Err(io::ErrorKind::TimedOut.into())
}
