//! One upgrade, in order. The parent's half first, then the child's; the steps are numbered as in the crate's tour.
//!
//! Step 1, registering, is `sockets.rs`: by the time a trigger fires every socket is there.

use std::env;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{poll, PollFd, PollFlags};
use rustix::fs::{fstat, FileType};
use rustix::io::Errno;
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};
use rustix::process::{kill_process, pidfd_send_signal, waitid, waitpid, Signal, WaitId, WaitIdOptions, WaitOptions};

use crate::ecdysis::{Core, Upgraded};
use crate::error::Error;
use crate::event::Event;
use crate::handover::frames::{preview, send, Lines, Next, Status, Word};
use crate::handover::manifest::{Entry, Manifest, Slot};
use crate::handover::pipe::{Named, Pipes, VARIABLE};
use crate::key::Key;
use crate::shutdown::{timespec, State};
use crate::sockets::Held;
use crate::sys::adopt::Adopter;
use crate::sys::signal::without_sigpipe;
use crate::sys::spawn::{spawn, Plan, Spawned};
use crate::trigger::{Sockets, Triggers, Woken};

/// How long a child that has closed its status pipe may take to end by itself.
const ENDING: Duration = Duration::from_millis(200);

/// How long a killed child may take to end.
const KILLING: Duration = Duration::from_secs(5);

/// How long the manifest may take, which the parent has written before the child began.
const MANIFEST: Duration = Duration::from_secs(10);

/// How long the parent may take to answer `ready`. It answers at once, unless it is stopped or dead.
const COMMIT: Duration = Duration::from_secs(5);

// ---- the parent -------------------------------------------------------------------------------------------------

/// Replaces this process: steps 2, 3, 4 and 7. On an error everything is as it was, and the child is gone.
pub(crate) fn upgrade(core: &Core, triggers: &mut Triggers, since: Instant) -> Result<Upgraded, Error> {
    core.emit(&Event::Upgrading);
    let mut child = start(core)?;
    core.emit(&Event::Spawned { pid: child.process.pid() });
    wait_ready(&mut child, core, triggers, since)?;
    commit(child, core, triggers, since)
}

/// Steps 2 and 3. What needs memory is built first; the manifest is in its pipe before the child exists, so the child
/// needs nothing more from us to decide by itself, should we die.
fn start(core: &Core) -> Result<Child<'_>, Error> {
    let prepare = |what| move |source| Error::Prepare { what, source };
    // Nonblocking at both ends: neither process ever waits in a read or write, only in a poll with a deadline.
    let pipe = || pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from);
    let (manifest_read, manifest_write) = pipe().map_err(prepare("manifest pipe"))?;
    let (status_read, status_write) = pipe().map_err(prepare("status pipe"))?;

    // `held` keeps the descriptors' numbers theirs until the child has its own copies of them.
    let (mut entries, held) = core.sockets.snapshot();
    entries.extend(core.draining().map(DrainLink::entry));
    let mut keep: Vec<_> = entries.iter().map(|entry| entry.slot.number as RawFd).collect();
    let manifest = Manifest { generation: core.generation, entries, ..Manifest::default() };
    let mut unsent = manifest.encode().into_bytes();
    // A larger pipe only saves the child a wait; without it the rest goes while we wait for `ready`.
    if unsent.len() > 64 * 1024 {
        let _ = fcntl_setpipe_size(&manifest_write, unsent.len());
    }
    // We hold the other end too, so this cannot find it closed.
    write_some(&manifest_write, &mut unsent).map_err(|e| prepare("manifest")(e.into()))?;

    let names = Pipes {
        manifest: named(&manifest_read).map_err(prepare("pipe"))?,
        status: named(&status_write).map_err(prepare("pipe"))?,
    };
    let program = &core.program;
    keep.extend([manifest_read.as_raw_fd(), status_write.as_raw_fd()]);
    let plan = Plan {
        program: program.path_c().map_err(prepare("program"))?,
        argv: program.argv().map_err(prepare("arguments"))?,
        envp: program.envp(&names.value()).map_err(prepare("environment"))?,
        directory: program.directory_c().map_err(prepare("directory"))?,
        keep,
        status: status_write.as_raw_fd(),
        mask: core.mask,
    };
    let spawned =
        spawn(plan, core.config.spawn).map_err(|source| Error::Spawn { program: program.path.clone(), source })?;
    drop(held);
    // Here the child's ends are closed: else the status pipe would not end with the child.
    let process = Process { core, spawned, armed: true };
    Ok(Child { process, to: manifest_write, from: status_read, lines: Lines::default(), unsent })
}

