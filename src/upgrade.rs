//! One upgrade, in order. The parent's half first, then the child's; the steps are numbered as in the crate's tour.
//!
//! Step 1, registering, is `sockets.rs`: by the time a trigger fires every socket is there.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::FileType;
use rustix::process::Signal;

use crate::builder::Config;
use crate::error::Error;
use crate::event::Event;
use crate::exit::Upgraded;
use crate::handover::ancestors::DrainLink;
use crate::handover::entry::FdRef;
use crate::handover::lines::{preview, send, FromChild, FromParent, Lines, Read};
use crate::handover::link::{ChildLink, Handover, Transport};
use crate::handover::receive::{self, Inherited};
use crate::handover::variable::{Carrier, VARIABLE};
use crate::pid_file;
use crate::service::Core;
use crate::shutdown::{End, EndSignal, State};
use crate::sys::adopt::Adopter;
use crate::sys::child::{Parentage, Spawned, LOOK};
use crate::sys::peer::peer_pidfd;
use crate::sys::poll::{wait_readable, Deadline};
use crate::sys::spawn::{explain, spawn, Plan};
use crate::takeover::{self, TakeoverRequest};
use crate::trigger::{Sockets, Triggers};

/// How long a child that has closed its status pipe may take to end by itself.
const ENDING: Duration = Duration::from_millis(200);

/// How long the manifest may take, which the parent has written before the child began.
const MANIFEST: Duration = Duration::from_secs(10);

/// How often, and after what time, to look whether anybody still listens when a takeover was cut off.
const LOOK_AGAIN: u32 = 5;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// How long the parent may take to answer `ready`. It answers at once, unless it is stopped or dead.
const COMMIT: Duration = Duration::from_secs(5);

// ---- the parent -------------------------------------------------------------------------------------------------

/// Replaces this process: steps 2, 3, 4 and 7. By a child of its own, or by the process that has asked to take over. On
/// an error everything is as it was, and the child is gone.
pub(crate) fn upgrade(
    core: &Core,
    taker: Option<&TakeoverRequest>,
    triggers: &mut Triggers,
    since: Instant,
) -> Result<Upgraded, Error> {
    core.emit(&Event::Upgrading);
    let handover = pack(core)?;
    let mut child = match taker {
        None => start(core, handover)?,
        Some(taker) => begin(core, taker, handover)?,
    };
    wait_ready(&mut child, core, triggers, since)?;
    commit(child, core, triggers, since)
}

/// Step 2: everything that is handed over, whatever carries it.
fn pack(core: &Core) -> Result<Handover, Error> {
    let mut entries = core.sockets.snapshot()?;
    entries.extend(core.ancestors.draining().map(DrainLink::entry));
    Ok(Handover { generation: core.generation, entries })
}

/// Step 3 with a child. What needs memory is built before it exists.
fn start(core: &Core, handover: Handover) -> Result<Child<'_>, Error> {
    let (link, child_end) = match core.config.transport {
        Transport::Pipes => ChildLink::pipes(handover)?,
        Transport::Socket => ChildLink::socketpair(handover)?,
    };
    let prepare = |what| move |source| Error::Prepare { what, source };
    let program = &core.program;
    let plan = Plan {
        program: program.path_c().map_err(prepare("program"))?,
        argv: program.argv().map_err(prepare("arguments"))?,
        envp: program.envp(&child_end.carrier.value()).map_err(prepare("environment"))?,
        directory: program.directory_c().map_err(prepare("directory"))?,
        keep: child_end.keep(),
        status: child_end.status,
        attributes: core.attributes.clone(),
        // systemd waits at a stop for its own children only; the others it kills at once (`unit_kill_context`).
        parent: if core.is_main() { Parentage::OurParent } else { Parentage::Us },
    };
    let spawned =
        spawn(plan, core.config.spawn).map_err(|source| Error::Spawn { program: program.path.clone(), source })?;
    // Else the link would not end with the child.
    drop(child_end);
    let child = Child { process: Process { core, who: Who::Child(spawned), armed: true }, link };
    core.emit(&Event::Spawned { pid: child.process.pid() });
    Ok(child)
}

