//! What is known of the whole system at one moment: processes, the links between them, and what may still go wrong.

/// A process, by the order in which they began. Process 0 is a first generation.
pub type Pid = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Life {
    Alive,
    /// It has been killed or has exited, and the kernel has closed what it reads but not yet what it writes: the worst order.
    Dying,
    Dead,
}

/// Where a process is. Each value ends with at most one system call that another process can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    // A new process.
    Manifest,
    Ready,
    WaitCommit,
    Serving,
    LookAgain,
    /// Its messages fail: the parent has given up, or is dying. The messages that are still to come tell which.
    WaitEnd,
    // One that serves.
    Loop,
    // The parent of an upgrade.
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
    // Ways to end.
    SayStopping,
    Stop,
    /// The parent has taken back the commit: stop accepting, say so, drain.
    GivenBack,
    /// Was asked to roll back: stop accepting, say so.
    RollBack,
    /// Has said so. `stop` confirms that the parent accepts; the verdict, or the parent's end, says that it does not.
    WaitAnswer,
    /// Drains, and then exits.
    Over,
    /// Was given up, or got an unusable handover: exits with an error.
    Leave,
    /// Has refused and does not exit: a process that does something else, or hangs.
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
    /// SIGSTOP.
    pub frozen: bool,
    pub at: At,
    pub accepts: bool,
    /// Asked for and not dealt with.
    pub stop: bool,
    pub upgrade: bool,
    pub rollback: bool,
    /// The verdict was given, or there is nobody to give one.
    pub free: bool,
    /// It knows that the service manager listens to it.
    pub main: bool,
    /// The new process of the upgrade under way.
    pub child: Option<Pid>,
    /// What was passed on to that.
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

/// How the new process came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Child,
    /// A child whose manifest fills the pipe, so that nothing more goes in until it is read.
    LargeManifest,
    /// Behind a shell that does not exec: what the parent started, sees the end of and can kill is the shell.
    Wrapped,
    /// It starts a helper that inherits the link and lives on.
    WithHelper,
    /// It has asked to take over.
    Stranger,
}

/// The link to a process from the one that hands over to it.
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
    /// A shell before the child, that lives.
    pub wrapper: bool,
    pub given_up: bool,
    /// The child has served and refused: it drains, so it is not killed.
    pub drains: bool,
}

/// A connection in the queue of the listener that all share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Connection {
    None,
    /// The kernel has woken one thread for it, of this process. Nobody else is woken.
    Woke(Pid),
    Queued,
}

/// The service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Manager {
    pub main: Pid,
    /// It has asked for a reload, and waits for `RELOADING` and then `READY`.
    pub reload: Reload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reload {
    No,
    Asked,
    Reloading,
}

/// What may still happen to the system from outside.
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
    /// A parent has found its child good at a moment at which the child was dead.
    pub false_verdict: bool,
    /// A `stop` that a child able to serve was to get did not go out.
    pub lost_stop: bool,
    /// A process has given the service back to nobody.
    pub given_away: bool,
}