/// Step 4: one poll over status pipe, manifest pipe, triggers and deadline.
fn wait_ready(child: &mut Child<'_>, core: &Core, triggers: &mut Triggers, since: Instant) -> Result<(), Error> {
    let pid = child.process.pid();
    let deadline = since.checked_add(core.config.ready_timeout);
    let (mut waited, mut timed_out) = (false, false);
    loop {
        // What the child said comes before everything else: after `ready` it may be serving without us.
        match if waited { child.next_status()? } else { None } {
            Some(Status::Ready) => return Ok(()),
            Some(Status::Refused(reason)) => return Err(Error::Refused { pid, reason }),
            Some(Status::Failed { step, errno }) => {
                let (program, source) = (core.program.path.clone(), io::Error::from_raw_os_error(errno));
                return Err(Error::Exec { program, pid, step, source });
            }
            Some(other) => return Err(Error::Garbage { pid, received: other.line() }),
            None => {}
        }
        triggers.answer_busy(|| core.status("upgrading"));
        if triggers.stop_asked() {
            return Err(Error::StopAsked { pid });
        }
        if timed_out {
            return Err(Error::Timeout { pid, after: core.config.ready_timeout });
        }
        let mut fds = vec![(child.from.as_fd(), PollFlags::IN)];
        // Its death is seen by the pipe's end as a rule; but a process of its own may hold the pipe open.
        fds.extend(child.process.pidfd());
        if !child.unsent.is_empty() {
            fds.push((child.to.as_fd(), PollFlags::OUT));
        }
        timed_out = triggers.wait(&fds, deadline, Sockets::Answer)? == Woken::Deadline;
        waited = true;
        if !child.unsent.is_empty() {
            let written = without_sigpipe(|| write_some(&child.to, &mut child.unsent));
            written.map_err(|e| Error::Send { pid, source: e.into() })?;
        }
    }
}

/// Step 7. The child serves from the word `commit` on; we have stopped accepting before. Then the probation: we keep
/// our sockets, and if the child dies we accept again where we stopped. The connections of that time wait in the queue.
fn commit(mut child: Child<'_>, core: &Core, triggers: &mut Triggers, since: Instant) -> Result<Upgraded, Error> {
    core.shutdown.set(State::Paused);
    let committed = Instant::now();
    let died = |pid, status, after| {
        core.shutdown.set(State::Accepting);
        core.rewrite_pid_file();
        Err(Error::DiedAfterReady { pid, status, after })
    };
    let pid = child.process.pid();
    if send(&child.to, Word::Commit.line()).is_err() {
        let status = child.process.end();
        return died(pid, status, Duration::ZERO);
    }
    // Whoever watches us must not take our end for a death from here on.
    core.tell_parent(&Status::HandedOver);
    let upgraded = Upgraded { pid, generation: core.generation + 1, commit: committed - since };
    core.emit(&Event::Committed(&upgraded));

    let verdict_at = committed + core.config.probation;
    let mut waited = false;
    loop {
        match if waited { child.next_status() } else { Ok(None) } {
            Ok(Some(Status::Stopping | Status::HandedOver)) => break,
            Ok(Some(_)) => continue,
            Ok(None) => {}
            // It serves, and that is more than its manners count for.
            Err(error @ Error::Garbage { .. }) => {
                log::warn!("{error}");
                break;
            }
            Err(error) => {
                let status = if let Error::ChildEnded { status, .. } = error { status } else { None };
                return died(pid, status, committed.elapsed());
            }
        }
        triggers.answer_busy(|| core.status("probation"));
        if triggers.stop_asked() {
            // The stop is for the service, and that is the child now.
            let _ = send(&child.to, Word::Stop.line());
            break;
        }
        if Instant::now() >= verdict_at {
            break;
        }
        let mut fds = vec![(child.from.as_fd(), PollFlags::IN)];
        fds.extend(child.process.pidfd());
        if let Err(e) = triggers.wait(&fds, Some(verdict_at), Sockets::Leave) {
            // The child serves; a failing poll of ours is no reason to end it.
            log::warn!("{}", crate::error::chain(&e));
            break;
        }
        waited = true;
    }
    child.process.armed = false;
    core.kept().pipe = Some(child.to);
    core.shutdown.keep_successor(child.from, child.lines);
    Ok(upgraded)
}

