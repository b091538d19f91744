//! The handover protocol as a state machine, and the properties that must hold in each reachable state.
//!
//! The steps of the processes interleave in any order. At each point a process can be killed, stopped and continued. A
//! deadline may pass at any time after it is set: no duration matters, with one exception (see `At::WaitEnd`). The
//! model does not contain individual descriptors, files, or partial stops, which differ from stops only in files.

pub mod page;
mod parent;
pub mod scenarios;
pub mod state;
mod step;
pub mod table;

use stateright::{Model, Property};

use state::*;

/// The property that must be reachable. Otherwise the other properties would mean little.
pub const SUCCEEDS: &str = "an upgrade succeeds";

/// The two carriers of the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A writer can detect without writing that the reading end is closed. Unread data is lost when the reading end
    /// closes.
    Pipes,
    /// A writer detects that only by writing.
    Socket,
}

/// The rules. Each can be removed, to check that it is needed.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub carrier: Carrier,
    /// To give up, the parent first sends `stop`, and keeps its writing end open. Without the rule it closes both
    /// ends and kills the started process.
    pub give_up_says_stop: bool,
    /// A generation upgrades only after its own verdict.
    pub requests_wait: bool,
    /// The parent notices the end of the started process directly, not only by the end of the link.
    pub process_end_is_seen: bool,
    /// The parent notices the end of the child at its writing end too.
    pub error_on_write_end: bool,
    /// The verdict comes after `serving`, even with a short probation.
    pub waits_for_serving: bool,
    /// A thread that was woken for a connection serves it even if accepting was paused in the meantime.
    pub woken_serves: bool,
    /// The manifest's last line is sent only when there is room for `stop` after it.
    pub stop_fits: bool,
    /// A child that rolls back waits for its parent's `stop`, and otherwise accepts again.
    pub rollback_waits: bool,
    /// `stop` counts even if the parent has ended since then.
    pub stop_is_final: bool,
}

impl Rules {
    pub fn new(carrier: Carrier) -> Self {
        Self {
            carrier,
            give_up_says_stop: true,
            requests_wait: true,
            process_end_is_seen: true,
            error_on_write_end: true,
            waits_for_serving: true,
            woken_serves: true,
            stop_fits: true,
            rollback_waits: true,
            stop_is_final: true,
        }
    }
}

/// The bounds of an exploration.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub rules: Rules,
    pub processes: usize,
    pub kinds: Vec<Kind>,
    pub manager: bool,
    pub budget: Budget,
}

/// An event that can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    // Events of the system itself.
    Step(Pid),
    Timeout(Pid),
    Upgrade(Pid, Kind),
    /// The kernel closes the remaining descriptors of a dead process.
    EndFully(Pid),
    /// A shell ends when its command has ended.
    WrapperEnds(Pid),
    /// The thread that was woken accepts.
    Accept(Pid),
    // External events.
    Kill(Pid),
    KillWrapper(Pid),
    Freeze(Pid),
    Continue(Pid),
    AskStop(Pid),
    AskUpgrade(Pid),
    AskRollback(Pid),
    TakeOver(Pid),
    Refuse(Pid),
    Reload,
    /// A client connects, and the kernel wakes a thread of this process.
    Connect(Pid),
}

impl Action {
    /// Whether it happens without an external cause. The system is not at rest while such an event is possible.
    pub fn is_internal(self) -> bool {
        use Action::*;
        matches!(self, Step(_) | Timeout(_) | Upgrade(..) | EndFully(_) | WrapperEnds(_) | Accept(_))
    }
}

impl Protocol {
    pub fn new(carrier: Carrier, budget: Budget) -> Self {
        let rules = Rules::new(carrier);
        Self { rules, processes: 3, kinds: vec![Kind::Child], manager: false, budget }
    }

    pub fn first(&self) -> State {
        let first = Process { accepts: true, free: true, main: true, ..Process::new(At::Loop) };
        State {
            processes: vec![first],
            links: vec![None],
            manager: self.manager.then_some(Manager { main: 0, reload: Reload::No }),
            connection: Connection::None,
            left: self.budget,
            stopped: false,
            false_verdict: false,
            lost_stop: false,
            given_away: false,
        }
    }

