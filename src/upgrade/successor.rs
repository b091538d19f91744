//! The new process of an upgrade, and the link to it. Dropping it gives up on the process.

use std::collections::HashSet;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::process::Signal;

use crate::error::Error;
use crate::event_loop::{EventLoop, Phase, Wake};
use crate::exit::ExitReason;
use crate::generation::Generation;
use crate::handover::lines::{preview, FromChild, FromParent, Lines, Read, COMMIT};
use crate::handover::link::ChildLink;
use crate::shutdown::{End, EndSignal};
use crate::sys::child::{Process, LOOK};
use crate::sys::poll::Deadline;
use crate::triggers::request::{Action, Reply, Request};

/// How long a child that has closed its status pipe may take to exit.
const ENDING: Duration = Duration::from_millis(200);

/// How long a child that has refused may take to exit.
const REFUSING: Duration = Duration::from_secs(1);

/// The new process, and the link to it.
///
/// While it is `armed`, dropping it gives up on the process, so that no early return or panic leaves a process behind.
pub(super) struct Successor<'a> {
    generation: &'a Generation,
    pub(super) process: Process,
    pub(super) link: ChildLink,
    /// The program that a child was started to run; empty for a process that takes over.
    pub(super) program: PathBuf,
    /// The listeners that it has not claimed, by inode.
    pub(super) dropped: HashSet<u64>,
    /// It has stopped accepting and finishes its connections, so it must not be killed.
    pub(super) drains: bool,
    armed: bool,
}

impl<'a> Successor<'a> {
    pub(super) fn new(generation: &'a Generation, process: Process, link: ChildLink, program: PathBuf) -> Self {
        Self { generation, process, link, program, dropped: HashSet::new(), drains: false, armed: true }
    }

