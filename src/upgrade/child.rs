//! The child's half of an upgrade: steps 5 and 6.

use std::env;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FileType;

use super::COMMIT;
use crate::error::Error;
use crate::generation::Generation;
use crate::handover::entry::FdRef;
use crate::handover::greeting;
use crate::handover::lines::{FromChild, FromParent, MAX_DROPPED};
use crate::handover::receive::{self, Inherited};
use crate::handover::variable::{Carrier, VARIABLE};
use crate::logging;
use crate::sys::adopt::Adopter;
use crate::sys::poll::{wait_readable, Deadline};
use crate::triggers::control::Trust;

/// How long the manifest may take, which the parent has written before the child began.
const MANIFEST: Duration = Duration::from_secs(10);

/// How often, and after what time, to connect again when a takeover was cut off.
const ATTEMPTS: u32 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// Step 5: takes what another generation hands over to this process. `None` means that this is a first generation.
pub(crate) fn inherit(
    take_over: Option<&Path>,
    trust: &Trust,
    ready_timeout: Duration,
) -> Result<Option<Inherited>, Error> {
    if let Some(inherited) = from_environment()? {
        return Ok(Some(inherited));
    }
    match take_over {
        Some(path) => from_socket(path, trust, ready_timeout),
        None => Ok(None),
    }
}

/// From the parent that started this process. Checks first that the environment means this process.
fn from_environment() -> Result<Option<Inherited>, Error> {
    let value = env::var_os(VARIABLE);
    let Some(carrier) = value.as_ref().and_then(|value| Carrier::parse(value.to_str()?)) else { return Ok(None) };
    let Some(mut adopter) = Adopter::take() else { return Ok(None) };
    let mut adopt = |end: FdRef, file_type| adopter.adopt(end.fd, Some(file_type), end.inode).map(Arc::new);
    let failed = |source| Error::Handover { what: "manifest", source };
    let (reader, writer, arrived) = match carrier {
        Carrier::Pipes { manifest, status } => {
            let (Ok(reader), Ok(writer)) = (adopt(manifest, FileType::Fifo), adopt(status, FileType::Fifo)) else {
                return Ok(not_meant());
            };
            let arrived = receive::read(&reader, adopter, MANIFEST).map_err(failed)?;
            if !arrived.is_of(manifest) {
                return Ok(not_meant());
            }
            (reader, writer, arrived)
        }
        Carrier::Socket(socket) => {
            let end = socket;
            let Ok(socket) = adopt(end, FileType::Socket) else { return Ok(not_meant()) };
            let arrived = receive::receive(&socket, MANIFEST).map_err(failed)?;
            let arrived = arrived.map_err(|answer| failed(io::Error::new(io::ErrorKind::InvalidData, answer)))?;
            if !arrived.is_of(end) {
                return Ok(not_meant());
            }
            (socket.clone(), socket, arrived)
        }
    };
    arrived.unpack(reader, writer).map(Some)
}

fn not_meant() -> Option<Inherited> {
    logging::debug!("the handover in the environment is another process's");
    None
}

/// From the process that listens at `path`, if one does.
fn from_socket(path: &Path, trust: &Trust, ready_timeout: Duration) -> Result<Option<Inherited>, Error> {
    let mut attempts = 0;
    while let Some(socket) = greeting::connect(path, &**trust)? {
        match receive::receive(&socket, ready_timeout) {
            Ok(Ok(arrived)) => {
                logging::info!("taking over from the process at {}", path.display());
                let socket = Arc::new(socket);
                return arrived.unpack(socket.clone(), socket).map(Some);
            }
            Ok(Err(answer)) => {
                let answer = answer.lines().next().unwrap_or_default().to_owned();
                return Err(Error::NotHandedOver { path: path.to_owned(), answer });
            }
            // The process has ended, or turned this one away. If it has ended, then now or soon nobody listens, because a
            // process closes its descriptors one after the other; and this is a first generation.
            Err(e) if attempts < ATTEMPTS && greeting::is_end(&e) => {
                attempts += 1;
                thread::sleep(ATTEMPT_PAUSE);
            }
            Err(source) => return Err(Error::Handover { what: "manifest", source }),
        }
    }
    Ok(None)
}

/// Step 6, after the claims: closes what is unclaimed, writes the PID file, sends `ready`, and waits for the commit. This
/// process serves when the parent has committed, or can do so no more; so the two never both believe that they serve.
pub(crate) fn ready(generation: &Generation) -> Result<(), Error> {
    let dropped = generation.sockets.close_unclaimed()?;
    let Some(parent) = &generation.ancestors.parent else { return generation.pid_file.write() };
    // If this process does not serve in the end, the file names the parent again.
    let pid_file = generation.pid_file.replace()?;
    for dropped in dropped.chunks(MAX_DROPPED) {
        // A parent that does not read this does not read `ready` either.
        let _ = parent.send_by(&FromChild::Dropped(dropped.to_vec()), Deadline::after(COMMIT));
    }
    match parent.send(&FromChild::Ready) {
        // The parent is dead: this process has the listeners. Or it has turned this one away; then its last message says so.
        Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
        other => other.map_err(|source| Error::Ready { source })?,
    }
    let (mut deadline, mut unanswered) = (Deadline::after(COMMIT), false);
    loop {
        match parent.next_message() {
            Some(FromParent::Commit) => {}
            // A child would have been killed. But a process that takes over belongs to another supervisor.
            Some(FromParent::Stop) => return Err(Error::GivenUp),
            // Not before the verdict.
            Some(FromParent::Main) => continue,
            None if parent.has_ended() => {
                logging::warn!("the parent ended before it could commit: serving without it");
                generation.sockets.begin_serving()?;
                pid_file.keep();
                return Ok(());
            }
            None if wait_readable(&parent.reader, deadline) => continue,
            None if unanswered => return Err(Error::GivenUp),
            // It is stopped or hangs, and so accepts nothing. When it continues it reads this first.
            None => logging::warn!("the parent did not answer within {COMMIT:?}: serving without it"),
        }
        generation.sockets.begin_serving()?;
        // Before the first accept: if this fails, the parent has ended, or it takes the commit back and says so.
        match parent.send(&FromChild::Serving) {
            Ok(()) => {
                pid_file.keep();
                return Ok(());
            }
            Err(e) => logging::debug!("cannot tell the parent that this process serves: {e}"),
        }
        (unanswered, deadline) = (true, Deadline::after(COMMIT));
    }
}
