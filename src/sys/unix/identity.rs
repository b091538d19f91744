//! What proves that a descriptor is the one meant: the inode of a file. Pipes and sockets have none on some systems, where
//! fstat leaves it 0. So here they get a number when they are first asked for it, which only our own notes remember. As a
//! proof, the manifest repeats the number that the variable gives its carrier; the manifest then names the others.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use rustix::fs::{FileType, Stat};

/// Whether [`is`] tells one pipe or socket from another.
pub(crate) const IS_A_PROOF: bool = false;

/// The inode, or a number that nothing else has.
pub(crate) fn of(stat: &Stat) -> u64 {
    inode(stat).unwrap_or_else(|| RandomState::new().build_hasher().finish())
}

/// Whether this can be the descriptor with that identity.
pub(crate) fn is(stat: &Stat, identity: u64) -> bool {
    inode(stat).is_none_or(|inode| inode == identity)
}

fn inode(stat: &Stat) -> Option<u64> {
    #[allow(clippy::unnecessary_cast)] // Another type on another system.
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => None,
        _ => Some(stat.st_ino as u64),
    }
}
