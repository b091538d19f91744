//! Runs foreign code, such as a logger or an observer, in a separate thread, because it may block forever or panic.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

/// How long a call may take. If it takes longer, later calls are not waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of calls that are queued while one blocks. Further ones are lost.
const WAITING: usize = 256;

/// The argument of a call, and what closes when the call has returned, if anyone waits for that.
type Call<T> = (T, Option<SyncSender<()>>);

/// A foreign function. Calls are made in order.
pub(crate) struct Foreign<T> {
    name: &'static str,
    function: Arc<dyn Fn(T) + Send + Sync>,
    /// Set at the first call. If no thread can be created, the next call tries it again.
    calls: OnceLock<SyncSender<Call<T>>>,
    /// Whether a call has taken longer than [`PATIENCE`], and none has returned since.
    blocked: Arc<AtomicBool>,
}

impl<T: Send + 'static> Foreign<T> {
    /// `name` is that of the thread, which is created at the first call.
    pub(crate) fn new(name: &'static str, function: impl Fn(T) + Send + Sync + 'static) -> Self {
        // A panic must not unwind through an upgrade.
        let function = move |argument| drop(panic::catch_unwind(AssertUnwindSafe(|| function(argument))));
        Self { name, function: Arc::new(function), calls: OnceLock::new(), blocked: Arc::default() }
    }

    /// Calls the function, and waits until it has returned, but not for longer than [`PATIENCE`].
    pub(crate) fn call(&self, argument: T) {
        let (waiting, returned) = mpsc::sync_channel(0);
        if !self.send(argument, Some(waiting)) || self.blocked.load(Ordering::Relaxed) {
            return;
        }
        if returned.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            self.blocked.store(true, Ordering::Relaxed);
        }
    }

    /// Calls the function, and does not wait.
    pub(crate) fn post(&self, argument: T) {
        self.send(argument, None);
    }

    /// Returns whether a thread makes the call.
    fn send(&self, argument: T, waiting: Option<SyncSender<()>>) -> bool {
        // If two threads start one at the same time, the second ends when its sender is dropped.
        let start = || self.start().ok().map(|calls| self.calls.get_or_init(|| calls));
        match self.calls.get().or_else(start) {
            Some(calls) => calls.try_send((argument, waiting)).is_ok(),
            None => {
                (self.function)(argument);
                false
            }
        }
    }

    fn start(&self) -> io::Result<SyncSender<Call<T>>> {
        let (calls, next) = mpsc::sync_channel::<Call<T>>(WAITING);
        let (function, blocked) = (self.function.clone(), self.blocked.clone());
        let body = move || {
            for (argument, _waiting) in next {
                function(argument);
                blocked.store(false, Ordering::Relaxed);
            }
        };
        thread::Builder::new().name(self.name.into()).spawn(body).map(|_| calls)
    }
}
