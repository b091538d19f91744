//! Runs foreign code, such as a logger or an observer, in a separate thread, because it may block forever or panic.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long a call may take. If it takes longer, later calls are not waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of calls that are queued while one blocks. Further ones are lost.
const WAITING: usize = 256;

/// A foreign function. Calls are made in order.
pub(crate) struct Foreign<T> {
    function: Arc<dyn Fn(T) + Send + Sync>,
    /// `None` if no thread could be created. The second part closes when the call has returned.
    calls: Option<SyncSender<(T, SyncSender<()>)>>,
    /// Whether a call has taken longer than [`PATIENCE`], and none has returned since.
    blocked: Arc<AtomicBool>,
}

impl<T: Send + 'static> Foreign<T> {
    pub(crate) fn new(thread: &str, function: impl Fn(T) + Send + Sync + 'static) -> Self {
        // A panic must not unwind through an upgrade.
        let function = move |argument| drop(panic::catch_unwind(AssertUnwindSafe(|| function(argument))));
        let function: Arc<dyn Fn(T) + Send + Sync> = Arc::new(function);
        let blocked = Arc::new(AtomicBool::new(false));
        let (calls, next) = mpsc::sync_channel::<(T, SyncSender<()>)>(WAITING);
        let (call, returned) = (function.clone(), blocked.clone());
        let body = move || {
            for (argument, _waiting) in next {
                call(argument);
                returned.store(false, Ordering::Relaxed);
            }
        };
        let spawned = thread::Builder::new().name(thread.into()).spawn(body);
        Self { function, calls: spawned.ok().map(|_| calls), blocked }
    }

    /// Calls the function, and waits until it has returned, but not for longer than [`PATIENCE`].
    pub(crate) fn call(&self, argument: T) {
        let Some(calls) = &self.calls else { return (self.function)(argument) };
        let (waiting, returned) = mpsc::sync_channel(0);
        if calls.try_send((argument, waiting)).is_err() || self.blocked.load(Ordering::Relaxed) {
            return;
        }
        if returned.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            self.blocked.store(true, Ordering::Relaxed);
        }
    }
}
