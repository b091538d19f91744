//! The parent's half of an upgrade: steps 2, 3, 4 and 7.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::successor::Successor;
use super::verification::Verification;
use crate::error::Error;
use crate::event::Event;
use crate::event_loop::{EventLoop, Phase, Wake};
use crate::exit::Upgraded;
use crate::generation::Generation;
use crate::handover::entry::Entry;
use crate::handover::lines::{FromChild, FromParent, COMMIT};
use crate::handover::link::{ChildLink, Transport};
use crate::logging;
use crate::shutdown::{Shutdown, State};
use crate::sockets::Late;
use crate::sys::child::{Process, LOOK};
use crate::sys::plan::Plan;
use crate::sys::poll::Deadline;
use crate::sys::program::{has_capabilities, pidfd_id, SECURE};
use crate::sys::spawn::{explain, spawn};
use crate::sys::Parentage;
use crate::triggers::request::{Action, Request};
use crate::triggers::takeover::TakeoverRequest;

/// Replaces this process with a child or with the process that requests a takeover. On an error this process keeps
/// serving, and the child is gone. On success accepting ends permanently when the [`Paused`] is dropped.
pub(crate) fn upgrade<'a>(
    event_loop: &mut EventLoop<'a>,
    target: Option<&TakeoverRequest>,
    since: Instant,
) -> Result<(Upgraded, Paused<'a>), Error> {
    let generation = event_loop.generation;
    generation.reporter.emit(&Event::Upgrading);
    let (entries, late) = pack(generation)?;
    let mut successor = match target {
        None => start(generation, entries)?,
        Some(request) => begin(generation, request, entries)?,
    };
    wait_ready(&mut successor, event_loop, since)?;
    commit(successor, late, event_loop, since)
}

/// Step 2: collects everything that is handed over, for any carrier, and everything that must be sent at the commit.
fn pack(generation: &Generation) -> Result<(Vec<Entry>, Option<Late>), Error> {
    let (mut entries, late) = generation.sockets.snapshot()?;
    for link in generation.ancestors.draining() {
        entries.push(link.clone());
        entries.extend(generation.ancestors.status_of(link).cloned());
    }
    entries.extend(generation.drain_status().map(|status| status.entry.clone()));
    Ok((entries, late))
}

/// Step 3 with a child. Everything that needs memory is built before the child exists.
fn start(generation: &Generation, entries: Vec<Entry>) -> Result<Successor<'_>, Error> {
    let options = &generation.options;
    generation.warn_of_lost_rights();
    generation.reporter.check_unit().map_err(Error::prepare("the next generation"))?;
    let program = options.next_program(&generation.program)?;
    let (mut link, (carrier, child_end)) = match options.transport {
        Transport::Pipes => ChildLink::pipes(&generation.origin, entries),
        Transport::Socket => ChildLink::socketpair(&generation.origin, entries),
    }
    .map_err(Error::prepare("link"))?;
    // Send as much of the manifest as fits, so that the child can usually proceed on its own if this process dies.
    link.send_some().map_err(Error::prepare("manifest"))?;
    let plan = Plan {
        program: program.path_c().map_err(Error::prepare("program"))?,
        argv: program.argv().map_err(Error::prepare("arguments"))?,
        envp: program.envp(&carrier.value()).map_err(Error::prepare("environment"))?,
        directory: program.directory_c().map_err(Error::prepare("directory"))?,
        keep: child_end.iter().map(AsRawFd::as_raw_fd).collect(),
        status: carrier.writer.fd,
        attributes: generation.attributes.clone(),
        // At a stop systemd waits only for its own children, and kills all others immediately (`unit_kill_context`).
        parent: match generation.reporter.main() {
            Some(manager) if manager.is_parent() => Parentage::OurParent,
            _ => Parentage::Us,
        },
    };
    let spawned =
        spawn(plan, options.spawn).map_err(|source| Error::Spawn { program: program.path.clone(), source })?;
    let successor = Successor::new(generation, spawned, link, program.path);
    // Otherwise this process keeps the child's ends open and never sees the child's end.
    drop(child_end);
    generation.reporter.emit(&Event::Spawned { pid: successor.process.pid() });
    Ok(successor)
}

/// Step 3 with a process that already runs.
fn begin<'a>(
    generation: &'a Generation,
    request: &TakeoverRequest,
    entries: Vec<Entry>,
) -> Result<Successor<'a>, Error> {
    let socket = request.begin();
    let process = Process::at(&socket, &request.peer);
    logging::info!("takeover pid={} uid={}", process.pid(), request.peer.uid);
    let link = ChildLink::socket(socket, &generation.origin, entries, None).map_err(Error::prepare("link"))?;
    Ok(Successor::new(generation, process, link, PathBuf::new()))
}