    fn apply(&self, s: &State, action: Action) -> Option<State> {
        let mut next = s.clone();
        let left = &mut next.left;
        let spend = |n: &mut u8| n.checked_sub(1).map(|less| *n = less);
        match action {
            Action::Step(p) if s.processes[p].runs() => return step::step(s, p, false, &self.rules),
            Action::Timeout(p) if s.processes[p].runs() => return step::step(s, p, true, &self.rules),
            Action::Upgrade(p, kind) => {
                let process = &s.processes[p];
                let may = process.free || !self.rules.requests_wait;
                let idle = process.runs() && process.at == At::Loop && !process.stop;
                if !(idle && process.upgrade && may && kind != Kind::Stranger) {
                    return None;
                }
                parent::spawn(&mut next, p, kind, self.processes);
                // Without the rule the last line follows immediately, and fills the pipe.
                if let (false, Kind::LargeManifest, Some(c)) = (self.rules.stop_fits, kind, next.processes[p].child) {
                    next.links[c].as_mut()?.to_child.push(FromParent::End);
                }
            }
            Action::EndFully(p) if s.processes[p].life == Life::Dying => next.end_fully(p),
            Action::WrapperEnds(p) if s.processes[p].life == Life::Dead => {
                let link = next.links[p].as_mut().filter(|link| link.wrapper)?;
                link.wrapper = false;
            }
            Action::Accept(p) if s.processes[p].runs() && s.connection == Connection::Woke(p) => {
                next.connection = Connection::None;
            }
            Action::Kill(p) if s.processes[p].life == Life::Alive => {
                spend(&mut left.deaths)?;
                next.end(p);
            }
            Action::KillWrapper(p) => {
                spend(&mut left.deaths)?;
                let link = next.links[p].as_mut().filter(|link| link.wrapper)?;
                link.wrapper = false;
            }
            Action::Freeze(p) if s.processes[p].runs() => {
                spend(&mut left.freezes)?;
                next.processes[p].frozen = true;
            }
            Action::Continue(p) if s.processes[p].life == Life::Alive && s.processes[p].frozen => {
                next.processes[p].frozen = false;
            }
            Action::AskStop(p) if self.hears(s, p) && !s.processes[p].stop => {
                spend(&mut left.stops)?;
                next.processes[p].stop = true;
            }
            Action::AskUpgrade(p) if self.hears(s, p) && !s.processes[p].upgrade => {
                spend(&mut left.upgrades)?;
                next.processes[p].upgrade = true;
            }
            // The parent's own check fails, or an operator sends a request to the child.
            Action::AskRollback(p)
                if matches!(s.processes[p].at, At::Probation | At::Loop) && s.processes[p].runs() =>
            {
                spend(&mut left.rollbacks)?;
                if s.processes[p].at == At::Loop && s.processes[p].free {
                    return None;
                }
                next.processes[p].rollback = true;
            }
            Action::TakeOver(p) => {
                spend(&mut left.takeovers)?;
                let process = &s.processes[p];
                let serves = process.runs() && process.at == At::Loop && process.free && !process.stop;
                if !serves || !parent::spawn(&mut next, p, Kind::Stranger, self.processes) {
                    return None;
                }
            }
            // Before `ready`, or after `commit`, for example because the PID file cannot be written.
            Action::Refuse(p) if s.processes[p].runs() && matches!(s.processes[p].at, At::Ready | At::Serving) => {
                spend(&mut left.refusals)?;
                let link = next.links[p].as_mut()?;
                if link.parent_reads {
                    link.to_parent.push(FromChild::Refused);
                }
                link.child_reads = false;
                next.processes[p].at = At::Refused;
            }
            Action::Reload => {
                spend(&mut left.reloads)?;
                let manager = next.manager.as_mut().filter(|m| m.reload == Reload::No)?;
                manager.reload = Reload::Asked;
                let main = manager.main;
                if !self.hears(s, main) {
                    return None;
                }
                next.processes[main].upgrade = true;
            }
            Action::Connect(p) if s.processes[p].runs() && s.processes[p].accepts => {
                spend(&mut left.connections)?;
                if s.connection != Connection::None {
                    return None;
                }
                next.connection = Connection::Woke(p);
            }
            _ => return None,
        }
        Some(next)
    }

    /// Whether a signal to this process still has an effect.
    fn hears(&self, s: &State, p: Pid) -> bool {
        let ended = matches!(s.processes[p].at, At::Over | At::Leave | At::Refused | At::Stop | At::GivenBack);
        s.processes[p].life == Life::Alive && !ended
    }

    fn candidates(&self, s: &State, actions: &mut Vec<Action>) {
        use Action::*;
        for p in 0..s.processes.len() {
            actions.extend([Step(p), Timeout(p), EndFully(p), WrapperEnds(p), Accept(p)]);
            if s.processes[p].upgrade && s.processes[p].at == At::Loop {
                actions.extend(self.kinds.iter().map(|kind| Upgrade(p, *kind)));
            }
            actions.extend([Kill(p), KillWrapper(p), Freeze(p), Continue(p), AskStop(p), AskUpgrade(p)]);
            actions.extend([AskRollback(p), TakeOver(p), Refuse(p), Connect(p)]);
        }
        actions.push(Reload);
    }

    /// Returns all events that can happen next.
    pub fn next(&self, s: &State) -> Vec<(Action, State)> {
        let mut actions = Vec::new();
        self.candidates(s, &mut actions);
        actions.into_iter().filter_map(|action| Some((action, self.apply(s, action)?))).collect()
    }

