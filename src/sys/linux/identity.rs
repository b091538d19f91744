//! What proves that a descriptor is the one meant: the inode of a file, pipe or socket.

use rustix::fs::Stat;

/// Whether [`is`] tells one pipe or socket from another.
pub(crate) const IS_A_PROOF: bool = true;

pub(crate) fn of(stat: &Stat) -> u64 {
    stat.st_ino
}

/// Whether this can be the descriptor with that identity.
pub(crate) fn is(stat: &Stat, identity: u64) -> bool {
    of(stat) == identity
}
