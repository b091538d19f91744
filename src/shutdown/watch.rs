//! Wakes the tasks that wait for a change of the state, like a condition variable for threads.
//!
//! Each request of each connection may register and unregister here, so the wakers are split into several parts, each
//! with its own lock and cache lines. A thread uses the same part for all its tasks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

const PARTS: usize = 16;

static NEXT_PART: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static PART: usize = NEXT_PART.fetch_add(1, Ordering::Relaxed) % PARTS;
}

/// The wakers of every waiting task.
#[derive(Debug, Default)]
pub(crate) struct Watchers([Part; PARTS]);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Part(Mutex<Wakers>);

#[derive(Debug, Default)]
struct Wakers {
    slots: Vec<Option<Waker>>,
    free: Vec<usize>,
}

/// The place of one waiting task.
#[derive(Debug)]
pub(crate) struct Slot {
    part: usize,
    index: usize,
}

impl Watchers {
    /// Wakes every task. Holds no lock, because a waker may run any code, including code that leaves a slot.
    pub(crate) fn wake(&self) {
        for part in 0..PARTS {
            let wakers: Vec<_> = self.part(part).slots.iter().flatten().cloned().collect();
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Calls `waker` at every change from now on, instead of the previous waker in `slot`. Check the state after this
    /// call.
    pub(crate) fn register(&self, slot: &mut Option<Slot>, waker: &Waker) {
        match slot {
            None => *slot = Some(self.insert(waker.clone())),
            Some(Slot { part, index }) => {
                let mut wakers = self.part(*part);
                let registered = &mut wakers.slots[*index];
                if registered.as_ref().is_some_and(|registered| registered.will_wake(waker)) {
                    return;
                }
                let former = registered.replace(waker.clone());
                drop(wakers);
                // Drop it outside the lock: it may be the last owner of a task, which leaves its slots when dropped.
                drop(former);
            }
        }
    }

    fn insert(&self, waker: Waker) -> Slot {
        let part = PART.with(|part| *part);
        let mut wakers = self.part(part);
        let index = match wakers.free.pop() {
            Some(index) => {
                wakers.slots[index] = Some(waker);
                index
            }
            None => {
                wakers.slots.push(Some(waker));
                wakers.slots.len() - 1
            }
        };
        Slot { part, index }
    }

    pub(crate) fn remove(&self, Slot { part, index }: Slot) {
        let mut wakers = self.part(part);
        let former = wakers.slots[index].take();
        wakers.free.push(index);
        drop(wakers);
        // Drop it outside the lock too.
        drop(former);
    }

    fn part(&self, part: usize) -> MutexGuard<'_, Wakers> {
        self.0[part].0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Wake;

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Leaves its slot when it is dropped, like a task that owns a watch.
    struct Leaves(Arc<Watchers>, Mutex<Option<Slot>>);

    impl Wake for Leaves {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for Leaves {
        fn drop(&mut self) {
            self.0.remove(self.1.lock().unwrap().take().unwrap());
        }
    }

    #[test]
    fn each_slot_is_woken_until_it_is_left_and_then_used_again() {
        let watchers = Watchers::default();
        let counters: Vec<_> = (0..3).map(|_| Arc::new(Counter::default())).collect();
        let mut slots: Vec<Option<Slot>> = counters.iter().map(|_| None).collect();
        for (slot, counter) in slots.iter_mut().zip(&counters) {
            watchers.register(slot, &counter.clone().into());
            watchers.register(slot, &counter.clone().into());
        }
        watchers.wake();
        watchers.remove(slots[1].take().unwrap());
        watchers.wake();
        let mut again = None;
        watchers.register(&mut again, &counters[1].clone().into());
        watchers.wake();
        let woken: Vec<_> = counters.iter().map(|counter| counter.0.load(Ordering::SeqCst)).collect();
        assert_eq!(woken, [3, 2, 3]);
        assert!(watchers.0.iter().all(|part| part.0.lock().unwrap().slots.len() <= 3));
    }

    #[test]
    fn a_waker_may_leave_a_slot_when_it_is_dropped() {
        let watchers = Arc::new(Watchers::default());
        let counter: Waker = Arc::new(Counter::default()).into();
        for replace in [true, false] {
            let mut owned = None;
            watchers.register(&mut owned, &counter);
            let mut slot = None;
            watchers.register(&mut slot, &Arc::new(Leaves(watchers.clone(), Mutex::new(owned))).into());
            if replace {
                watchers.register(&mut slot, &counter);
            }
            watchers.remove(slot.unwrap());
        }
    }
}
