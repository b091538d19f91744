//! The next step of an accept loop: one decision for threads and for Tokio.

use std::io;

use rustix::io::Errno;

use super::gate::Phase;
use crate::logging;

/// The number of consecutive failures after which a loop pauses before it retries.
const MAX_FAILED: u32 = 16;

/// The memory of one accept loop between attempts.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    /// The number of consecutive failures. An empty queue does not count.
    failed: u32,
    /// A pause was logged.
    logged: bool,
}

/// The next step of an accept loop after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Return the result, a connection or datagram.
    Return,
    /// Retry immediately.
    Retry,
    /// Retry when there is something to accept or the phase changes.
    Wait,
    /// Retry when there is something to accept, or when the stop has [settled](super::gate::Gate::settled).
    Linger,
    /// Retry after [`SCARCE`](crate::sys::poll::SCARCE). The listener stays readable during that time, so polling it
    /// would be a busy loop.
    Pause,
    /// End the loop.
    End,
    /// Return the error, and end the loop.
    Fail,
}

/// Decides what follows from `result` in `phase`, which is [`Phase::Accept`] or [`Phase::AcceptQueued`]. `settled`:
/// [`Gate::settled`](super::gate::Gate::settled) has passed.
///
/// A client may consider itself connected before its last packet has put the connection into the queue, so a queue that
/// is empty right at the stop proves nothing. A queue that is empty later ends the loop. If the queue had to stay empty
/// for a while, a steady load would keep the loop accepting, and the last connections would be cut at the end of the
/// drain.
pub(crate) fn decide<T>(phase: Phase, settled: bool, result: &io::Result<T>, tries: &mut Tries) -> Step {
    let failure = match result {
        Ok(_) => {
            *tries = Tries::default();
            return Step::Return;
        }
        Err(error) => AcceptFailure::of(error),
    };
    tries.failed = if failure == AcceptFailure::Empty { 0 } else { tries.failed.saturating_add(1) };
    match failure {
        AcceptFailure::Empty if phase == Phase::Accept => Step::Wait,
        AcceptFailure::Empty if !settled => Step::Linger,
        AcceptFailure::Empty => Step::End,
        AcceptFailure::Connection if tries.failed < MAX_FAILED => Step::Retry,
        AcceptFailure::Connection | AcceptFailure::Exhausted => Step::Pause,
        AcceptFailure::Listener => Step::Fail,
    }
}

/// Like [`decide`], and logs what an operator should know.
pub(crate) fn decide_and_log<T>(phase: Phase, settled: bool, result: &io::Result<T>, tries: &mut Tries) -> Step {
    let step = decide(phase, settled, result, tries);
    match (step, result) {
        (Step::Pause, Err(error)) if !std::mem::replace(&mut tries.logged, true) => {
            let reason = match AcceptFailure::of(error) {
                AcceptFailure::Exhausted => "out of descriptors or memory",
                _ => "accept fails repeatedly",
            };
            logging::warn!("{reason}; retrying accept: {error}");
        }
        (Step::Fail, Err(error)) => logging::error!("accept failed, and the accept loop ends: {error}"),
        _ => {}
    }
    step
}

/// The meaning of a failed accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AcceptFailure {
    /// Nothing is queued.
    Empty,
    /// One connection is lost; the listener works.
    Connection,
    /// The process is out of descriptors or memory.
    Exhausted,
    /// The descriptor is not a listener, or no longer one.
    Listener,
}

impl AcceptFailure {
    /// accept(2) reports errors of the new connection as its own, and the list of these errors is open: firewalls
    /// (EPERM) and security modules (EACCES) add to it. In the same way recvfrom(2) reports errors of earlier answers.
    /// A loop that ended because of one of them would leave every later client unserved. So a loop ends only on errors
    /// about the descriptor itself, and on errors of Tokio without an errno, which mean that its runtime is gone.
    fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => Self::Empty,
            // ENOSPC: epoll is out of watches. An asynchronous runtime needs one for each connection.
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC) => Self::Exhausted,
            Some(Errno::BADF | Errno::FAULT | Errno::INVAL | Errno::NOTSOCK | Errno::NOSYS) | None => Self::Listener,
            Some(_) => Self::Connection,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(phase: Phase, errno: Errno, tries: &mut Tries) -> Step {
        decide(phase, false, &Err::<(), _>(errno.into()), tries)
    }

    #[test]
    fn no_error_of_a_connection_ends_a_loop() {
        for errno in [
            Errno::PERM,
            Errno::ACCESS,
            Errno::OPNOTSUPP,
            Errno::SOCKTNOSUPPORT,
            Errno::PROTONOSUPPORT,
            Errno::NETDOWN,
            Errno::PROTO,
            Errno::NOPROTOOPT,
            Errno::HOSTDOWN,
            Errno::HOSTUNREACH,
            Errno::NETUNREACH,
            Errno::TIMEDOUT,
            Errno::CONNABORTED,
            Errno::CONNREFUSED,
            Errno::CONNRESET,
            Errno::INTR,
        ] {
            for phase in [Phase::Accept, Phase::AcceptQueued] {
                assert_eq!(after(phase, errno, &mut Tries::default()), Step::Retry, "{errno:?}");
            }
        }
    }

    #[test]
    fn an_error_that_stays_does_not_spin() {
        let mut tries = Tries::default();
        let steps: Vec<_> = (0..100).map(|_| after(Phase::Accept, Errno::PERM, &mut tries)).collect();
        assert_eq!(steps.iter().filter(|step| **step == Step::Retry).count(), MAX_FAILED as usize - 1);
        assert_eq!(steps.last(), Some(&Step::Pause));
        assert_eq!(decide(Phase::Accept, false, &Ok(()), &mut tries), Step::Return);
        assert_eq!(after(Phase::Accept, Errno::PERM, &mut tries), Step::Retry);
    }

    #[test]
    fn an_error_of_the_listener_ends_the_loop() {
        for errno in [Errno::BADF, Errno::INVAL, Errno::NOTSOCK] {
            assert_eq!(after(Phase::Accept, errno, &mut Tries::default()), Step::Fail, "{errno:?}");
        }
    }

    #[test]
    fn a_stop_ends_the_loop_when_the_queue_is_empty_after_the_last_handshake() {
        let mut tries = Tries::default();
        let mut empty = |phase, settled| decide(phase, settled, &Err::<(), _>(Errno::AGAIN.into()), &mut tries);
        assert_eq!(empty(Phase::Accept, false), Step::Wait);
        assert_eq!(empty(Phase::AcceptQueued, false), Step::Linger);
        assert_eq!(empty(Phase::AcceptQueued, false), Step::Linger);
        assert_eq!(empty(Phase::AcceptQueued, true), Step::End);
    }
}
