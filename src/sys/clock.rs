//! The clock by which a service manager tells one reload from another.

/// CLOCK_MONOTONIC in microseconds, or 0 where there is none. By libc: rustix reads the vDSO, which a program under
/// Valgrind has no access to.
#[allow(clippy::unnecessary_cast)] // Another type on another system.
pub(crate) fn monotonic_usec() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec (clock_gettime(2)).
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}