/// The child, and both pipes to it.
struct Child<'a> {
    process: Process<'a>,
    /// The manifest pipe. It stays open until this process ends, which the child sees.
    to: OwnedFd,
    /// The status pipe.
    from: OwnedFd,
    lines: Lines,
    /// What did not fit into the manifest pipe yet.
    unsent: Vec<u8>,
}

impl Child<'_> {
    /// What the child has said, if anything. Its end without a word is an error.
    fn next_status(&mut self) -> Result<Option<Status>, Error> {
        let pid = self.process.pid();
        let garbage = |received| Err(Error::Garbage { pid, received });
        match self.lines.next(self.from.as_fd()) {
            Ok(Next::Line(line)) => match Status::parse(&line) {
                Some(status) => Ok(Some(status)),
                None => garbage(preview(line.as_bytes())),
            },
            Ok(Next::Garbage(received)) => garbage(received),
            Ok(Next::Wait) if !self.process.ends_within(Duration::ZERO) => Ok(None),
            Ok(Next::Wait | Next::End) | Err(_) => {
                // A process closes its descriptors a little before it has ended.
                let by_itself = self.process.ends_within(ENDING);
                match self.process.end() {
                    Some(status) if !by_itself && status.signal() == Some(Signal::KILL.as_raw()) => {
                        Err(Error::ChildSilent { pid })
                    }
                    status => Err(Error::ChildEnded { pid, status }),
                }
            }
        }
    }
}

/// A child process that is ours to end while `armed`: dropping it ends it, so no early return leaves one behind.
struct Process<'a> {
    core: &'a Core,
    spawned: Spawned,
    armed: bool,
}

