//! Waking the tasks that wait for a change of the state, as the condition variable does for threads.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::task::Waker;

/// The waker of every watching task, by the number of its watch.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Mutex<(u64, HashMap<u64, Waker>)>);

impl Watchers {
    /// Wakes every task. Not under the lock: a waker may run any code, and remove a watch.
    pub(crate) fn wake(&self) {
        let wakers: Vec<_> = self.with(|(_, wakers)| wakers.values().cloned().collect());
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Calls `waker` at every change from now on, in place of the former waker of watch `number`, which is a new one if it
    /// is `None`. Look at the state after this call.
    pub(crate) fn register(&self, number: &mut Option<u64>, waker: &Waker) {
        let former = self.with(|(last, wakers)| {
            let number = *number.get_or_insert_with(|| {
                *last += 1;
                *last
            });
            wakers.insert(number, waker.clone())
        });
        // Outside the lock, as above.
        drop(former);
    }

    pub(crate) fn remove(&self, number: u64) {
        let former = self.with(|(_, wakers)| wakers.remove(&number));
        drop(former);
    }

    fn with<T>(&self, change: impl FnOnce(&mut (u64, HashMap<u64, Waker>)) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