    /// Returns what to poll for messages and for the end of the process, and when to check again in any case.
    pub(super) fn poll_for(&self) -> (Vec<(BorrowedFd<'_>, PollFlags)>, Deadline) {
        let (mut fds, mut again) = self.link.poll_for();
        // Usually the link ends with the process. But one of its children may hold the link open.
        match &self.process.pidfd {
            Some(pidfd) => fds.push((pidfd.as_fd(), PollFlags::IN)),
            // No event reports the end of this child, so check periodically.
            None if self.process.is_child() => again = again.min(Deadline::after(LOOK)),
            None => {}
        }
        (fds, again)
    }

    /// Returns the next message, if there is one. The end of the process is an error.
    pub(super) fn next_message(&mut self) -> Result<Option<FromChild>, Error> {
        let mut next = self.link.next();
        if matches!(next, Ok(Read::Wait)) {
            if !self.link.is_deaf() && !self.ends_within(Duration::ZERO) {
                return Ok(None);
            }
            // Messages that it sent before its end are read first.
            next = self.link.next();
        }
        let received = match next {
            Ok(Read::Line(line)) => match FromChild::parse(&line) {
                Some(message) => return Ok(Some(message)),
                None => preview(line.as_bytes()),
            },
            Ok(Read::Garbage(received)) => received,
            _ => return Err(self.link_ended()),
        };
        Err(Error::Garbage { pid: self.process.pid(), received })
    }

    /// Handles the end of the link, which should mean the end of the process.
    pub(super) fn link_ended(&mut self) -> Error {
        let pid = self.process.pid();
        // A process closes its descriptors shortly before it has ended.
        let by_itself = self.ends_within(ENDING);
        let lives_on = !by_itself && !self.process.is_child() && self.process.pidfd.is_some();
        match self.give_up() {
            Some(status) if !by_itself && status.signal() == Some(Signal::KILL.as_raw()) => Error::ChildSilent { pid },
            None if lives_on => Error::ChildLivesOn { pid },
            status => Error::ChildEnded { pid, status },
        }
    }

    /// Call this after a successful upgrade. From then on the process is not ended any more.
    pub(super) fn keep(mut self) {
        self.armed = false;
        if let Some((from, lines)) = self.link.keep() {
            self.generation
                .shutdown
                .drains()
                .add_end_signal(Arc::new(LaterGenerations { from, lines: Mutex::new(lines) }));
        }
    }

    /// Returns whether the process ends within this time.
    fn ends_within(&self, time: Duration) -> bool {
        self.process.ends_before(Deadline::after(time))
    }

    /// A child that has refused is about to exit. It is not killed immediately, because the operator needs its last log
    /// lines. Requests are handled during this wait, and a stop ends it.
    pub(super) fn let_end(&self, event_loop: &mut EventLoop<'_>) {
        let deadline = Deadline::after(REFUSING);
        while self.process.is_child() && !deadline.has_passed() && !self.ends_within(Duration::ZERO) {
            let fds: Vec<_> = self.process.pidfd.iter().map(|pidfd| (pidfd.as_fd(), PollFlags::IN)).collect();
            let until = if fds.is_empty() { deadline.min(Deadline::after(LOOK)) } else { deadline };
            if !matches!(event_loop.wait(Phase::Upgrading, &fds, until), Ok(Wake::Ready | Wake::Deadline)) {
                break;
            }
        }
    }

    /// Takes the service back from a process that serves. It answers when it has stopped accepting, and then drains.
    pub(super) fn roll_back(&mut self, reason: String) -> Error {
        let (pid, deadline) = (self.process.pid(), Deadline::after(COMMIT));
        let _ = self.link.send(FromParent::Stop);
        let mut stopping = false;
        while !self.drains {
            match self.link.next() {
                Ok(Read::Line(line)) => {
                    stopping |= self.take_stop(&line);
                    self.drains = matches!(FromChild::parse(&line), Some(FromChild::Refused(_)));
                }
                Ok(Read::Wait) if !self.link.is_deaf() && self.link.wait(deadline) => {}
                // It does not answer, so it is killed when this is dropped.
                _ => break,
            }
        }
        self.drains |= stopping;
        Error::Refused { pid, reason }
    }

    /// Requests a stop if this message of a process that is given up says that the service was asked to stop, because
    /// that request has reached only that process.
    fn take_stop(&self, line: &str) -> bool {
        let stopping = FromChild::parse(line) == Some(FromChild::Stopping);
        if stopping {
            self.generation.calls.post(Request::new(Action::Stop, ExitReason::Call, Reply::Nobody));
        }
        stopping
    }

    /// Gives up on the process, whatever its state. Returns the exit status of a child, unless it was already given up
    /// or another part of the program has reaped it.
    ///
    /// The started process is not always the one that received the handover: it may be a shell that waits for its
    /// child, or it may have daemonized. Killing it does not reach the receiver, which would mistake a closed link for
    /// the death of this process, and serve. So the receiver gets `stop`, its further messages fail, and the link stays
    /// open until it has closed its own end.
    fn give_up(&mut self) -> Option<ExitStatus> {
        if !mem::replace(&mut self.armed, false) {
            return None;
        }
        let sent = self.link.is_sent() && self.link.send(FromParent::Stop).is_ok();
        while let Ok(Read::Line(line)) = self.link.next() {
            self.take_stop(&line);
        }
        self.link.stop_receiving();
        let status = match self.drains {
            true => self.process.reap_later(),
            false => self.process.kill_and_reap(),
        };
        if sent {
            self.link.hold_open();
        }
        // The process may already have written its PID file.
        self.generation.pid_file.rewrite();
        status
    }
}

impl Drop for Successor<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// The child's end of the link, on which any later generation can ask this one to end its drain.
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
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match lines.next(self.fd()) {
                Ok(Read::Line(line)) => {
                    if let Some(FromChild::EndDrain(within)) = FromChild::parse(&line) {
                        return End::Within(within);
                    }
                }
                Ok(Read::Wait) => return End::Continue,
                Ok(Read::End | Read::Garbage(_)) | Err(_) => return End::Gone,
            }
        }
    }
}
