//! What an accept loop does next: one decision for threads and for Tokio.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use super::gate::Phase;
use crate::sys::net::is_network_error;

/// The time that a handshake under way at a stop may need to reach the accept queue.
pub(crate) const HANDSHAKE: Duration = Duration::from_millis(20);

/// What one accept loop remembers from one attempt to the next.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    /// The queue was found empty once since the stop.
    lingered: bool,
    /// A lack of descriptors or memory was logged.
    logged: bool,
}

/// What an accept loop does after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Return the result, a connection or datagram.
    Return,
    /// Try again at once.
    Retry,
    /// Try again when there is something or the phase changes.
    Wait,
    /// Try again when there is something, or after [`HANDSHAKE`].
    Linger,
    /// Try again after [`SCARCE`](crate::sys::poll::SCARCE). The listener stays readable meanwhile, so to poll it would be to spin.
    Pause,
    /// End.
    End,
    /// Return the error, and end.
    Fail,
}

/// Decides what follows from `result` in `phase`, which is [`Phase::Accept`] or [`Phase::AcceptQueued`].
pub(crate) fn decide<T>(phase: Phase, result: &io::Result<T>, tries: &mut Tries) -> Step {
    let failure = match result {
        Ok(_) => {
            *tries = Tries::default();
            return Step::Return;
        }
        Err(error) => AcceptFailure::of(error),
    };
    match failure {
        AcceptFailure::Empty if phase == Phase::Accept => Step::Wait,
        // A client may take itself for connected before its last packet has put it into the queue.
        AcceptFailure::Empty if !std::mem::replace(&mut tries.lingered, true) => Step::Linger,
        AcceptFailure::Empty => Step::End,
        AcceptFailure::Connection => Step::Retry,
        AcceptFailure::Exhausted => Step::Pause,
        AcceptFailure::Listener => Step::Fail,
    }
}

/// As [`decide`], and logs what an operator should know.
pub(crate) fn decide_and_log<T>(phase: Phase, result: &io::Result<T>, tries: &mut Tries) -> Step {
    let step = decide(phase, result, tries);
    match (step, result) {
        (Step::Pause, Err(error)) if !std::mem::replace(&mut tries.logged, true) => {
            log::warn!("out of descriptors or memory; retrying accept: {error}");
        }
        _ => {}
    }
    step
}

/// What a failed accept means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AcceptFailure {
    /// Nothing is queued.
    Empty,
    /// One connection is lost; the listener works.
    Connection,
    /// No descriptor or memory is left.
    Exhausted,
    /// The listener itself is broken.
    Listener,
}

impl AcceptFailure {
    fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => Self::Empty,
            Some(e) if concerns_one_connection(e) => Self::Connection,
            // ENOSPC: epoll is out of watches, of which an asynchronous runtime needs one for each connection.
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC) => Self::Exhausted,
            _ => Self::Listener,
        }
    }
}

/// Errors that accept(2) passes on from the network: that connection is lost, the next one may work. recvfrom(2) reports
/// in the same way what an earlier answer met.
fn concerns_one_connection(e: Errno) -> bool {
    matches!(
        e,
        Errno::INTR
            | Errno::CONNABORTED
            | Errno::CONNREFUSED
            | Errno::CONNRESET
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::TIMEDOUT
    ) || is_network_error(e)
}
