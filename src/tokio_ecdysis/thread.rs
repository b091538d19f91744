//! Threads for calls that block.

use std::io;
use std::thread;

use tokio::sync::oneshot;

use crate::Error;

/// Runs `work`, which may block, in a separate thread, because the runtime cannot shut down while one of its blocking
/// threads is busy.
pub(super) fn in_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, Error> {
    let (sender, receiver) = oneshot::channel();
    let body = move || drop(sender.send(work()));
    match thread::Builder::new().name(name.into()).spawn(body) {
        Ok(_) => Ok(receiver),
        Err(source) => Err(Error::Prepare { what: "thread", source }),
    }
}

/// Such a thread ends without a result only if it panics.
pub(super) fn thread_ended(_: oneshot::error::RecvError) -> Error {
    Error::Wait { source: io::Error::other("the thread for this call has panicked") }
}
