//! The next step of a process. A step ends where another process can see its effect, so that a process can be stopped
//! or killed between any two system calls that matter.

use crate::parent;
use crate::state::*;
use crate::{Carrier, Rules};

impl State {
    pub fn link(&self, child: Pid) -> &Link {
        self.links[child].as_ref().expect("only asked for a process that has one")
    }

    pub fn link_mut(&mut self, child: Pid) -> &mut Link {
        self.links[child].as_mut().expect("only asked for a process that has one")
    }

    /// Whether any process holds the child's reading end.
    pub fn reader_lives(&self, child: Pid) -> bool {
        let link = self.link(child);
        (self.processes[child].life == Life::Alive && link.child_reads) || self.is_held_by_others(child)
    }

    /// Whether any process holds the child's writing end.
    pub fn writer_lives(&self, child: Pid) -> bool {
        self.processes[child].life != Life::Dead || self.is_held_by_others(child)
    }

    fn is_held_by_others(&self, child: Pid) -> bool {
        let link = self.link(child);
        link.wrapper || link.kind == Kind::WithHelper
    }

    /// Whether the process that the parent has started, or that has taken over, has ended.
    pub fn started_ended(&self, child: Pid) -> bool {
        match self.link(child).kind {
            Kind::Wrapped => !self.link(child).wrapper,
            _ => self.processes[child].life == Life::Dead,
        }
    }

    /// Whether the child sees the end of its parent once it has read all earlier messages.
    pub fn parent_ended(&self, child: Pid) -> bool {
        !self.link(child).parent_writes
    }

    pub fn say(&mut self, child: Pid, message: FromParent) -> bool {
        let goes = self.reader_lives(child);
        if goes {
            self.link_mut(child).to_child.push(message);
        }
        goes
    }

    /// Sends a message of the child. Returns false if no process reads any more (EPIPE).
    fn report(&mut self, child: Pid, message: FromChild) -> bool {
        let link = self.link_mut(child);
        if link.parent_reads {
            link.to_parent.push(message);
        }
        link.parent_reads
    }

    pub fn end(&mut self, p: Pid) {
        self.processes[p].life = Life::Dying;
        self.processes[p].accepts = false;
        for link in self.links.iter_mut().flatten().filter(|link| link.parent == p) {
            link.parent_reads = false;
            link.to_parent.clear();
        }
        if self.connection == Connection::Woke(p) {
            // The connection was accepted, and is lost with the process.
            self.connection = Connection::None;
        }
    }

    pub fn end_fully(&mut self, p: Pid) {
        self.processes[p].life = Life::Dead;
        self.processes[p].frozen = false;
        for link in self.links.iter_mut().flatten().filter(|link| link.parent == p) {
            link.parent_writes = false;
        }
    }

    pub fn accept(&mut self, p: Pid) {
        self.processes[p].accepts = true;
        // It checks the queue before it waits.
        if self.connection == Connection::Queued {
            self.connection = Connection::None;
        }
    }

    pub fn pause(&mut self, p: Pid, rules: &Rules) {
        self.processes[p].accepts = false;
        if self.connection == Connection::Woke(p) {
            self.connection = if rules.woken_serves { Connection::None } else { Connection::Queued };
        }
    }
}

/// Reads everything that the parent has sent, and records the requests.
fn read_mail(state: &mut State, c: Pid) -> Mail {
    let mut mail = Mail::default();
    let process = &mut state.processes[c];
    let link = state.links[c].as_mut().expect("a child has a link");
    mail.any = !link.to_child.is_empty();
    for message in link.to_child.drain(..) {
        match message {
            FromParent::Manifest => {}
            FromParent::End => mail.end = true,
            FromParent::Commit => mail.commit = true,
            FromParent::Stop => mail.stop = true,
            FromParent::RequestStop => process.stop = true,
            FromParent::RequestUpgrade => process.upgrade = true,
            FromParent::Main => process.main = true,
            FromParent::Verdict => process.free = true,
        }
    }
    mail
}

#[derive(Default)]
struct Mail {
    any: bool,
    end: bool,
    commit: bool,
    stop: bool,
}