/// Step 3 with a process that runs already.
fn begin<'a>(core: &'a Core, taker: &TakeoverRequest, handover: Handover) -> Result<Child<'a>, Error> {
    let socket = taker.begin();
    let pid = taker.peer.pid.unwrap_or(0);
    log::info!("takeover pid={pid} uid={}", taker.peer.uid);
    let who = Who::Stranger { pid, pidfd: peer_pidfd(&socket), socket: socket.clone() };
    let process = Process { core, who, armed: true };
    let mut link = ChildLink::socket(socket, handover)?;
    link.send_some().map_err(|source| Error::Send { pid, source })?;
    Ok(Child { process, link })
}

/// Step 4: one poll over the link, triggers and deadline.
fn wait_ready(child: &mut Child<'_>, core: &Core, triggers: &mut Triggers, since: Instant) -> Result<(), Error> {
    let pid = child.process.pid();
    let deadline = Deadline::since(since, core.config.ready_timeout);
    let (mut waited, mut timed_out) = (false, false);
    loop {
        // What the child said comes before everything else: after `ready` it may be serving without us.
        match if waited { child.next_status()? } else { None } {
            Some(FromChild::Ready) if child.link.is_sent() => return Ok(()),
            Some(FromChild::Refused(reason)) => return Err(Error::Refused { pid, reason }),
            Some(FromChild::Failed { step, errno }) => {
                let (program, source) = (core.program.path.clone(), explain(io::Error::from_raw_os_error(errno)));
                return Err(Error::Exec { program, pid, step, source });
            }
            Some(other) => return Err(Error::Garbage { pid, received: other.line() }),
            None => {}
        }
        triggers.answer_busy(core, "upgrading");
        if triggers.stop_asked() {
            return Err(Error::StopAsked { pid });
        }
        if timed_out {
            return Err(Error::Timeout { pid, after: core.config.ready_timeout });
        }
        let (mut fds, again) = child.link.poll_for();
        // Its death is seen by the link's end as a rule; but a process of its own may hold that open.
        fds.extend(child.process.pidfd());
        triggers.wait(core, &fds, deadline.min(again).min(child.process.look_again()), Sockets::Answer)?;
        timed_out = deadline.has_passed();
        waited = true;
        child.link.send_some().map_err(|source| Error::Send { pid, source })?;
    }
}

