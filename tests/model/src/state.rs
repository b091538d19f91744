//! The state of the whole system at one moment: processes, the links between them, and the events that may still
//! happen.

/// A process, numbered in the order of their start. Process 0 is a first generation.
pub type Pid = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Life {
    Alive,
    /// It was killed or has exited. The kernel has closed its reading ends but not yet its writing ends, which is the
    /// worst order.
    Dying,
    Dead,
}

/// The step that a process has reached. Each step ends with at most one system call that another process can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    // Steps of a new process.
    Manifest,
    Ready,
    WaitCommit,
    Serving,
    LookAgain,
    /// Its messages fail: the parent has given up, or is dying. The messages that still arrive tell which.
    WaitEnd,
    // Steps of a serving process.
    Loop,
    // Steps of the parent of an upgrade.
    WaitReady,
    Pause,
    Commit,
    WaitServing,
    Probation,
    Announce,
    Main,
    Verdict,
    /// Gives up on its child, and then accepts again or stops.
    GiveUp(GiveUp),
    TakeBack,
    WaitTakenBack,
    // Final steps.
    SayStopping,
    Stop,
    /// The parent has taken the commit back: stops accepting, reports it, drains.
    GivenBack,
    /// Was asked to roll back: stops accepting, and reports that.
    RollBack,
    /// Has reported it. `stop` confirms that the parent accepts. The verdict, or the parent's end, means that it does
    /// not.
    WaitAnswer,
    /// Drains, and then exits.
    Over,
    /// Was given up, or received an unusable handover: exits with an error.
    Leave,
    /// Has refused but does not exit, because it does something else or hangs.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GiveUp {
    Say,
    Close,
    Kill,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub life: Life,
    /// Stopped by SIGSTOP.
    pub frozen: bool,
    pub at: At,
    pub accepts: bool,
    /// Requests that are not handled yet.
    pub stop: bool,
    pub upgrade: bool,
    pub rollback: bool,
    /// The verdict was received, or no process can send one.
    pub free: bool,
    /// It knows that the service manager accepts its messages.
    pub main: bool,
    /// The new process of the running upgrade.
    pub child: Option<Pid>,
    /// The requests that were forwarded to it.
    pub passed_stop: bool,
    pub passed_upgrade: bool,
}

impl Process {
    pub fn new(at: At) -> Self {
        Self {
            life: Life::Alive,
            frozen: false,
            at,
            accepts: false,
            stop: false,
            upgrade: false,
            rollback: false,
            free: false,
            main: false,
            child: None,
            passed_stop: false,
            passed_upgrade: false,
        }
    }

    pub fn runs(&self) -> bool {
        self.life == Life::Alive && !self.frozen
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FromParent {
    /// The manifest without its last line.
    Manifest,
    End,
    Commit,
    Stop,
    RequestStop,
    RequestUpgrade,
    Main,
    Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FromChild {
    Ready,
    Refused,
    Serving,
    Stopping,
}

/// How the new process was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Child,
    /// A child whose manifest fills the pipe, so that nothing more can be written until it is read.
    LargeManifest,
    /// A child behind a shell that does not exec. The parent has started, watches and can kill only the shell.
    Wrapped,
    /// A child that starts a helper, which inherits the link and keeps running.
    WithHelper,
    /// A process that takes over.
    Stranger,
}

/// The link between a process and the one that hands over to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    pub parent: Pid,
    pub kind: Kind,
    pub to_child: Vec<FromParent>,
    pub to_parent: Vec<FromChild>,
    /// The parent's ends.
    pub parent_reads: bool,
    pub parent_writes: bool,
    /// The child's reading end.
    pub child_reads: bool,
    /// The shell in front of the child, if it is alive.
    pub wrapper: bool,
    pub given_up: bool,
    /// The child has served and refused: it drains, so it is not killed.
    pub drains: bool,
}

/// A connection in the queue of the listener that all processes share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Connection {
    None,
    /// The kernel has woken one thread of this process for it, and no other.
    Woke(Pid),
    Queued,
}

/// The state of the service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Manager {
    pub main: Pid,
    /// It has requested a reload, and waits for `RELOADING` and then `READY`.
    pub reload: Reload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reload {
    No,
    Asked,
    Reloading,
}

/// The external events that may still happen to the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub deaths: u8,
    pub freezes: u8,
    pub stops: u8,
    pub upgrades: u8,
    pub takeovers: u8,
    pub rollbacks: u8,
    pub refusals: u8,
    pub connections: u8,
    pub reloads: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub processes: Vec<Process>,
    /// By the new process.
    pub links: Vec<Option<Link>>,
    pub manager: Option<Manager>,
    pub connection: Connection,
    pub left: Budget,
    /// The service was stopped.
    pub stopped: bool,
    /// A parent gave a good verdict although the child was already dead.
    pub false_verdict: bool,
    /// A `stop` for a child that can serve could not be sent.
    pub lost_stop: bool,
    /// A process has given the service back, but no process has taken it.
    pub given_away: bool,
}
