//! The parent's half of an upgrade.

use crate::state::*;
use crate::Rules;

/// Begins an upgrade. Returns false if the exploration already has the maximum number of processes.
pub fn spawn(state: &mut State, p: Pid, kind: Kind, most: usize) -> bool {
    let process = &mut state.processes[p];
    process.upgrade = false;
    if state.processes.len() == most {
        end_reload(state, p);
        return false;
    }
    begin_reload(state, p);
    let c = state.processes.len();
    state.processes.push(Process::new(At::Manifest));
    let to_child = match kind {
        Kind::LargeManifest => vec![FromParent::Manifest],
        _ => vec![FromParent::Manifest, FromParent::End],
    };
    state.links.push(Some(Link {
        parent: p,
        kind,
        to_child,
        to_parent: Vec::new(),
        parent_reads: true,
        parent_writes: true,
        child_reads: true,
        wrapper: kind == Kind::Wrapped,
        given_up: false,
        drains: false,
    }));
    let process = &mut state.processes[p];
    process.at = At::WaitReady;
    process.child = Some(c);
    (process.passed_stop, process.passed_upgrade, process.rollback) = (false, false, false);
    true
}

fn begin_reload(state: &mut State, p: Pid) {
    let knows = state.processes[p].main;
    if let Some(manager) = state.manager.as_mut().filter(|m| m.main == p && knows && m.reload == Reload::Asked) {
        manager.reload = Reload::Reloading;
    }
}

/// Sends `RELOADING`, if that is due, and `READY`.
fn end_reload(state: &mut State, p: Pid) {
    begin_reload(state, p);
    let knows = state.processes[p].main;
    if let Some(manager) = state.manager.as_mut().filter(|m| m.main == p && knows && m.reload == Reload::Reloading) {
        manager.reload = Reload::No;
    }
}

/// The messages and events that a parent has received from its child.
#[derive(Default)]
struct Seen {
    ready: bool,
    refused: bool,
    serving: bool,
    stopping: bool,
    /// The end of its link.
    link_ended: bool,
    process_ended: bool,
}

impl Seen {
    fn ended(&self) -> bool {
        self.link_ended || self.process_ended
    }
}

/// Reads all pending messages.
fn hear(state: &mut State, c: Pid, rules: &Rules) -> Seen {
    let mut seen = Seen::default();
    for message in std::mem::take(&mut state.link_mut(c).to_parent) {
        match message {
            FromChild::Ready => seen.ready = true,
            FromChild::Refused => seen.refused = true,
            FromChild::Serving => seen.serving = true,
            FromChild::Stopping => seen.stopping = true,
        }
    }
    seen.link_ended = !state.writer_lives(c) || (rules.error_on_write_end && !state.reader_lives(c));
    seen.process_ended = rules.process_end_is_seen && state.started_ended(c);
    seen
}

/// The last step of a failed upgrade.
fn resume(state: &mut State, p: Pid, rules: &Rules) {
    let process = &mut state.processes[p];
    process.child = None;
    process.stop |= process.passed_stop;
    process.upgrade |= process.passed_upgrade;
    end_reload(state, p);
    if state.processes[p].stop {
        state.pause(p, rules);
        state.processes[p].at = At::SayStopping;
    } else {
        state.accept(p);
        state.processes[p].at = At::Loop;
    }
}

/// Forwards requests to the child. Returns false if the child no longer reads.
fn pass_on(state: &mut State, p: Pid, c: Pid) -> bool {
    let process = &state.processes[p];
    let stranger = state.link(c).kind == Kind::Stranger;
    let (stop, upgrade) = (process.stop && !process.passed_stop && !stranger, process.upgrade);
    if stop {
        if !state.say(c, FromParent::RequestStop) {
            return false;
        }
        let process = &mut state.processes[p];
        (process.passed_stop, process.stop) = (true, false);
    }
    if upgrade {
        begin_reload(state, p);
        if !state.say(c, FromParent::RequestUpgrade) {
            return false;
        }
        let process = &mut state.processes[p];
        (process.passed_upgrade, process.upgrade) = (true, false);
    }
    true
}