/// Step 4: one poll over the link, the triggers and the deadline.
fn wait_ready(successor: &mut Successor<'_>, event_loop: &mut EventLoop<'_>, since: Instant) -> Result<(), Error> {
    let (pid, timeout) = (successor.process.pid(), event_loop.generation.options.ready_timeout);
    let deadline = Deadline::since(since, timeout);
    let mut wake = Wake::Ready;
    loop {
        let sent = successor.link.send_some();
        // Read the child's messages first. It may be ready although the deadline has passed.
        match successor.next_message().map_err(|error| likely_cause(error, &successor.program))? {
            Some(FromChild::Ready) if successor.link.is_sent() => return Ok(()),
            Some(FromChild::Dropped(inodes)) => {
                successor.dropped.extend(inodes);
                continue;
            }
            Some(FromChild::Refused(reason)) => {
                successor.let_end(event_loop);
                return Err(Error::Refused { pid, reason });
            }
            Some(FromChild::Failed { step, errno }) => {
                let program = successor.program.clone();
                return Err(Error::Exec { program, pid, step, source: explain(io::Error::from_raw_os_error(errno)) });
            }
            Some(other) => return Err(Error::Garbage { pid, received: other.line() }),
            None => sent.map_err(|source| Error::Send { pid, source })?,
        }
        match wake {
            Wake::Stop => return Err(Error::StopAsked { pid }),
            Wake::Deadline if deadline.has_passed() => return Err(Error::Timeout { pid, after: timeout }),
            Wake::Deadline | Wake::Ready => {}
        }
        let (fds, again) = successor.poll_for();
        wake = event_loop.wait(Phase::Upgrading, &fds, deadline.min(again))?;
    }
}

/// A child whose program file has capabilities must not use its handover, and so cannot report why it ends. The parent
/// cannot know this in advance, because capabilities of a file do not always take effect.
fn likely_cause(error: Error, program: &Path) -> Error {
    match error {
        Error::ChildEnded { pid, status: Some(status) } if has_capabilities(program) => {
            Error::Refused { pid, reason: format!("{status}, probably because {SECURE}") }
        }
        other => other,
    }
}

/// Step 7. The child serves after `commit`, so accepting is paused first. During the probation this process keeps its
/// sockets. If the child dies, it accepts again, and connections that have arrived in between wait in the queue.
fn commit<'a>(
    successor: Successor<'a>,
    late: Option<Late>,
    event_loop: &mut EventLoop<'a>,
    since: Instant,
) -> Result<(Upgraded, Paused<'a>), Error> {
    let generation = event_loop.generation;
    let mut paused = Paused::begin(&generation.shutdown, successor.dropped.clone());
    // Declared after `paused`, so that on every exit path the child is given up before this process accepts again.
    let mut successor = successor;
    let mut passed_on = PassedOn { generation, requests: Vec::new() };
    let committed = Instant::now();
    let (pid, is_child) = (successor.process.pid(), successor.process.is_child());
    let died = |error| match error {
        Error::ChildEnded { status, .. } => Error::DiedAfterReady { pid, status, after: committed.elapsed() },
        Error::ChildSilent { .. } => Error::DiedAfterReady { pid, status: None, after: committed.elapsed() },
        other => other,
    };
    if let Some(late) = late {
        generation.sockets.send_late(late, generation.number)?;
    }
    if successor.link.send(FromParent::Commit).is_err() {
        return Err(died(successor.link_ended()));
    }
    let upgraded = Upgraded { pid, generation: generation.number + 1, commit: committed - since };
    generation.reporter.emit(&Event::Committed(&upgraded));

    let (mut serving, mut stopping) = (false, false);
    let mut verification = None;
    let (mut until, mut wake) = (Deadline::since(committed, COMMIT), Wake::Ready);
    loop {
        // Read first, even if the deadline has passed: this process may have been stopped, while the child serves.
        match successor.next_message() {
            Ok(Some(FromChild::Serving)) => {
                serving = true;
                until = Deadline::since(committed, generation.options.probation);
                verification = generation.options.verify.as_ref().map(|verify| Verification::begin(verify, &upgraded));
                continue;
            }
            Ok(Some(FromChild::Stopping)) => {
                stopping = true;
                break;
            }
            Ok(Some(FromChild::Refused(reason))) => {
                // It has stopped accepting, and keeps its connections until its drain ends.
                successor.drains = serving;
                return Err(Error::Refused { pid, reason });
            }
            Ok(Some(_)) => continue,
            Ok(None) => {}
            // A child that already serves is kept even if it breaks the protocol.
            Err(error @ Error::Garbage { .. }) if serving => {
                logging::warn!("{error}");
                break;
            }
            Err(error) => return Err(died(error)),
        }
        match wake {
            Wake::Deadline if until.has_passed() && serving => {
                let limit = Deadline::since(committed, generation.options.ready_timeout);
                match verification.as_ref().map(|running: &Verification| running.outcome(limit)) {
                    None | Some(Some(Ok(()))) => break,
                    Some(Some(Err(why))) => return Err(successor.roll_back(why)),
                    Some(None) => until = Deadline::after(LOOK),
                }
            }
            // The child sent `ready` but never `serving`, so no process is accepting.
            Wake::Deadline if until.has_passed() => return Err(Error::Timeout { pid, after: COMMIT }),
            Wake::Stop | Wake::Ready | Wake::Deadline => passed_on.pass(event_loop, &successor),
        }
        // A process that took over has its own supervisor, which may have caused this stop: when a new container is
        // ready, the old one is stopped.
        if !is_child && serving && passed_on.requests.iter().any(|request| request.action.stops()) {
            break;
        }
        let (fds, again) = successor.poll_for();
        wake = match event_loop.wait(Phase::Probation, &fds, until.min(again)) {
            Ok(wake) => wake,
            Err(e) if serving => {
                // A failing poll in this process must not end a child that serves.
                logging::warn!("{e}");
                break;
            }
            Err(e) => return Err(e),
        };
    }
    let id = || successor.process.pidfd.as_ref().and_then(pidfd_id);
    // A child that could not be announced announces itself when this process ends.
    if generation.reporter.announce(&upgraded, is_child.then_some(id)) && is_child {
        let _ = successor.link.send(FromParent::Main);
    }
    // Forward requests that arrived during the announcement. After the verdict they would have reached the wrong
    // process.
    let _ = event_loop.wait(Phase::Probation, &[], Deadline::after(Duration::ZERO));
    passed_on.pass(event_loop, &successor);
    // If the send fails, the child is dead. A living child is kept despite any other error: it serves, and is free at
    // the latest when this process ends.
    if successor.link.send(FromParent::Verdict).is_err() && !stopping && successor.link.is_deaf() {
        generation.reporter.announce_self();
        return Err(died(successor.link_ended()));
    }
    paused.then = State::HandedOver;
    generation.sockets.registry().unlink_orphans(&successor.dropped);
    successor.keep();
    passed_on.done(event_loop);
    Ok((upgraded, paused))
}