/// Step 7. The child serves from the word `commit` on; we have stopped accepting before. Then the probation: we keep
/// our sockets, and if the child dies we accept again where we stopped. The connections of that time wait in the queue.
fn commit(mut child: Child<'_>, core: &Core, triggers: &mut Triggers, since: Instant) -> Result<Upgraded, Error> {
    core.shutdown.set(State::Paused);
    let committed = Instant::now();
    let pid = child.process.pid();
    let resume = |error| {
        core.shutdown.set(State::Accepting);
        core.rewrite_pid_file();
        let died = |status| Error::DiedAfterReady { pid, status, after: committed.elapsed() };
        Err(match error {
            Error::ChildEnded { status, .. } => died(status),
            Error::ChildSilent { .. } => died(None),
            other => other,
        })
    };
    if child.link.send(FromParent::Commit).is_err() {
        return resume(child.link_ended());
    }
    // Whoever watches us must not take our end for a death from here on.
    core.ancestors.send_to_parent(&FromChild::HandedOver);
    let upgraded = Upgraded { pid, generation: core.generation + 1, commit: committed - since };
    core.emit(&Event::Committed(&upgraded));

    let verdict_at = Deadline::since(committed, core.config.probation);
    let mut serving = core.config.probation.is_zero();
    loop {
        // Read first, whatever the clock says: this process may have been stopped since, and the child serves.
        match child.next_status() {
            Ok(Some(FromChild::Stopping | FromChild::HandedOver)) => break,
            Ok(Some(FromChild::Serving)) => {
                serving = true;
                continue;
            }
            Ok(Some(_)) => continue,
            Ok(None) => {}
            Err(error @ Error::Garbage { .. }) => {
                // If it serves, that is more than its manners count for.
                if serving || !child.take_back() {
                    log::warn!("{error}");
                    break;
                }
                return resume(error);
            }
            Err(error) => return resume(error),
        }
        triggers.answer_busy(core, "probation");
        if triggers.stop_asked() {
            // The stop is for the service, and that is the child now. A process that took over has a master of its own,
            // whose doing this may be: a new container is ready, and the old one goes.
            if matches!(child.process.who, Who::Child(_)) {
                let _ = child.link.send(FromParent::Stop);
            }
            break;
        }
        let until = if serving { verdict_at } else { Deadline::since(committed, COMMIT) };
        if until.has_passed() {
            // It was stopped between the two words, say; nobody accepts.
            if serving || !child.take_back() {
                break;
            }
            return resume(Error::Timeout { pid, after: COMMIT });
        }
        let (mut fds, _) = child.link.poll_for();
        fds.extend(child.process.pidfd());
        if let Err(e) = triggers.wait(core, &fds, until.min(child.process.look_again()), Sockets::Leave) {
            // The child serves; a failing poll of ours is no reason to end it.
            log::warn!("{}", crate::error::chain(&e));
            break;
        }
    }
    child.process.armed = false;
    let is_child = matches!(child.process.who, Who::Child(_));
    let ChildLink { to, from, lines, .. } = child.link;
    core.announce(&upgraded, is_child, &to);
    core.kept().link = Some(to);
    core.shutdown.set_end_signal(Arc::new(LaterGenerations { from, lines: Mutex::new(lines) }));
    Ok(upgraded)
}

/// The child's status pipe, on which every later generation may ask this one to end its drain.
#[derive(Debug)]
struct LaterGenerations {
    from: Arc<OwnedFd>,
    lines: Mutex<Lines>,
}

impl EndSignal for LaterGenerations {
    fn fd(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }

    fn read(&self) -> End {
        match self.lines.lock().unwrap_or_else(PoisonError::into_inner).next(self.fd()) {
            Ok(Read::Line(line)) if FromChild::parse(&line) == Some(FromChild::EndDrain) => End::Now,
            Ok(Read::Line(_) | Read::Wait) => End::Continue,
            Ok(Read::End | Read::Garbage(_)) | Err(_) => End::Gone,
        }
    }
}

/// The new process, and the link to it.
struct Child<'a> {
    process: Process<'a>,
    link: ChildLink,
}

impl Child<'_> {
    /// What the child has said, if anything. Its end without a word is an error.
    fn next_status(&mut self) -> Result<Option<FromChild>, Error> {
        let pid = self.process.pid();
        let garbage = |received| Err(Error::Garbage { pid, received });
        match self.link.next() {
            Ok(Read::Line(line)) => match FromChild::parse(&line) {
                Some(status) => Ok(Some(status)),
                None => garbage(preview(line.as_bytes())),
            },
            Ok(Read::Garbage(received)) => garbage(received),
            Ok(Read::Wait) if !self.process.ends_within(Duration::ZERO) => Ok(None),
            Ok(Read::Wait | Read::End) | Err(_) => Err(self.link_ended()),
        }
    }

    /// The link has ended, and so must the child.
    fn link_ended(&mut self) -> Error {
        let pid = self.process.pid();
        // A process closes its descriptors a little before it has ended.
        let by_itself = self.process.ends_within(ENDING);
        let lives_on = !by_itself && matches!(self.process.who, Who::Stranger { pidfd: Some(_), .. });
        match self.process.end() {
            Some(status) if !by_itself && status.signal() == Some(Signal::KILL.as_raw()) => Error::ChildSilent { pid },
            None if lives_on => Error::ChildLivesOn { pid },
            status => Error::ChildEnded { pid, status },
        }
    }

    /// Takes the commit back, unless the child has just answered it.
    fn take_back(&mut self) -> bool {
        // A stranger cannot be killed. But it must say `serving` before it accepts, and now it cannot, however late it goes on.
        self.link.stop_receiving();
        while let Ok(Read::Line(line)) = self.link.next() {
            if FromChild::parse(&line) == Some(FromChild::Serving) {
                return false;
            }
        }
        self.process.end();
        true
    }
}

