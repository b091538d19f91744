//! Messages of the server: which process may send which message, and their effect.

use std::time::{Duration, Instant};

use super::{Phase, Service};
use crate::message::Message;
use crate::process::Process;
use crate::say;

/// More messages than the kernel queues: every message sent before now is read, but a flood cannot block `hold`.
const QUEUE: usize = 4096;

impl Service {
    pub(super) fn read_messages(&mut self) {
        for _ in 0..QUEUE {
            let Some(message) = self.inbox.next() else { break };
            let (pid, uid) = (message.pid, message.uid);
            if let Err(why) = self.on_message(message) {
                self.refusals.log(pid, uid, why);
            }
        }
    }

    /// Dropping the message closes the descriptor of a BARRIER, which lets the sender continue.
    fn on_message(&mut self, message: Message) -> Result<(), &'static str> {
        let pid = message.pid;
        message.text()?;
        // A parent whose announced child has died serves again. It may know of that death before this process does.
        let main = message.number("MAINPID");
        let orphaned = matches!(self.phase, Phase::Orphaned(..));
        let is_former = self.generations.is_former(pid);
        let takes_back = is_former && main == Some(pid as u64) && (orphaned || self.generations.can_take_back());
        if is_former && !takes_back {
            self.extend(&message);
            let knows = ["BARRIER", "EXTEND_TIMEOUT_USEC"].iter().any(|name| message.get(name).is_some());
            return knows.then_some(()).ok_or("that generation was replaced");
        }
        if (takes_back || orphaned && message.has("READY=1")) && Process::of(pid).is_ours() {
            self.replace_main(Process::of(pid));
        }
        if !self.generations.is_main(pid) {
            return Err("it is not the generation that serves");
        }
        self.above.send(&message);
        if let Some(main) = main.filter(|main| *main != pid as u64) {
            let next = Process::of(i32::try_from(main).unwrap_or(0));
            if !next.is_ours() {
                return Err("MAINPID is no process of this service");
            }
            self.replace_main(next);
        }
        if message.has("RELOADING=1") {
            (self.upgrade.asked, self.upgrade.is_told) = (false, true);
        }
        if message.has("READY=1") {
            self.on_ready();
        }
        if message.has("STOPPING=1") && !matches!(self.phase, Phase::Stopping { .. }) {
            self.stop("the server ends");
        }
        self.extend(&message);
        if let Some(usec) = message.number("WATCHDOG_USEC") {
            self.watchdog = Some(Duration::from_micros(usec)).filter(|every| !every.is_zero());
        }
        match message.get("WATCHDOG") {
            Some("1") if self.watchdog_at.is_some() => self.rearm_watchdog(),
            Some("trigger") => self.watchdog_at = Some(Instant::now()),
            _ => {}
        }
        self.store_or_remove(message)
    }

    fn store_or_remove(&mut self, message: Message) -> Result<(), &'static str> {
        let name = message.get("FDNAME").unwrap_or_default().to_owned();
        if message.has("FDSTOREREMOVE=1") {
            self.store.remove(&name);
        }
        let (stores, polled) = (message.has("FDSTORE=1"), !message.has("FDPOLL=0"));
        if !stores && !message.fds.is_empty() && message.get("BARRIER").is_none() {
            return Err("descriptors without FDSTORE");
        }
        if stores && matches!(self.phase, Phase::Stopping { .. }) {
            // As in `stop`: clients would connect to a listener that no process serves.
            return Ok(());
        }
        let stored: Vec<_> =
            message.fds.into_iter().filter(|_| stores).map(|fd| self.store.put(&name, fd, polled)).collect();
        stored.into_iter().collect()
    }

    fn on_ready(&mut self) {
        if !self.generations.ready {
            self.generations.look();
            say(&format!("ready pid={}", self.generations.main().map_or(0, |main| main.pid)));
            (self.generations.ready, self.was_ready, self.kill_at) = (true, true, None);
            self.above.is_ready();
        }
        self.rearm_watchdog();
    }

    /// Records that another generation serves now.
    pub(super) fn replace_main(&mut self, next: Process) {
        say(&format!("serves pid={}", next.pid));
        self.generations.replace(next);
        if let Phase::Orphaned(..) = self.phase {
            self.phase = Phase::Running;
        }
        // The upgrade signal reached the previous generation after it had announced this one, so it was ignored. Send it again.
        if self.upgrade.asked && self.upgrade.is_told {
            self.generations.send(self.options.upgrade_signal, false);
        }
    }

    /// Extends the deadline of the stop or start that is in progress.
    fn extend(&mut self, message: &Message) {
        let Some(usec) = message.number("EXTEND_TIMEOUT_USEC") else { return };
        let Some(at) = Instant::now().checked_add(Duration::from_micros(usec)) else { return };
        if let Phase::Stopping { until, .. } = &mut self.phase {
            *until = at.max(*until);
        } else if !self.generations.ready {
            self.kill_at = self.kill_at.map(|until| until.max(at));
        }
    }

    fn rearm_watchdog(&mut self) {
        let watches = matches!(self.phase, Phase::Running);
        self.watchdog_at = self.watchdog.filter(|_| watches).map(|every| Instant::now() + every);
    }
}