/// The next step of `p`, whose child is `c`.
pub fn step(s: &mut State, p: Pid, c: Pid, timeout: bool, rules: &Rules) -> Option<()> {
    // Everything is read before each decision. A deadline counts only if nothing was read.
    let at = s.processes[p].at;
    let wait = matches!(at, At::WaitReady | At::WaitServing | At::Probation | At::WaitTakenBack);
    if timeout && (!wait || !s.link(c).to_parent.is_empty()) {
        return None;
    }
    match at {
        At::WaitReady => {
            let seen = hear(s, c, rules);
            let stop = s.processes[p].stop;
            let link = s.link_mut(c);
            if link.kind == Kind::LargeManifest && link.to_child.is_empty() && s.processes[c].at == At::Manifest {
                s.link_mut(c).to_child.push(FromParent::End);
            } else if seen.ready {
                // Later messages are handled in the next step.
                let link = s.link_mut(c);
                link.to_parent.extend(seen.serving.then_some(FromChild::Serving));
                link.to_parent.extend(seen.refused.then_some(FromChild::Refused));
                link.to_parent.extend(seen.stopping.then_some(FromChild::Stopping));
                s.processes[p].at = At::Pause;
            } else if seen.refused || seen.ended() || stop || timeout {
                s.processes[p].at = At::GiveUp(GiveUp::Say);
            } else {
                return None;
            }
        }
        At::Pause => {
            s.pause(p, rules);
            s.processes[p].at = At::Commit;
        }
        At::Commit => {
            let goes = s.say(c, FromParent::Commit);
            s.processes[p].at = match (goes, rules.waits_for_serving) {
                (true, true) => At::WaitServing,
                (true, false) => At::Announce,
                (false, _) => At::GiveUp(GiveUp::Say),
            };
        }
        At::WaitServing => {
            let seen = hear(s, c, rules);
            s.link_mut(c).drains = seen.serving && seen.refused;
            // It has rolled back, and may then have served again and stopped.
            s.processes[p].stop |= seen.refused && seen.stopping;
            if seen.stopping && !seen.refused {
                s.processes[p].at = At::Over;
            } else if seen.refused || seen.ended() || !pass_on(s, p, c) || (timeout && !seen.serving) {
                s.processes[p].at = At::GiveUp(GiveUp::Say);
            } else if seen.serving {
                s.processes[p].at = At::Probation;
            }
        }
        At::Probation => {
            let seen = hear(s, c, rules);
            let stranger = s.link(c).kind == Kind::Stranger;
            s.link_mut(c).drains = seen.refused;
            if seen.refused {
                s.processes[p].stop |= seen.stopping;
                s.processes[p].at = At::GiveUp(GiveUp::Say);
            } else if seen.stopping {
                s.processes[p].at = At::Over;
            } else if seen.ended() || !pass_on(s, p, c) {
                // This also applies if only the started process has ended: the process behind it receives `stop`.
                s.processes[p].at = At::GiveUp(GiveUp::Say);
            } else if timeout || (stranger && s.processes[p].stop) {
                s.false_verdict |= s.processes[c].life == Life::Dead && !s.link(c).wrapper;
                s.processes[p].at = At::Announce;
            } else if s.processes[p].rollback {
                s.processes[p].at = At::TakeBack;
            }
        }
        At::TakeBack => {
            s.say(c, FromParent::Stop);
            s.link_mut(c).given_up = true;
            s.processes[p].at = At::WaitTakenBack;
        }
        At::WaitTakenBack => {
            let seen = hear(s, c, rules);
            if seen.refused || seen.stopping {
                // The child drains and is not killed.
                s.link_mut(c).parent_reads = false;
                s.processes[p].stop |= seen.stopping;
                resume(s, p, rules);
            } else if seen.ended() || timeout {
                s.processes[p].at = At::GiveUp(GiveUp::Close);
            } else {
                return None;
            }
        }
        At::Announce => {
            if !pass_on(s, p, c) {
                s.processes[p].at = At::GiveUp(GiveUp::Say);
                return Some(());
            }
            let knows = s.processes[p].main;
            let stranger = s.link(c).kind == Kind::Stranger;
            if let Some(manager) = s.manager.as_mut().filter(|m| m.main == p && knows && !stranger) {
                // MAINPID and READY in one message.
                manager.main = c;
                if manager.reload == Reload::Reloading {
                    manager.reload = Reload::No;
                }
            }
            s.processes[p].at = At::Main;
        }
        At::Main => {
            let stranger = s.link(c).kind == Kind::Stranger;
            if !stranger && s.manager.is_some() {
                s.say(c, FromParent::Main);
            }
            s.processes[p].at = At::Verdict;
        }
        At::Verdict => {
            let asked = s.processes[p].stop || s.processes[p].upgrade;
            if asked && pass_on(s, p, c) && s.links[c].as_ref().is_some_and(|link| link.kind != Kind::Stranger) {
                return Some(());
            }
            if s.say(c, FromParent::Verdict) {
                let at = s.processes[c].at;
                s.false_verdict |= matches!(at, At::WaitCommit | At::Serving | At::WaitEnd | At::Refused);
                s.processes[p].at = At::Over;
            } else {
                if let Some(manager) = s.manager.as_mut().filter(|m| m.main == c) {
                    manager.main = p;
                }
                s.processes[p].at = At::GiveUp(GiveUp::Say);
            }
        }
        At::GiveUp(GiveUp::Say) => {
            let link = s.link_mut(c);
            link.given_up = true;
            let stranger = link.kind == Kind::Stranger;
            // In the middle of the manifest, `stop` would become part of it. The child cannot serve before the end of
            // the manifest.
            let unread = link.to_child.contains(&FromParent::Manifest);
            let in_manifest = link.kind == Kind::LargeManifest && unread;
            if rules.give_up_says_stop || stranger {
                if !in_manifest {
                    s.say(c, FromParent::Stop);
                } else if s.link(c).to_child.contains(&FromParent::End) {
                    s.lost_stop = true;
                }
            }
            s.processes[p].at = At::GiveUp(GiveUp::Close);
        }
        At::GiveUp(GiveUp::Close) => {
            let stranger = s.link(c).kind == Kind::Stranger;
            // The child sent this before it could read `stop`, so the service was asked to stop.
            s.processes[p].stop |= hear(s, c, rules).stopping;
            let link = s.link_mut(c);
            link.parent_reads = false;
            link.to_parent.clear();
            link.parent_writes = rules.give_up_says_stop;
            if stranger || link.drains {
                resume(s, p, rules);
            } else {
                s.processes[p].at = At::GiveUp(GiveUp::Kill);
            }
        }
        At::GiveUp(GiveUp::Kill) => {
            if s.link(c).kind == Kind::Wrapped {
                s.link_mut(c).wrapper = false;
            } else if s.processes[c].life == Life::Alive {
                s.end(c);
            }
            resume(s, p, rules);
        }
        _ => return None,
    }
    Some(())
}
