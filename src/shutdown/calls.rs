//! Accept loops that a program writes itself with `Shutdown::accept` or `Shutdown::recv_from`.
//!
//! Between two calls the thread may have a connection for which it has not created a guard yet, and more may be queued.
//! If the drain did not know about the loop, it would return, the process would end, and all of these connections would
//! be reset. So a thread counts as a loop from its first call until a call ends the loop, or until the thread ends.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use super::accept::AcceptLoop;
use super::drain::{Drain, LoopGuard};
use super::gate::Gate;

thread_local! {
    /// The loops of this thread, by descriptor.
    static LOOPS: RefCell<Vec<(RawFd, LoopGuard)>> = const { RefCell::new(Vec::new()) };
}

/// One call of such a loop, see [`AcceptLoop::next`].
pub(super) fn next<T>(
    gate: &Gate,
    drain: &Arc<Drain>,
    fd: BorrowedFd<'_>,
    attempt: impl FnMut() -> io::Result<T>,
) -> Option<io::Result<T>> {
    let number = fd.as_raw_fd();
    let is_this = |(fd, guard): &(RawFd, LoopGuard)| *fd == number && guard.is_of(drain);
    let listed = LOOPS.try_with(|loops| {
        let mut loops = loops.borrow_mut();
        if !loops.iter().any(is_this) {
            loops.push((number, drain.count_loop()));
        }
    });
    // If the thread is ending and its list is already gone, the loop counts only for this call.
    let _guard = listed.is_err().then(|| drain.count_loop());
    let next = AcceptLoop::once().next(gate, fd, attempt);
    if !matches!(next, Some(Ok(_))) {
        let _ = LOOPS.try_with(|loops| loops.borrow_mut().retain(|one| !is_this(one)));
    }
    next
}

/// Ends this thread's loops, because a thread that drains does not accept.
pub(super) fn end(drain: &Arc<Drain>) {
    let _ = LOOPS.try_with(|loops| loops.borrow_mut().retain(|(_, guard)| !guard.is_of(drain)));
}
