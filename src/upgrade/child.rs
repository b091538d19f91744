//! The child's half of an upgrade: steps 5 and 6.

use std::env;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::FileType;

use crate::error::Error;
use crate::generation::Generation;
use crate::handover::ancestors::ParentState;
use crate::handover::entry::FdRef;
use crate::handover::lines::{preview, send, FromChild, COMMIT, MAX_DROPPED};
use crate::handover::receive::{self, Inherited};
use crate::handover::variable::{is_handover, Carrier, VARIABLE};
use crate::handover::{from_1_1_1, greeting};
use crate::logging;
use crate::sys::adopt::{check, may_bring_a_manifest, Adopter};
use crate::sys::poll::Deadline;
use crate::sys::program::{is_secure, SECURE};
use crate::triggers::control::Trust;

/// How long reading the manifest may take. The parent has written it before the child started.
const MANIFEST: Duration = Duration::from_secs(10);

/// How many times, and after which delay, to reconnect when a takeover was cut off.
const ATTEMPTS: u32 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// Step 5: takes the handover of another generation. `None` means that this is a first generation.
pub(crate) fn inherit(
    take_over: Option<&Path>,
    trust: &Trust,
    app: Option<&str>,
    ready_timeout: Duration,
) -> Result<Option<Inherited>, Error> {
    let inherited = match from_environment()? {
        None => from_1_1_1::inherit()?,
        inherited => inherited,
    };
    match (inherited, take_over) {
        (None, Some(path)) => from_socket(path, trust, app, ready_timeout),
        (inherited, _) => Ok(inherited),
    }
}

/// Takes the handover of the parent that started this process. A handover that is meant for this process but cannot be
/// used is an error. Otherwise this process would become a first generation beside the one that serves.
fn from_environment() -> Result<Option<Inherited>, Error> {
    let value = env::var_os(VARIABLE);
    let Some(value) = value.as_ref().and_then(|value| value.to_str()).filter(|value| is_handover(value)) else {
        return Ok(None);
    };
    let invalid = |why: &'static str| Error::Handover { what: VARIABLE, source: io::Error::other(why) };
    let carrier = Carrier::parse(value).ok_or_else(|| invalid("unknown version or form"))?;
    let Carrier { reader: end, writer } = carrier;
    if !may_bring_a_manifest(end.fd) {
        return Ok(another_process());
    }
    let file_type = if carrier.is_socket() { FileType::Socket } else { FileType::Fifo };
    let is_here = |fd: FdRef| check(fd.fd, Some(file_type), Some(fd.inode)).is_ok();
    match (is_here(end), is_here(writer)) {
        (true, true) => {}
        (false, false) => return Ok(another_process()),
        _ => return Err(invalid("one of the two pipes is missing")),
    }
    if is_secure() {
        return Err(invalid(SECURE));
    }
    let Some(mut adopter) = Adopter::take() else { return Ok(None) };
    let failed = Error::handover("manifest");
    let mut adopt = |fd: FdRef| adopter.adopt(fd.fd, None, Some(fd.inode)).map(Arc::new).map_err(&failed);
    let reader = adopt(end)?;
    let writer = if carrier.is_socket() { reader.clone() } else { adopt(writer)? };
    let adopter = (!carrier.is_socket()).then_some(adopter);
    let received = receive::receive(&reader, adopter, MANIFEST).map_err(&failed)?;
    let arrived =
        received.map_err(|text| failed(io::Error::new(io::ErrorKind::InvalidData, preview(text.as_bytes()))))?;
    if !arrived.is_of(end) {
        return Ok(another_process());
    }
    arrived.unpack(reader, writer).map(Some)
}

fn another_process() -> Option<Inherited> {
    logging::debug!("the handover in the environment is another process's");
    None
}

