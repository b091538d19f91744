//! The synchronization primitives of the gate and the drain. `--cfg ecdysis_loom` replaces them with loom's, with which
//! the tests beside this file try every interleaving of the threads.

#[cfg(not(all(test, ecdysis_loom)))]
pub(super) use std::sync::{
    atomic::{AtomicBool, AtomicU8, AtomicUsize},
    Condvar, Mutex, MutexGuard,
};

#[cfg(not(all(test, ecdysis_loom)))]
pub(super) use crate::sys::flag::Flag;

#[cfg(all(test, ecdysis_loom))]
pub(super) use self::tests::Flag;
#[cfg(all(test, ecdysis_loom))]
pub(super) use loom::sync::{
    atomic::{AtomicBool, AtomicU8, AtomicUsize},
    Condvar, Mutex, MutexGuard,
};

#[cfg(all(test, ecdysis_loom))]
mod tests;