impl Process<'_> {
    fn pid(&self) -> u32 {
        self.spawned.pid.as_raw_nonzero().get() as u32
    }

    fn pidfd(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.spawned.pidfd.as_ref().map(|pidfd| (pidfd.as_fd(), PollFlags::IN))
    }

    /// Whether the child ends within that time.
    fn ends_within(&self, time: Duration) -> bool {
        if let Some(pidfd) = &self.spawned.pidfd {
            return wait_readable(pidfd, time);
        }
        // Without a pidfd there is no event for it, and this is asked with a time only when its pipe has ended.
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_unreaped() != Ok(false) {
                return !left.is_zero();
            }
            let _ = poll(&mut [], Some(&timespec(left.min(Duration::from_millis(2)))));
        }
    }

    /// Whether the child has ended and waits to be reaped; ECHILD if it is not ours to reap (any more).
    fn is_unreaped(&self) -> rustix::io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.spawned.pid), options).map(|status| status.is_some())
    }

    /// Kills and reaps. Gives how it ended, unless somebody else has reaped it or it was ended before.
    fn end(&mut self) -> Option<ExitStatus> {
        if !std::mem::replace(&mut self.armed, false) {
            return None;
        }
        let status = self.kill_and_reap();
        // A child that had come as far as its PID file wrote itself into it.
        self.core.rewrite_pid_file();
        status
    }

    fn kill_and_reap(&self) -> Option<ExitStatus> {
        let pid = self.spawned.pid;
        match &self.spawned.pidfd {
            Some(pidfd) => {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
                // SIGKILL ends a stopped process too, but not one that hangs in the kernel.
                if !wait_readable(pidfd, KILLING) {
                    log::error!("child {pid} survives SIGKILL: it hangs in the kernel");
                    return None;
                }
            }
            None => {
                // If somebody else has reaped it, its number may be another process's by now.
                if self.is_unreaped() == Err(Errno::CHILD) {
                    return None;
                }
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        loop {
            match waitpid(Some(pid), WaitOptions::empty()) {
                Err(Errno::INTR) => {}
                Ok(Some((_, status))) => return Some(ExitStatus::from_raw(status.as_raw())),
                // SIGCHLD is ignored, or somebody waits for any child.
                _ => return None,
            }
        }
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

fn wait_readable(fd: &OwnedFd, time: Duration) -> bool {
    let deadline = Instant::now() + time;
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}

fn named(fd: &OwnedFd) -> io::Result<Named> {
    Ok(Named { fd: fd.as_raw_fd(), inode: fstat(fd)?.st_ino })
}

/// Writes as much as goes in without waiting, and removes it from `unsent`.
fn write_some(fd: &OwnedFd, unsent: &mut Vec<u8>) -> rustix::io::Result<()> {
    while !unsent.is_empty() {
        match rustix::io::write(fd, unsent) {
            Ok(n) => drop(unsent.drain(..n)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

// ---- the child --------------------------------------------------------------------------------------------------

/// What a child got from its parent.
pub(crate) struct Inherited {
    /// The parent's generation.
    pub(crate) generation: u64,
    pub(crate) sockets: Vec<(Key, Held)>,
    pub(crate) parent: Parent,
    /// The generations before the parent that still drain, oldest first.
    pub(crate) older: Vec<DrainLink>,
}

/// Step 5: proves that the environment means this process, reads the manifest, adopts the descriptors. `None` means
/// that this is a first generation.
pub(crate) fn inherit() -> Result<Option<Inherited>, Error> {
    let value = env::var_os(VARIABLE);
    let Some(pipes) = value.as_ref().and_then(|value| Pipes::parse(value.to_str()?)) else { return Ok(None) };
    let Some(mut adopter) = Adopter::take() else { return Ok(None) };
    let mut adopt_pipe = |pipe: Named| adopter.adopt(pipe.fd, Some(FileType::Fifo), pipe.inode);
    let (Ok(reader), Ok(writer)) = (adopt_pipe(pipes.manifest), adopt_pipe(pipes.status)) else {
        log::debug!("the handover in the environment is another process's");
        return Ok(None);
    };

    let failed = |what| move |source| Error::Handover { what, source };
    let (manifest, rest) = read_manifest(&reader).map_err(failed("manifest"))?;
    let mut sockets = Vec::with_capacity(manifest.entries.len());
    let mut older = Vec::new();
    for Entry { slot, key, file } in manifest.entries {
        let adopted = adopter.adopt(slot.number as i32, None, slot.inode);
        let fd = adopted.map_err(|source| Error::Socket { key: key.clone(), source })?;
        match key.drain_generation() {
            Some(generation) => older.push(DrainLink { generation, inode: slot.inode, pipe: fd }),
            None => sockets.push((key, Held::new(fd, slot.inode, file))),
        }
    }
    for slot in manifest.unknown {
        // Adopted to be closed: this version has no use for it.
        drop(adopter.adopt(slot.number as i32, None, slot.inode));
        log::info!("closed a descriptor of a kind not known here");
    }
    let generation = manifest.generation;
    let writer = DrainLink { generation, inode: pipes.status.inode, pipe: writer };
    let parent = Parent { reader, writer, lines: Mutex::new(Lines::with(rest)), ended: AtomicBool::new(false) };
    Ok(Some(Inherited { generation, sockets, parent, older }))
}

/// Reads up to the end of the manifest; also gives what came after it.
fn read_manifest(reader: &OwnedFd) -> io::Result<(Manifest, Vec<u8>)> {
    let mut text = Vec::new();
    let deadline = Instant::now() + MANIFEST;
    let length = loop {
        if let Some(length) = Manifest::length(&text)? {
            break length;
        }
        text.reserve(1 << 16);
        match rustix::io::read(reader, spare_capacity(&mut text)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if wait_readable(reader, deadline.saturating_duration_since(Instant::now())) => {}
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    };
    let rest = text.split_off(length);
    Ok((Manifest::decode(&text)?, rest))
}

/// Step 6, after the claims: nothing unclaimed stays open, the PID file names us, and the parent hears `ready`. We
/// serve when it answers `commit`, so that at no time both think they are the one; or when it can answer no more.
pub(crate) fn ready(core: &Core) -> Result<(), Error> {
    core.sockets.close_unclaimed();
    core.write_pid_file()?;
    let Some(parent) = &core.parent else { return Ok(()) };
    match parent.tell(&Status::Ready) {
        // The parent is dead. It has not taken the listeners with it: we have them.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => parent.ended.store(true, Ordering::Relaxed),
        other => other.map_err(|source| Error::Ready { source })?,
    }
    let deadline = Instant::now() + COMMIT;
    loop {
        match parent.next_word() {
            Some(Word::Commit) => return Ok(()),
            // Never before the commit; without it there is nothing to stop.
            Some(Word::Stop) => {}
            None if parent.has_ended() => {
                log::warn!("the parent ended before it could commit: serving without it");
                return Ok(());
            }
            None if wait_readable(&parent.reader, deadline.saturating_duration_since(Instant::now())) => {}
            None => {
                // It is stopped, or hangs, and so accepts nothing. When it goes on, it will read this first.
                log::warn!("the parent did not answer within {COMMIT:?}: serving without it");
                core.tell_parent(&Status::Serving);
                return Ok(());
            }
        }
    }
}

/// The child's end of the two pipes.
#[derive(Debug)]
pub(crate) struct Parent {
    pub(crate) reader: OwnedFd,
    writer: DrainLink,
    lines: Mutex<Lines>,
    ended: AtomicBool,
}

impl Parent {
    /// What the parent has said since; nothing more once it has ended.
    pub(crate) fn next_word(&self) -> Option<Word> {
        if self.has_ended() {
            return None;
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match lines.next(self.reader.as_fd()) {
                // A word that only later versions know.
                Ok(Next::Line(line)) => match Word::parse(&line) {
                    Some(word) => return Some(word),
                    None => log::debug!("the parent said {line:?}"),
                },
                Ok(Next::Wait) => return None,
                Ok(Next::End | Next::Garbage(_)) | Err(_) => {
                    self.ended.store(true, Ordering::Relaxed);
                    return None;
                }
            }
        }
    }

    /// Whether the end of the parent has been read.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Says something that the parent may well be dead to hear.
    pub(crate) fn tell(&self, status: &Status) -> io::Result<()> {
        send(&self.writer.pipe, &status.line())
    }

    /// The status pipe, on which the parent hears that it should end its drain.
    pub(crate) fn drain_link(&self) -> &DrainLink {
        &self.writer
    }

    /// Waits for the end of the parent, which closes the pipe; whatever it still says is left to be read.
    pub(crate) fn wait_end(&self, time: Duration) -> io::Result<bool> {
        let deadline = Instant::now().checked_add(time);
        loop {
            let left = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
            // No event is asked for: POLLHUP comes all the same.
            match poll(&mut [PollFd::new(&self.reader, PollFlags::empty())], left.as_ref()) {
                Err(Errno::INTR) => {}
                result => return Ok(result? > 0),
            }
        }
    }
}

/// The status pipe to an older generation, handed on from child to child.
#[derive(Debug)]
pub(crate) struct DrainLink {
    pub(crate) generation: u64,
    inode: u64,
    pipe: OwnedFd,
}

impl DrainLink {
    /// A pipe whose reader is gone has an error (poll(2)).
    pub(crate) fn lives(&self) -> bool {
        let now = timespec(Duration::ZERO);
        matches!(poll(&mut [PollFd::new(&self.pipe, PollFlags::empty())], Some(&now)), Ok(0))
    }

    pub(crate) fn end_drain(&self) {
        // If it has ended meanwhile, so has its drain.
        let _ = send(&self.pipe, &Status::EndDrain.line());
    }

    fn entry(&self) -> Entry {
        let slot = Slot { number: self.pipe.as_raw_fd() as u32, inode: self.inode };
        Entry { slot, key: Key::drain(self.generation), file: None }
    }
}
