//! Generates the guide's table of the process that serves after each event.
//!
//! Here deadlines are long: one passes only when nothing else can happen. So a cell shows what happens in practice,
//! whereas the exploration covers everything that is possible.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write;

use crate::state::*;
use crate::{Action, Carrier, Protocol};

/// Whether this is the moment, given the steps of the two processes.
type IsMoment = fn(&Process, &Process) -> bool;

/// The moments of an upgrade, one per column.
const MOMENTS: [(&str, IsMoment); 6] = [
    ("child starts", |p, c| p.at == At::WaitReady && matches!(c.at, At::Manifest | At::Ready)),
    ("`ready` sent", |p, c| p.at == At::WaitReady && c.at == At::WaitCommit),
    ("paused", |p, c| p.at == At::Commit && c.at == At::WaitCommit),
    ("`commit` sent", |p, c| p.at == At::WaitServing && !c.accepts),
    ("probation", |p, c| p.at == At::Probation && c.accepts),
    ("`verdict` sent", |p, _| p.at == At::Over),
];

const PARENT: Pid = 0;
const CHILD: Pid = 1;

/// The events at that moment, then those once the system is at rest, and so on.
type Event = &'static [&'static [Action]];

fn events() -> [(&'static str, Kind, Event); 21] {
    use Action::*;
    [
        ("nothing", Kind::Child, &[&[]]),
        ("parent killed", Kind::Child, &[&[Kill(PARENT)]]),
        ("child killed", Kind::Child, &[&[Kill(CHILD)]]),
        ("both killed", Kind::Child, &[&[Kill(PARENT), Kill(CHILD)]]),
        ("shell before the child killed", Kind::Wrapped, &[&[KillWrapper(CHILD)]]),
        ("child killed, its helper lives", Kind::WithHelper, &[&[Kill(CHILD)]]),
        ("parent frozen", Kind::Child, &[&[Freeze(PARENT)]]),
        ("… and continued later", Kind::Child, &[&[Freeze(PARENT)], &[Continue(PARENT)]]),
        ("… or killed later", Kind::Child, &[&[Freeze(PARENT)], &[Kill(PARENT)]]),
        ("child frozen", Kind::Child, &[&[Freeze(CHILD)]]),
        ("… and continued later", Kind::Child, &[&[Freeze(CHILD)], &[Continue(CHILD)]]),
        ("the same behind a shell", Kind::Wrapped, &[&[Freeze(CHILD)], &[Continue(CHILD)]]),
        ("parent asked to stop", Kind::Child, &[&[AskStop(PARENT)]]),
        ("child asked to stop", Kind::Child, &[&[AskStop(CHILD)]]),
        ("parent asked for another upgrade", Kind::Child, &[&[AskUpgrade(PARENT)]]),
        ("child asked for another upgrade", Kind::Child, &[&[AskUpgrade(CHILD)]]),
        ("parent's check fails", Kind::Child, &[&[AskRollback(PARENT)]]),
        ("child asked to roll back", Kind::Child, &[&[AskRollback(CHILD)]]),
        ("… and parent killed", Kind::Child, &[&[AskRollback(CHILD), Kill(PARENT)]]),
        ("… and parent frozen", Kind::Child, &[&[AskRollback(CHILD), Freeze(PARENT)]]),
        ("… and continued later", Kind::Child, &[&[AskRollback(CHILD), Freeze(PARENT)], &[Continue(PARENT)]]),
    ]
}

/// Returns all states in which the system can come to rest.
fn rest(model: &Protocol, from: Vec<State>) -> HashSet<State> {
    let (mut seen, mut todo, mut resting): (HashSet<_>, _, _) = (HashSet::new(), from, HashSet::new());
    while let Some(state) = todo.pop() {
        if !seen.insert(state.clone()) {
            continue;
        }
        let next: Vec<_> = model.next(&state).into_iter().filter(|(action, _)| action.is_internal()).collect();
        let at_once = next.iter().any(|(action, _)| !matches!(action, Action::Timeout(_)));
        let mut any = false;
        for (action, state) in next {
            if !(at_once && matches!(action, Action::Timeout(_))) {
                any = true;
                todo.push(state);
            }
        }
        if !any {
            resting.insert(state);
        }
    }
    resting
}

/// Returns the states of an undisturbed upgrade.
fn undisturbed(model: &Protocol) -> HashSet<State> {
    let mut first = model.first();
    first.processes[PARENT].upgrade = true;
    let (mut seen, mut todo) = (HashSet::new(), vec![first]);
    while let Some(state) = todo.pop() {
        if seen.insert(state.clone()) {
            let next = model.next(&state).into_iter().filter(|(action, _)| action.is_internal());
            // The probation ends at a deadline.
            let probation = state.processes[PARENT].at == At::Probation;
            let late = |action: &Action| matches!(action, Action::Timeout(p) if !(probation && *p == PARENT));
            todo.extend(next.filter(|(action, _)| !late(action)).map(|(_, state)| state));
        }
    }
    seen
}

fn who_serves(state: &State) -> String {
    let name = |p: Pid| ["parent", "child", "third"][p.min(2)];
    let serving = |p: &Pid| state.processes[*p].runs() && state.processes[*p].accepts;
    let mut names: Vec<String> = (0..state.processes.len()).filter(serving).map(|p| name(p).into()).collect();
    if names.is_empty() {
        // A stopped process will accept when it continues.
        let will = |process: &Process| process.accepts || process.at == At::LookAgain;
        let frozen = |p: &Pid| state.processes[*p].frozen && will(&state.processes[*p]);
        names.extend((0..state.processes.len()).filter(frozen).map(|p| format!("({})", name(p))));
    }
    match names.as_slice() {
        [] => "–".into(),
        names => names.join(" and "),
    }
}

/// Returns the text of one cell: the process that serves in the end.
fn cell(kind: Kind, event: Event, is_moment: IsMoment) -> String {
    let budget = Budget { deaths: 2, freezes: 1, stops: 1, upgrades: 1, rollbacks: 1, ..Budget::default() };
    let mut model = Protocol::new(Carrier::Pipes, budget);
    model.kinds = vec![kind];
    // An event that cannot happen at that moment changes nothing.
    let now = |s: &State, action: &Action| {
        model.next(s).into_iter().find(|(a, _)| a == action).map_or_else(|| s.clone(), |(_, next)| next)
    };
    let mut after = BTreeSet::new();
    for state in undisturbed(&model) {
        if !(state.processes.len() > CHILD && is_moment(&state.processes[PARENT], &state.processes[CHILD])) {
            continue;
        }
        if state.processes.iter().any(|process| process.life == Life::Dying) {
            continue;
        }
        let mut end = HashSet::from([state]);
        for actions in event {
            let begun = end.iter().map(|state| actions.iter().fold(state.clone(), |state, action| now(&state, action)));
            end = rest(&model, begun.collect());
        }
        after.extend(end.iter().map(who_serves));
    }
    after.into_iter().collect::<Vec<_>>().join(" or ")
}

/// Returns the table as Markdown.
pub fn table() -> String {
    let mut out = String::from("| what happens |");
    for (moment, _) in MOMENTS {
        write!(out, " {moment} |").unwrap();
    }
    out.push_str("\n|---|");
    out.push_str(&"---|".repeat(MOMENTS.len()));
    out.push('\n');
    for (name, kind, event) in events() {
        write!(out, "| {name} |").unwrap();
        for (_, is_moment) in MOMENTS {
            write!(out, " {} |", cell(kind, event, is_moment)).unwrap();
        }
        out.push('\n');
    }
    out
}