/// A process that is ours to end, or to turn away, while `armed`: dropping it does so, so no early return leaves one
/// behind.
struct Process<'a> {
    core: &'a Core,
    who: Who,
    armed: bool,
}

/// The new process of an upgrade.
enum Who {
    Child(Spawned),
    /// It took over, and belongs to somebody else. The pid is 0 where it cannot be seen from here.
    Stranger {
        pid: u32,
        pidfd: Option<OwnedFd>,
        socket: Arc<OwnedFd>,
    },
}

impl Process<'_> {
    fn pid(&self) -> u32 {
        match &self.who {
            Who::Child(spawned) => spawned.pid.as_raw_nonzero().get() as u32,
            Who::Stranger { pid, .. } => *pid,
        }
    }

    fn end_fd(&self) -> Option<&OwnedFd> {
        match &self.who {
            Who::Child(spawned) => spawned.pidfd.as_ref(),
            Who::Stranger { pidfd, .. } => pidfd.as_ref(),
        }
    }

    fn pidfd(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.end_fd().map(|pidfd| (pidfd.as_fd(), PollFlags::IN))
    }

    /// Whether the child ends within that time.
    fn ends_within(&self, time: Duration) -> bool {
        let deadline = Deadline::after(time);
        match &self.who {
            Who::Child(child) => child.ends_before(deadline),
            Who::Stranger { pidfd, .. } => pidfd.as_ref().is_some_and(|pidfd| wait_readable(pidfd, deadline)),
        }
    }

    /// When to look again whether a child has ended whose end is no event, because there is no pidfd.
    fn look_again(&self) -> Deadline {
        match &self.who {
            Who::Child(Spawned { pidfd: None, .. }) => Deadline::after(LOOK),
            _ => Deadline::NEVER,
        }
    }

    /// Kills and reaps a child, and turns a stranger away. Gives how a child ended, unless somebody else has reaped it or
    /// it was ended before.
    fn end(&mut self) -> Option<ExitStatus> {
        if !std::mem::replace(&mut self.armed, false) {
            return None;
        }
        let status = match &self.who {
            Who::Child(spawned) => spawned.kill_and_reap(),
            Who::Stranger { socket, .. } => {
                // Without this word it would take our closing for our death, and serve.
                let _ = send(socket, FromParent::Stop.line());
                None
            }
        };
        // A child that had come as far as its PID file wrote itself into it.
        self.core.rewrite_pid_file();
        status
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

// ---- the child --------------------------------------------------------------------------------------------------

/// Step 5: takes what a parent handed over to this process. `None` means that this is a first generation.
pub(crate) fn inherit(config: &Config) -> Result<Option<Inherited>, Error> {
    if let Some(inherited) = from_environment()? {
        return Ok(Some(inherited));
    }
    match &config.take_over {
        Some(path) => from_stranger(path, config),
        None => Ok(None),
    }
}

/// From the parent that started this process. Proves first that the environment means this process.
fn from_environment() -> Result<Option<Inherited>, Error> {
    let value = env::var_os(VARIABLE);
    let Some(carrier) = value.as_ref().and_then(|value| Carrier::parse(value.to_str()?)) else { return Ok(None) };
    let Some(mut adopter) = Adopter::take() else { return Ok(None) };
    let mut adopt = |end: FdRef, file_type| adopter.adopt(end.fd, Some(file_type), end.inode).map(Arc::new);
    let failed = |what| move |source| Error::Handover { what, source };
    let (reader, writer, arrived) = match carrier {
        Carrier::Pipes { manifest, status } => {
            let (Ok(reader), Ok(writer)) = (adopt(manifest, FileType::Fifo), adopt(status, FileType::Fifo)) else {
                return Ok(not_meant());
            };
            let arrived = receive::read(&reader, adopter, MANIFEST).map_err(failed("manifest"))?;
            (reader, writer, arrived)
        }
        Carrier::Socket(socket) => {
            let Ok(socket) = adopt(socket, FileType::Socket) else { return Ok(not_meant()) };
            let arrived = receive::receive(&socket, MANIFEST).map_err(failed("manifest"))?;
            let arrived =
                arrived.map_err(|answer| failed("manifest")(io::Error::new(io::ErrorKind::InvalidData, answer)))?;
            (socket.clone(), socket, arrived)
        }
    };
    arrived.unpack(reader, writer, false).map(Some)
}

fn not_meant() -> Option<Inherited> {
    log::debug!("the handover in the environment is another process's");
    None
}

/// From the process that listens at `path`, if one does.
fn from_stranger(path: &Path, config: &Config) -> Result<Option<Inherited>, Error> {
    let mut attempts = 0;
    while let Some(socket) = takeover::connect(path, &config.trust)? {
        match receive::receive(&socket, config.ready_timeout) {
            Ok(Ok(arrived)) => {
                log::info!("takes over from the process at {}", path.display());
                let socket = Arc::new(socket);
                return arrived.unpack(socket.clone(), socket, true).map(Some);
            }
            Ok(Err(answer)) => {
                let answer = answer.lines().next().unwrap_or_default().to_owned();
                return Err(Error::NotHandedOver { path: path.to_owned(), answer });
            }
            // It has ended, or turned us away. If it has ended nobody listens now, and this generation is the first; or
            // will do so soon, because an end closes one descriptor after the other.
            Err(e) if attempts < LOOK_AGAIN && takeover::is_end(&e) => {
                attempts += 1;
                thread::sleep(LOOK_AGAIN_AFTER);
            }
            Err(source) => return Err(Error::Handover { what: "manifest", source }),
        }
    }
    Ok(None)
}

/// Step 6, after the claims: nothing unclaimed stays open, the PID file names us, and the parent hears `ready`. We
/// serve when it answers `commit`, so that at no time both think they are the one; or when it can answer no more.
pub(crate) fn ready(core: &Core) -> Result<(), Error> {
    core.sockets.registry().failed_claim()?;
    core.sockets.registry().close_unclaimed();
    let Some(parent) = &core.ancestors.parent else { return core.write_pid_file() };
    // A stranger may be too late without knowing it yet, and then the file is the old process's still.
    let pid_file = core.config.pid_file.as_deref().filter(|_| parent.is_takeover);
    let before = pid_file.map(|path| (path, std::fs::read(path).ok()));
    core.write_pid_file()?;
    match parent.send(&FromChild::Ready) {
        // The parent is dead: we have the listeners. Or it has turned us away, and then its last word says so.
        Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
        other => other.map_err(|source| Error::Ready { source })?,
    }
    let mut deadline = Deadline::after(COMMIT);
    let mut unheard = false;
    loop {
        match parent.next_message() {
            Some(FromParent::Commit) => {}
            // A child would have been killed; this process belongs to somebody else.
            Some(FromParent::Stop) => break,
            // Not before the verdict.
            Some(FromParent::Main) => continue,
            None if parent.has_ended() => {
                log::warn!("the parent ended before it could commit: serving without it");
                return Ok(());
            }
            None if wait_readable(&parent.reader, deadline) => continue,
            None if unheard => break,
            // It is stopped, or hangs, and so accepts nothing. When it goes on, it will read this first.
            None => log::warn!("the parent did not answer within {COMMIT:?}: serving without it"),
        }
        // Before the first accept: a parent that does not hear this has ended, or takes the commit back and says so.
        match parent.send(&FromChild::Serving) {
            Ok(()) => return Ok(()),
            Err(e) => log::debug!("the parent does not hear that this process serves: {e}"),
        }
        (unheard, deadline) = (true, Deadline::after(COMMIT));
    }
    if let Some((path, before)) = before {
        if let Err(e) = pid_file::put_back(path, before.as_deref()) {
            log::warn!("cannot put back PID file {}: {e}", path.display());
        }
    }
    Err(Error::GivenUp)
}
