//! The gate and the drain with every interleaving of their threads, by loom:
//!
//!     RUSTFLAGS="--cfg ecdysis_loom" cargo test --lib --target-dir target/loom shutdown::sync
//!
//! A lost wake-up shows up as a deadlock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::AtomicUsize;
use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::shutdown::drain::{Drain, Guard};
use crate::shutdown::gate::{Gate, Phase, State};

/// The replacement for the flag that threads poll.
#[derive(Debug)]
pub(crate) struct Flag {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Flag {
    pub(crate) fn new(raised: bool) -> io::Result<Self> {
        Ok(Self { raised: Mutex::new(raised), changed: Condvar::new() })
    }

    pub(crate) fn raise(&self) {
        *self.raised.lock().unwrap() = true;
        self.changed.notify_all();
    }

    pub(crate) fn lower(&self) {
        *self.raised.lock().unwrap() = false;
    }

    /// The equivalent of poll(2) on a flag.
    pub(crate) fn wait(&self) {
        let mut raised = self.raised.lock().unwrap();
        while !*raised {
            raised = self.changed.wait(raised).unwrap();
        }
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        unreachable!("the model polls nothing")
    }
}

fn over() -> (Arc<Gate>, Arc<Drain>) {
    let gate = Arc::new(Gate::new().unwrap());
    gate.set(State::HandedOver);
    (gate, Arc::new(Drain::new().unwrap()))
}

fn drains(gate: &Arc<Gate>, drain: &Arc<Drain>) -> usize {
    drain.wait(Duration::MAX, gate)
}

/// Three preemptions per run are more than any known bug needs.
fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

#[test]
fn a_drain_sees_the_last_guard_go() {
    model(|| {
        let (gate, drain) = over();
        let guard = Guard::new(&drain);
        let connection = thread::spawn(move || drop(guard));
        assert_eq!(drains(&gate, &drain), 0);
        connection.join().unwrap();
    });
}

#[test]
fn two_drains_see_the_last_guard_go() {
    model(|| {
        let (gate, drain) = over();
        let guard = Guard::new(&drain);
        let other = thread::spawn({
            let (gate, drain) = (gate.clone(), drain.clone());
            move || assert_eq!(drains(&gate, &drain), 0)
        });
        let connection = thread::spawn(move || drop(guard));
        assert_eq!(drains(&gate, &drain), 0);
        connection.join().unwrap();
        other.join().unwrap();
    });
}

/// The guard is created in the body of a loop that then ends.
#[test]
fn a_drain_misses_no_connection_of_a_loop() {
    model(|| {
        let (gate, drain) = over();
        let counted = drain.count_loop();
        let served = Arc::new(AtomicUsize::new(0));
        let accepting = thread::spawn({
            let (drain, served) = (drain.clone(), served.clone());
            move || {
                let _guard = Guard::new(&drain);
                drop(counted);
                served.store(1, Ordering::SeqCst);
            }
        });
        assert_eq!(drains(&gate, &drain), 0);
        assert_eq!(served.load(Ordering::SeqCst), 1, "the connection was cut");
        accepting.join().unwrap();
    });
}

#[test]
fn an_accepting_thread_follows_every_change() {
    model(|| {
        let gate = Arc::new(Gate::new().unwrap());
        let accepting = thread::spawn({
            let gate = gate.clone();
            move || loop {
                match gate.phase(None) {
                    // No connection arrives. Between the change and the lowered flag this is a short busy loop.
                    Phase::Accept => {
                        gate.closed.wait();
                        thread::yield_now();
                    }
                    Phase::Wait => gate.wait_while(|state| matches!(state, State::Starting | State::Paused)),
                    Phase::AcceptQueued | Phase::End => break,
                }
            }
        });
        for state in [State::Accepting, State::Paused, State::Accepting, State::HandedOver] {
            gate.set(state);
        }
        accepting.join().unwrap();
    });
}
