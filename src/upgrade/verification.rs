//! The program's own check of a new process that serves, in a separate thread.

use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use crate::exit::Upgraded;
use crate::logging;
use crate::options::Verify;
use crate::sys::poll::Deadline;

/// A running check. It may hang, so its thread is never joined.
pub(super) struct Verification(Receiver<Result<(), String>>);

impl Verification {
    pub(super) fn begin(verify: &Verify, upgraded: &Upgraded) -> Self {
        let (result, results) = mpsc::sync_channel(1);
        let (verify, upgraded) = (verify.clone(), upgraded.clone());
        let check = move || drop(result.send(verify(&upgraded).map_err(|e| e.to_string())));
        if let Err(e) = thread::Builder::new().name("ecdysis-verify".into()).spawn(check) {
            logging::error!("cannot create a thread for the verification: {e}");
        }
        Self(results)
    }

    /// Returns `None` while it runs, until `deadline`.
    pub(super) fn outcome(&self, deadline: Deadline) -> Option<Result<(), String>> {
        match self.0.try_recv() {
            Ok(checked) => Some(checked.map_err(|why| format!("not verified: {why}"))),
            Err(TryRecvError::Empty) if !deadline.has_passed() => None,
            Err(TryRecvError::Empty) => Some(Err("not verified in time".into())),
            Err(TryRecvError::Disconnected) => {
                Some(Err("not verified: the callback panicked, or no thread could run it".into()))
            }
        }
    }
}
