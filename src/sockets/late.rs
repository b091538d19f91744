//! The handover at the commit: state and descriptors that must be as current as the commit itself.
//!
//! The child already runs, so they cannot be inherited. They are sent over a socket pair that is created with the
//! handover: a text in the form of the manifest, as a sealed memory file, and the descriptors. The parent sends them
//! after it has paused and before `commit`, so a child that has received `commit` can receive all of them without
//! waiting.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::SocketType;

use super::producer::Producer;
use super::registry::Registry;
use crate::error::Error;
use crate::handover::blob;
use crate::handover::entry::Entry;
use crate::handover::manifest::{self, Origin};
use crate::handover::scm::{Sender, Sent, CROWDED, DESCRIPTORS_PER_MESSAGE};
use crate::key::Key;
use crate::sys::{net, Mode};

/// How long all callbacks and the sending may take together. The child waits five seconds for the commit.
pub(super) const TIME: Duration = Duration::from_secs(3);

/// The size of the send buffer that is requested, in bytes.
const BUFFER: usize = 8 << 20;

/// Everything that must be sent at the commit of one upgrade.
#[derive(Debug)]
pub(crate) struct Late {
    socket: OwnedFd,
    producers: Vec<Producer>,
    /// The descriptors that are part of the handover already. Their inodes would not identify them, because descriptors
    /// without a file (eventfd(2) and the like) share one.
    known: Vec<Arc<OwnedFd>>,
}

impl Late {
    /// Adds the child's end to `entries`.
    pub(super) fn new(producers: Vec<Producer>, entries: &mut Vec<Entry>) -> io::Result<Self> {
        let (socket, child_end) = net::socketpair(SocketType::STREAM, Mode::Nonblocking)?;
        // The largest buffer that the system allows (net.core.wmem_max), because the child reads only after the commit.
        let _ = set_socket_send_buffer_size(&socket, BUFFER);
        let known = entries.iter().map(|entry| entry.fd.clone()).collect();
        entries.push(Entry::new(Key::late(), child_end)?);
        Ok(Self { socket, producers, known })
    }

    /// Calls the callbacks, and sends their results and everything that was passed since the upgrade began.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if a callback fails, panics or takes too long; [`Error::Prepare`] if it cannot be sent.
    pub(super) fn send(self, registry: &Mutex<Registry>, generation: u64) -> Result<(), Error> {
        let end = Instant::now() + TIME;
        let mut entries = produce(self.producers, end)?;
        entries.extend(registry.lock().unwrap_or_else(PoisonError::into_inner).passed_since(&self.known));
        let packed = pack(entries, generation);
        packed.and_then(|packed| send(&self.socket, packed, end)).map_err(Error::prepare("state at the commit"))
    }
}

/// Returns the text that describes the entries, in the form of a manifest, and their descriptors in order.
pub(super) fn pack(entries: Vec<Entry>, generation: u64) -> io::Result<Vec<Arc<OwnedFd>>> {
    let text = manifest::encode(&Origin { generation, ..Origin::default() }, None, (0..).zip(&entries));
    let text = blob::seal(text.as_bytes(), manifest::MAX_SIZE as u64)?;
    Ok([Arc::new(text)].into_iter().chain(entries.into_iter().map(|entry| entry.fd)).collect())
}

/// Calls the callbacks in a separate thread, so that one that hangs cannot keep this process from serving.
pub(super) fn produce(producers: Vec<Producer>, end: Instant) -> Result<Vec<Entry>, Error> {
    let (results, produced) = mpsc::channel();
    let called = producers.clone();
    let call = move || called.iter().map(Producer::produce).try_for_each(|entry| results.send(entry).map_err(drop));
    thread::Builder::new()
        .name("ecdysis-state".into())
        .spawn(call)
        .map_err(Error::prepare("thread for the state at the commit"))?;
    let wait = |producer: &Producer| {
        let entry = produced.recv_timeout(end.saturating_duration_since(Instant::now()));
        entry.map_err(|_| producer.failed(format!("the callbacks at the commit took longer than {TIME:?}")))?
    };
    producers.iter().map(wait).collect()
}

/// Sends descriptors with as few bytes as possible, because everything must fit into the socket's buffer.
fn send(socket: &OwnedFd, descriptors: Vec<Arc<OwnedFd>>, end: Instant) -> io::Result<()> {
    let bytes = "-".repeat(descriptors.len().div_ceil(DESCRIPTORS_PER_MESSAGE)) + "\nend\n";
    let mut sender = Sender::new(bytes.into_bytes(), descriptors)?;
    loop {
        match sender.step(socket)? {
            Sent::All => return Ok(()),
            Sent::Crowded if Instant::now() < end => thread::sleep(CROWDED),
            // The child reads only after `commit`, so a full socket stays full.
            Sent::Blocked | Sent::Crowded => {
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, "more than a socket's buffer can hold"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The usual limit on a socket's buffer (net.core.wmem_max) is the kernel's default size.
    #[test]
    fn the_default_buffer_holds_thousands_of_descriptors() {
        if !rustix::process::geteuid().is_root() {
            // For users other than root, descriptors in flight count against the limit on open files.
            return;
        }
        let (socket, _child_end) = net::socketpair(SocketType::STREAM, Mode::Nonblocking).unwrap();
        let null: Arc<OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        send(&socket, vec![null.clone(); 10_000], Instant::now() + TIME).unwrap();
        let error = send(&socket, vec![null; 400_000], Instant::now() + TIME).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }
}