    /// Whether nothing more happens without an external event.
    pub fn rests(&self, s: &State) -> bool {
        let mut actions = Vec::new();
        self.candidates(s, &mut actions);
        !actions.into_iter().any(|action| action.is_internal() && self.apply(s, action).is_some())
    }

    // ---- what must hold ---------------------------------------------------------------------------------------------

    /// At most one process accepts. Exception: a process that continues after a freeze, or whose peer does,
    /// until it has read its messages.
    fn one_accepts(&self, s: &State) -> bool {
        let accepting = (0..s.processes.len()).filter(|p| s.processes[*p].runs() && s.processes[*p].accepts);
        accepting.filter(|p| !self.has_mail(s, *p)).count() <= 1
    }

    /// Whether the next step of a process is to read or do something that ends its accepting.
    fn has_mail(&self, s: &State, p: Pid) -> bool {
        let process = &s.processes[p];
        let told = s.links[p].as_ref().is_some_and(|link| {
            !process.free
                && (link.to_child.contains(&FromParent::Stop) || link.to_child.contains(&FromParent::RequestStop))
        });
        let hears = process.child.is_some_and(|c| s.link(c).to_parent.contains(&FromChild::Serving));
        told || hears || matches!(process.at, At::Pause | At::GivenBack | At::SayStopping)
    }

    /// When the system is at rest: if a process may serve, some process does.
    fn someone_accepts(&self, s: &State) -> bool {
        let may = |process: &&Process| process.runs() && !matches!(process.at, At::Over | At::Leave | At::Refused);
        s.stopped || !self.rests(s) || s.processes.iter().filter(may).all(|process| process.accepts)
    }

    fn nobody_waits(&self, s: &State) -> bool {
        if !self.rests(s) {
            return true;
        }
        let parent_is_frozen = |p: Pid| s.links[p].as_ref().is_some_and(|link| s.processes[link.parent].frozen);
        let rests = |p: Pid| match s.processes[p].at {
            At::Refused => true,
            At::Loop => {
                let Process { free, stop, upgrade, .. } = s.processes[p];
                // Only a frozen parent can delay a verdict, and so an upgrade.
                !stop && if free { !upgrade } else { parent_is_frozen(p) }
            }
            _ => false,
        };
        let client = match s.connection {
            Connection::Queued => !s.processes.iter().any(|process| process.runs() && process.accepts),
            Connection::Woke(p) => s.processes[p].frozen,
            Connection::None => true,
        };
        // A main process that has ended or is stopped cannot answer the service manager, which notices that.
        let cannot = |main: Pid| !s.processes[main].runs() || (!s.processes[main].free && parent_is_frozen(main));
        let reload = s.manager.is_none_or(|m| m.reload == Reload::No || cannot(m.main) || s.stopped);
        client && reload && (0..s.processes.len()).all(|p| !s.processes[p].runs() || rests(p))
    }

    /// A child with a good verdict was alive and served. A child that was given up does not serve in the end.
    fn the_verdict_is_true(&self, s: &State) -> bool {
        let given_up = |p: Pid| s.links[p].as_ref().is_some_and(|link| link.given_up);
        let serves_on = |p: Pid| s.processes[p].runs() && s.processes[p].accepts && given_up(p);
        !s.false_verdict && (!self.rests(s) || !(0..s.processes.len()).any(serves_on))
    }

    fn stopped_stays_stopped(&self, s: &State) -> bool {
        !s.stopped || !self.rests(s) || !s.processes.iter().any(|process| process.runs() && process.accepts)
    }

    /// A service manager ends the service with its main process.
    fn the_main_process_lives(&self, s: &State) -> bool {
        let Some(manager) = s.manager else { return true };
        let main = &s.processes[manager.main];
        s.stopped || !(main.life != Life::Alive && main.at == At::Over) || !s.processes.iter().any(|p| p.accepts)
    }

    fn no_stop_is_lost(&self, s: &State) -> bool {
        !s.lost_stop
    }

    fn a_rollback_has_a_taker(&self, s: &State) -> bool {
        !s.given_away
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.candidates(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.apply(state, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one accepts", Self::one_accepts),
            Property::always("someone accepts", Self::someone_accepts),
            Property::always("nothing waits forever", Self::nobody_waits),
            Property::always("the verdict is true", Self::the_verdict_is_true),
            Property::always("stopped stays stopped", Self::stopped_stays_stopped),
            Property::always("the main process lives", Self::the_main_process_lives),
            Property::always("no stop is lost", Self::no_stop_is_lost),
            Property::always("a rollback has a taker", Self::a_rollback_has_a_taker),
            Property::sometimes(SUCCEEDS, |_, s: &State| s.processes.len() > 1 && s.processes[1].free),
        ]
    }
}
