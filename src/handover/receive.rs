//! The child's half of a handover: reads the manifest, and takes ownership of the descriptors that it names.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use super::ancestors::{Ancestors, ParentLink};
use super::blob;
use super::entry::{Entry, FdRef};
use super::lines::{Lines, COMMIT};
use super::manifest::{Manifest, Origin, MAX_ENTRIES, MAX_SIZE};
use super::scm::Receiver;
use crate::error::Error;
use crate::key::Kind;
use crate::logging;
use crate::sys::adopt::{check, nonce, Adopter};
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
        let is = |kind| move |entry: &Entry| entry.key.kind() == kind;
        let (older, entries): (_, Vec<_>) = self.into_entries()?.into_iter().partition(is(Kind::Drain));
        let (statuses, entries) = entries.into_iter().partition(is(Kind::DrainStatus));
        let ancestors = Ancestors { parent: Some(parent), older, statuses, of_1_1_1: None };
        Ok(Inherited { origin, is_takeover: false, entries, ancestors })
    }

    /// Takes ownership of the descriptors that the manifest names.
    pub(crate) fn into_entries(self) -> Result<Vec<Entry>, Error> {
        let Self { manifest: Manifest { entries: named, unknown, .. }, mut descriptors, .. } = self;
        let own = |entry: Entry<RawFd>| {
            let fd = descriptors.take(FdRef { fd: entry.fd, inode: entry.inode }).map_err(Error::socket(&entry.key))?;
            Ok(entry.with_fd(Arc::new(fd)))
        };
        let entries = named.into_iter().map(own).collect::<Result<_, Error>>()?;
        if let Descriptors::Inherited(adopter) = &descriptors {
            adopter.seal().map_err(Error::handover("descriptors"))?;
        }
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
    /// Takes ownership of the descriptor that the manifest means. Works once for each.
    fn take(&mut self, fd: FdRef) -> io::Result<OwnedFd> {
        match self {
            Self::Inherited(adopter) => adopter.own(fd.fd, None, Some(fd.inode)),
            Self::Received(received) => {
                let index = usize::try_from(fd.fd).map_err(|_| io::ErrorKind::InvalidInput)?;
                let owned = received.get_mut(index).and_then(Option::take);
                let owned =
                    owned.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the descriptor is missing"))?;
                check(owned.as_raw_fd(), None, Some(fd.inode))?;
                Ok(owned)
            }
        }
    }
}

/// Receives manifest and descriptors from a socket; or reads the manifest from a pipe, if the descriptors are already open
/// here, for `inherited` to adopt. If the text is not a manifest, it is returned as the inner error.
pub(crate) fn receive(
    link: &OwnedFd,
    inherited: Option<Adopter>,
    time: Duration,
) -> io::Result<Result<Arrived, String>> {
    let most = if inherited.is_some() { 0 } else { MAX_ENTRIES };
    let (text, rest, received) = wait(Receiver::new(MAX_SIZE, most), link, time)?;
    if !Manifest::is_meant(&text) {
        return Ok(Err(String::from_utf8_lossy(&text).into_owned()));
    }
    let received = || Descriptors::Received(received.into_iter().map(Some).collect());
    let descriptors = inherited.map_or_else(received, Descriptors::Inherited);
    Ok(Ok(Arrived { manifest: Manifest::decode(&text)?, descriptors, rest }))
}

/// Receives the data that is sent at the commit, without waiting. The manifest is the first descriptor, a sealed memory
/// file, so that everything fits into the buffer of the socket.
pub(crate) fn receive_late(socket: &OwnedFd) -> io::Result<Arrived> {
    let (.., received) = wait(Receiver::new(MAX_ENTRIES, MAX_ENTRIES), socket, Duration::ZERO)?;
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

/// Waits until everything has arrived. Returns the text, the bytes after it, and the descriptors.
fn wait(mut receiver: Receiver, fd: &OwnedFd, time: Duration) -> io::Result<(Vec<u8>, Vec<u8>, Vec<OwnedFd>)> {
    let deadline = Deadline::after(time);
    while !receiver.step(fd)? {
        if !wait_readable(fd, deadline) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the handover was not complete in time"));
        }
    }
    Ok(receiver.into_parts())
}
