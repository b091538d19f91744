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

/// Decides what follows from `result` in `phase`, which is [`Phase::Accept`] or [`Phase::AcceptQueued`], and logs what an
/// operator should know. `settled`: [`Gate::settled`](super::gate::Gate::settled) has passed.
///
/// A client may consider itself connected before its last packet has put the connection into the queue, so a queue that
/// is empty right at the stop proves nothing. A queue that is empty later ends the loop. If the queue had to stay empty
/// for a while, a steady load would keep the loop accepting, and the last connections would be cut at the end of the
/// drain.
///
/// accept(2) reports errors of the new connection as its own, and the list of these errors is open: firewalls (EPERM) and
/// security modules (EACCES) add to it. In the same way recvfrom(2) reports errors of earlier answers. A loop that ended
/// because of one of them would leave every later client unserved. So a loop ends only on errors about the descriptor
/// itself, and on errors of Tokio without an errno, which mean that its runtime is gone.
pub(crate) fn decide<T>(phase: Phase, settled: bool, result: &io::Result<T>, tries: &mut Tries) -> Step {
    let Err(error) = result else {
        *tries = Tries::default();
        return Step::Return;
    };
    tries.failed = tries.failed.saturating_add(1);
    match Errno::from_io_error(error) {
        Some(Errno::AGAIN) => {
            tries.failed = 0;
            match phase {
                Phase::Accept => Step::Wait,
                _ if settled => Step::End,
                _ => Step::Linger,
            }
        }
        // ENOSPC: epoll is out of watches. An asynchronous runtime needs one for each connection.
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC) => {
            tries.pause("out of descriptors or memory", error)
        }
        Some(Errno::BADF | Errno::FAULT | Errno::INVAL | Errno::NOTSOCK | Errno::NOSYS) | None => {
            logging::error!("accept failed, and the accept loop ends: {error}");
            Step::Fail
        }
        Some(_) if tries.failed < MAX_FAILED => Step::Retry,
        Some(_) => tries.pause("accept fails repeatedly", error),
    }
}

impl Tries {
    fn pause(&mut self, reason: &str, error: &io::Error) -> Step {
        if !std::mem::replace(&mut self.logged, true) {
            logging::warn!("{reason}; retrying accept: {error}");
        }
        Step::Pause
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