/// Makes the next step of a running process, if it has one. With `timeout`, its deadline has passed.
pub fn step(state: &State, p: Pid, timeout: bool, rules: &Rules) -> Option<State> {
    let mut next = state.clone();
    let s = &mut next;
    let child = state.processes[p].child;
    match state.processes[p].at {
        At::Manifest | At::Ready | At::WaitCommit | At::Serving | At::LookAgain | At::WaitEnd => {
            new_process(s, p, timeout, rules)?
        }
        At::Loop if !timeout => serve(s, p, rules)?,
        At::RollBack if !timeout => {
            s.pause(p, rules);
            s.report(p, FromChild::Refused);
            if rules.rollback_waits {
                s.processes[p].at = At::WaitAnswer;
            } else {
                let link = s.link(p);
                let parent = &s.processes[link.parent];
                s.given_away |= !link.given_up && (parent.life != Life::Alive || parent.at == At::Over);
                s.processes[p].at = At::Leave;
            }
        }
        At::WaitAnswer => {
            if timeout && !s.link(p).to_child.is_empty() {
                return None;
            }
            let mail = read_mail(s, p);
            if mail.stop {
                s.processes[p].at = At::Leave;
            } else if s.processes[p].free || s.parent_ended(p) || timeout {
                s.processes[p].at = At::Loop;
                s.accept(p);
            } else if !mail.any {
                return None;
            }
        }
        At::GivenBack if !timeout => {
            s.pause(p, rules);
            // This is the answer. From here on the parent may accept.
            s.report(p, FromChild::Refused);
            s.processes[p].at = At::Leave;
        }
        At::SayStopping if !timeout => {
            s.pause(p, rules);
            if s.links[p].is_some() && !s.processes[p].free {
                s.report(p, FromChild::Stopping);
            }
            s.processes[p].at = At::Stop;
        }
        At::Stop if !timeout => {
            // A `stop` arrived before the parent read that message, so the parent decides.
            if s.links[p].is_some() && !s.processes[p].free && read_mail(s, p).stop {
                s.processes[p].at = At::Leave;
                return Some(next);
            }
            s.stopped = true;
            s.processes[p].stop = false;
            s.processes[p].at = At::Over;
        }
        At::Over | At::Leave if !timeout => s.end(p),
        _ => parent::step(s, p, child?, timeout, rules)?,
    }
    (next != *state).then_some(next)
}

fn new_process(s: &mut State, p: Pid, timeout: bool, rules: &Rules) -> Option<()> {
    let given_up = |s: &mut State| s.processes[p].at = At::Leave;
    match s.processes[p].at {
        At::Manifest => {
            // Only the first part has arrived. The parent sends the rest once it sees that this part was read.
            if s.link(p).to_child.as_slice() == [FromParent::Manifest] && !timeout {
                s.link_mut(p).to_child.clear();
                return Some(());
            }
            if timeout && !s.link(p).to_child.is_empty() {
                return None;
            }
            let mail = read_mail(s, p);
            if mail.stop || (!mail.end && (timeout || s.parent_ended(p))) {
                // Without a complete manifest it exits. It must never become a first generation by accident.
                given_up(s);
            } else if mail.end {
                let sees_error = rules.carrier == Carrier::Pipes && !s.link(p).parent_reads;
                s.processes[p].at = if sees_error && !s.parent_ended(p) { At::WaitEnd } else { At::Ready };
            } else {
                return None;
            }
        }
        At::Ready if !timeout => {
            let goes = s.report(p, FromChild::Ready);
            s.processes[p].at = if goes { At::WaitCommit } else { At::WaitEnd };
        }
        At::WaitCommit => {
            if timeout && !s.link(p).to_child.is_empty() {
                return None;
            }
            let mail = read_mail(s, p);
            if mail.stop {
                given_up(s);
            } else if mail.commit || s.parent_ended(p) || timeout {
                s.processes[p].at = At::Serving;
            } else if !mail.any {
                return None;
            }
        }
        At::Serving if !timeout => {
            let goes = s.report(p, FromChild::Serving);
            s.processes[p].at = if goes { At::LookAgain } else { At::WaitEnd };
        }
        At::LookAgain if !timeout => {
            if read_mail(s, p).stop && rules.give_up_says_stop {
                given_up(s);
            } else {
                s.processes[p].at = At::Loop;
                s.accept(p);
            }
        }
        At::WaitEnd => {
            let mail = read_mail(s, p);
            if mail.stop {
                given_up(s);
            } else if s.parent_ended(p) {
                s.processes[p].free = true;
                s.processes[p].at = At::Loop;
                s.accept(p);
            } else if timeout && s.processes[s.link(p).parent].life == Life::Alive {
                // This deadline is 5 s, and the parent's death takes less.
                given_up(s);
            } else if !mail.any {
                return None;
            }
        }
        _ => return None,
    }
    Some(())
}

fn serve(s: &mut State, p: Pid, rules: &Rules) -> Option<()> {
    if s.links[p].is_some() && !s.processes[p].free {
        let mail = read_mail(s, p);
        if mail.stop && (rules.stop_is_final || !s.parent_ended(p)) {
            s.processes[p].at = At::GivenBack;
            return Some(());
        }
        if (!mail.any || mail.stop) && s.parent_ended(p) {
            let process = &mut s.processes[p];
            (process.free, process.main) = (true, true);
            return Some(());
        }
        if mail.any {
            return Some(());
        }
    }
    if s.processes[p].stop {
        s.processes[p].at = At::SayStopping;
        return Some(());
    }
    if s.processes[p].rollback {
        s.processes[p].rollback = false;
        if s.links[p].is_some() && !s.processes[p].free {
            s.processes[p].at = At::RollBack;
        }
        return Some(());
    }
    // An upgrade begins in `spawn`.
    None
}
