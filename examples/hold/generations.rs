//! The generations: the one that serves, which receives the signals and may send messages, and those that it replaced.

use std::fs;
use std::time::{Duration, Instant};

use crate::process::{self, descendants, Descendant, Process};
use crate::signals::send;

/// How long after its announcement a successor that dies may give the service back. The upgrade ends when `hold` has
/// confirmed the announcement.
const ANNOUNCED: Duration = Duration::from_secs(5);

/// The maximum number of looks for generations, if processes start and end all the time.
const LOOKS: usize = 20;

pub struct Generations {
    /// The generation that serves, or starts.
    main: Option<Process>,
    /// It has sent READY. A server that never sends it is called silent: only the command line identifies its successors.
    pub ready: bool,
    /// The program that the serving generation runs.
    program: Vec<u8>,
    /// The process that was started; all later generations are in its session.
    session: i32,
    /// Generations that were replaced, and may still drain.
    former: Vec<i32>,
    /// The last of them, and when it was replaced.
    replaced: Option<(i32, Instant)>,
    /// The signals that were sent to the serving generation, as a mask.
    received: u64,
}

impl Generations {
    pub fn new(program: &[u8]) -> Self {
        let program = program.to_vec();
        Self { main: None, ready: false, program, session: 0, former: Vec::new(), replaced: None, received: 0 }
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

    /// Records that the server was started or restarted.
    pub fn started(&mut self, process: Process) {
        (self.session, self.ready, self.received) = (process.pid, false, 0);
        self.main = Some(process);
    }

    /// Records that another generation serves from now on.
    pub fn replace(&mut self, process: Process) {
        if let Some(main) = self.main.take() {
            self.former.push(main.pid);
            self.replaced = Some((main.pid, Instant::now()));
        }
        self.former.retain(|pid| *pid != process.pid);
        self.received = 0;
        self.main = Some(process);
        self.look();
    }

    /// Whether the generation that was replaced last is alive and can still take the service back from its successor.
    pub fn can_take_back(&self) -> bool {
        self.replaced.is_some_and(|(pid, at)| self.is_former(pid) && at.elapsed() < ANNOUNCED)
    }

    /// Records that a process has ended. Returns the serving generation if it was that process.
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

    /// Returns the generations that are alive and were not replaced, the youngest last. A successor has executed the same
    /// program itself, whereas a worker was only forked and a helper runs another program.
    pub fn successors(&self) -> Vec<Descendant> {
        self.generations(|pid| !self.is_former(pid))
    }

    /// Whether any generation is alive, draining or not.
    pub fn any_lives(&self) -> bool {
        self.main.is_some() || !self.generations(|_| true).is_empty()
    }

    /// While this reads /proc, a generation that it has read may end, and the next one may start too late to be read. So
    /// it finds none only if nothing has changed since the last look.
    fn generations(&self, wanted: impl Fn(i32) -> bool) -> Vec<Descendant> {
        let mut before = None;
        for _ in 0..LOOKS {
            let mut all = descendants();
            let pids: Vec<i32> = all.iter().map(|process| process.pid).collect();
            all.retain(|process| wanted(process.pid) && process.runs(&self.program));
            if !all.is_empty() || before.as_ref() == Some(&pids) {
                return all;
            }
            before = Some(pids);
        }
        Vec::new()
    }

    /// Sends a signal to the generation that serves.
    ///
    /// For a silent server this is the youngest generation that handles the signal: one that has just been started has no
    /// handler yet and would be killed, and one that has handed over ignores it. A stop goes to all that handle it, because
    /// in the middle of an upgrade the youngest may already handle the signal but not yet serve. If only that one stopped,
    /// the upgrade would fail and the service would continue.
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

    /// Whether `hold` has sent that signal to the serving generation.
    pub fn received(&self, signal: i32) -> bool {
        self.received >> (signal - 1) & 1 == 1
    }

    /// Sends a signal to every process of the service.
    pub fn send_to_all(&self, signal: i32) {
        // Without /proc, only the most recently started session is known.
        send(-self.session, signal);
        descendants().iter().for_each(|process| send(process.pid, signal));
    }
}

/// Whether there is a terminal that could send signals.
pub fn terminal_is_there() -> bool {
    fs::File::open("/dev/tty").is_ok()
}