/// Takes the handover of the process that listens at `path`, if there is one.
fn from_socket(
    path: &Path,
    trust: &Trust,
    app: Option<&str>,
    ready_timeout: Duration,
) -> Result<Option<Inherited>, Error> {
    let mut attempts = 0;
    while let Some(socket) = greeting::connect(path, &**trust, app)? {
        match receive::receive(&socket, None, ready_timeout) {
            Ok(Ok(arrived)) => {
                logging::info!("taking over from the process at {}", path.display());
                let socket = Arc::new(socket);
                let inherited = arrived.unpack(socket.clone(), socket)?;
                if let Some(other) = greeting::another_app(app, inherited.origin.app.as_deref()) {
                    let answer = format!("this is application {other:?}");
                    return Err(Error::NotHandedOver { path: path.to_owned(), answer });
                }
                return Ok(Some(Inherited { is_takeover: true, ..inherited }));
            }
            Ok(Err(answer)) => {
                let answer = answer.lines().next().unwrap_or_default().to_owned();
                return Err(Error::NotHandedOver { path: path.to_owned(), answer });
            }
            // The process has ended, or has turned this one away. If it has ended, no process listens now or soon (a
            // process closes its descriptors one after the other), and this is a first generation.
            Err(e) if attempts < ATTEMPTS && greeting::is_end(&e) => {
                attempts += 1;
                thread::sleep(ATTEMPT_PAUSE);
            }
            Err(e) => return Err(Error::handover("manifest")(e)),
        }
    }
    Ok(None)
}

/// Step 6, after the claims: closes unclaimed sockets, sends `ready`, and waits for the commit.
///
/// This process serves after the commit, or after the end of its parent, or after a living parent has received its
/// `serving`. In every other case it was given up and must not serve, because the parent may serve.
pub(crate) fn ready(generation: &Generation) -> Result<(), Error> {
    let dropped = generation.sockets.close_unclaimed()?;
    if let Some(pipe) = &generation.ancestors.of_1_1_1 {
        let pid_file = generation.pid_file.replace()?;
        generation.sockets.begin_serving()?;
        send(pipe, from_1_1_1::READY).map_err(|source| Error::Ready { source })?;
        pid_file.keep();
        // Not earlier, because the parent shares the mode, and its threads may accept with blocking calls.
        return generation.sockets.registry().make_nonblocking().map_err(|source| Error::Ready { source });
    }
    let Some(parent) = &generation.ancestors.parent else { return generation.pid_file.write() };
    for dropped in dropped.chunks(MAX_DROPPED) {
        // A parent that does not read this does not read `ready` either.
        let _ = parent.send_by(&FromChild::Dropped(dropped.to_vec()), Deadline::after(COMMIT));
    }
    let sent = parent.send(&FromChild::Ready);
    if sent.is_err() && !parent.is_dead(COMMIT) {
        return Err(Error::GivenUp);
    }
    let state = parent.wait_for(COMMIT, |state| state.given_up || state.committed || state.ended);
    match state {
        ParentState { given_up: true, .. } => return Err(Error::GivenUp),
        ParentState { committed: true, .. } => {}
        ParentState { ended: true, .. } => {
            logging::warn!("the parent ended before it could commit: serving without it")
        }
        // It is stopped or hangs, so it accepts nothing. When it continues, it reads `serving` first.
        _ => logging::warn!("the parent did not answer within {COMMIT:?}: serving without it"),
    }
    // If this process does not serve in the end, the file will name the parent again.
    let pid_file = generation.pid_file.replace()?;
    generation.sockets.begin_serving()?;
    // Send this before the first accept. If it cannot be sent, the parent has ended or has given up on this process.
    let sent = parent.send(&FromChild::Serving).is_ok();
    // The parent may have given up on this process just before that arrived. Or it has already sent the verdict, and
    // may end.
    let state = parent.state();
    if state.given_up || (!state.free && (!sent || parent.is_deaf()) && !parent.is_dead(COMMIT)) {
        return Err(Error::GivenUp);
    }
    parent.hold_open();
    pid_file.keep();
    Ok(())
}
