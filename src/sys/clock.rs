//! The clock with which a service manager distinguishes one reload from another.

/// Returns CLOCK_MONOTONIC in microseconds, or 0 if there is none. Uses libc, because rustix reads the vDSO, which a
/// program under Valgrind cannot access.
#[allow(clippy::unnecessary_cast)] // The type differs between systems.
pub(crate) fn monotonic_usec() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec (clock_gettime(2)).
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}