/// Requests that reached this process during the probation and were forwarded to the child. If the child dies before it
/// carries them out, this process does.
struct PassedOn<'a> {
    generation: &'a Generation,
    requests: Vec<Request>,
}

impl PassedOn<'_> {
    fn pass(&mut self, event_loop: &mut EventLoop<'_>, successor: &Successor<'_>) {
        while let Some(request) = event_loop.triggers.take_request(|_| true) {
            let is_first = self.requests.iter().all(|passed| passed.action != request.action);
            // The stop is meant for the service, which is now the child, unless that belongs to another supervisor.
            if is_first && (successor.process.is_child() || !request.action.stops()) {
                let message = match request.action {
                    Action::Stop => FromParent::RequestStop,
                    Action::PartialStop => FromParent::RequestPartialStop,
                    _ => FromParent::RequestUpgrade,
                };
                let Request { action, reason, .. } = &request;
                logging::info!("forwarded to pid {}: {action:?} requested by {reason}", successor.process.pid());
                let _ = successor.link.send(message);
            }
            // One upgrade is enough. Each stop may have a peer that waits for the answer.
            if is_first || request.action.stops() {
                self.requests.push(request);
            }
        }
    }

    /// Call this after a successful upgrade. Stop requests are answered when this process ends.
    fn done(mut self, event_loop: &mut EventLoop<'_>) {
        let stops = self.requests.drain(..).filter(|request| request.action.stops());
        stops.for_each(|request| event_loop.triggers.push(request));
    }
}

impl Drop for PassedOn<'_> {
    fn drop(&mut self) {
        self.requests.drain(..).for_each(|request| self.generation.calls.post(request));
    }
}

/// Accepting is paused while this exists.
pub(crate) struct Paused<'a> {
    shutdown: &'a Shutdown,
    /// What follows. Not [`State::Accepting`] if another process serves or the service has stopped.
    pub(crate) then: State,
}

impl<'a> Paused<'a> {
    /// Accepting continues on `orphans`, the listeners that the next generation does not have.
    pub(crate) fn begin(shutdown: &'a Shutdown, orphans: HashSet<u64>) -> Self {
        shutdown.accept_gate().set_orphans(orphans);
        shutdown.set(State::Paused);
        Self { shutdown, then: State::Accepting }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.shutdown.set(self.then);
    }
}
