//! The identity of a descriptor: the inode of a file, pipe or socket.

use rustix::fs::Stat;

/// Whether [`is`] distinguishes one pipe or socket from another.
pub(crate) const IS_A_PROOF: bool = true;

pub(crate) fn of(stat: &Stat) -> u64 {
    stat.st_ino
}

/// Returns whether this can be the descriptor with that identity.
pub(crate) fn is(stat: &Stat, identity: u64) -> bool {
    of(stat) == identity
}
