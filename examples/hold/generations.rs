//! The generations: the one that serves, which receives the signals and is believed, and those that it replaced.

use std::fs;

use crate::process::{self, descendants, Descendant, Process};
use crate::signals::send;

pub struct Generations {
    /// The generation that serves, or starts.
    main: Option<Process>,
    /// It has sent READY. A server that never does is silent: its successors are known by their command line only.
    pub ready: bool,
    /// The program that it runs.
    program: Vec<u8>,
    /// The process that was started; all later generations are in its session.
    session: i32,
    /// Generations that were replaced, and may drain.
    former: Vec<i32>,
    /// The signals that were sent to the present one, as a mask.
    received: u64,
}

impl Generations {
    pub fn new(program: &[u8]) -> Self {
        let program = program.to_vec();
        Self { main: None, ready: false, program, session: 0, former: Vec::new(), received: 0 }
    }

    pub fn main(&self) -> Option<&Process> {
        self.main.as_ref()
    }

    pub fn is_main(&self, pid: i32) -> bool {
        self.main.as_ref().is_some_and(|main| main.pid == pid)
    }

    pub fn is_former(&self, pid: i32) -> bool {
        self.former.contains(&pid)
    }

    /// The server was started, for the first time or again.
    pub fn started(&mut self, process: Process) {
        (self.session, self.ready, self.received) = (process.pid, false, 0);
        self.main = Some(process);
    }

    /// Another generation serves from now on.
    pub fn replace(&mut self, process: Process) {
        self.former.extend(self.main.take().map(|main| main.pid));
        self.former.retain(|pid| *pid != process.pid);
        self.received = 0;
        self.main = Some(process);
        self.look();
    }

    /// A process has ended. Returns the serving generation if it was that.
    pub fn ended(&mut self, pid: i32) -> Option<Process> {
        self.former.retain(|former| *former != pid);
        self.main.take_if(|main| main.pid == pid)
    }

    /// Updates the program that the main process runs. A script that was started may have executed another one since.
    pub fn look(&mut self) {
        if let Some(program) = self.main.as_ref().and_then(|main| process::program_of(main.pid)) {
            self.program = program;
        }
    }

    /// The generations that live and were not replaced, the youngest last. A successor has executed the same program
    /// itself. A worker was forked without that, and a helper runs another program.
    pub fn successors(&self) -> Vec<Descendant> {
        let mut all = descendants();
        all.retain(|process| !self.is_former(process.pid) && process.runs(&self.program));
        all
    }

    /// Any generation lives, draining or not.
    pub fn any_lives(&self) -> bool {
        self.main.is_some() || descendants().iter().any(|process| process.runs(&self.program))
    }

    /// Sends a signal to the generation that serves.
    ///
    /// Of a silent server this is the youngest that handles the signal: one that was just started has no handler yet and
    /// would be killed, and one that has handed over ignores it. A stop goes to all that handle it. In the middle of an
    /// upgrade the youngest may handle the signal already but not serve yet. If it alone stopped, the upgrade would fail
    /// and the service would continue.
    pub fn send(&mut self, signal: i32, to_all: bool) -> Vec<i32> {
        if let Some(main) = self.main.as_ref().filter(|_| self.ready) {
            main.signal(signal);
            self.received |= 1 << (signal - 1);
            return vec![main.pid];
        }
        let mut pids: Vec<i32> =
            self.successors().iter().filter(|process| process.handles(signal)).map(|process| process.pid).collect();
        if pids.is_empty() {
            pids.extend(self.main.as_ref().map(|main| main.pid));
        } else if !to_all {
            pids.drain(..pids.len() - 1);
        }
        pids.iter().for_each(|pid| send(*pid, signal));
        self.received |= 1 << (signal - 1);
        pids
    }

    /// Whether that signal was sent to the serving generation from here.
    pub fn received(&self, signal: i32) -> bool {
        self.received >> (signal - 1) & 1 == 1
    }

    /// Sends a signal to every process of the service.
    pub fn send_to_all(&self, signal: i32) {
        // Without /proc only the session that was started last is known.
        send(-self.session, signal);
        descendants().iter().for_each(|process| send(process.pid, signal));
    }
}

/// Whether there is a terminal that could send signals.
pub fn terminal_is_there() -> bool {
    fs::File::open("/dev/tty").is_ok()
}
