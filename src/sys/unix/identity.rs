//! The identity of a descriptor: the inode of a file. On some systems pipes and sockets have no inode, and fstat leaves
//! it 0. So each gets a random number when its entry is created. The manifest repeats the number that the variable
//! contains for its carrier. This verifies the manifest, which names all other descriptors.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use rustix::fs::{FileType, Stat};

/// Whether [`is`] distinguishes one pipe or socket from another.
pub(crate) const IS_A_PROOF: bool = false;

/// Returns the inode, or a unique number.
pub(crate) fn of(stat: &Stat) -> u64 {
    inode(stat).unwrap_or_else(|| RandomState::new().build_hasher().finish())
}

/// Returns whether this can be the descriptor with that identity.
pub(crate) fn is(stat: &Stat, identity: u64) -> bool {
    inode(stat).is_none_or(|inode| inode == identity)
}

fn inode(stat: &Stat) -> Option<u64> {
    #[allow(clippy::unnecessary_cast)] // The type differs between systems.
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => None,
        _ => Some(stat.st_ino as u64),
    }
}
