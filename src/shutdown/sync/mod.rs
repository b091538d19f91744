//! What the gate and the drain synchronize with. `--cfg ecdysis_loom` puts loom's doubles in its place, with which the tests
//! beside this file try every order of the threads' steps.

#[cfg(not(all(test, ecdysis_loom)))]
pub(super) use std::sync::{
    atomic::{AtomicBool, AtomicU8, AtomicUsize},
    Condvar, Mutex,
};

#[cfg(not(all(test, ecdysis_loom)))]
pub(super) use crate::sys::flag::Flag;

#[cfg(all(test, ecdysis_loom))]
pub(super) use self::tests::Flag;
#[cfg(all(test, ecdysis_loom))]
pub(super) use loom::sync::{
    atomic::{AtomicBool, AtomicU8, AtomicUsize},
    Condvar, Mutex,
};

#[cfg(all(test, ecdysis_loom))]
mod tests;
