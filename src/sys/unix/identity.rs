//! What proves that a descriptor is the one meant: the inode of a file. Pipes and sockets have none on some systems, where
//! fstat leaves it 0; so here they never have one. A number that is said in the variable and in the manifest proves in
//! its place that the manifest is meant for this process, and the manifest names the other descriptors.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use rustix::fs::{FileType, Stat};

/// Whether the inode tells one pipe or socket from another. Otherwise the [`nonce`] proves a handover.
pub(crate) const INODE_IS_A_PROOF: bool = false;

fn has_inode(stat: &Stat) -> bool {
    !matches!(FileType::from_raw_mode(stat.st_mode), FileType::Fifo | FileType::Socket)
}

pub(crate) fn of(stat: &Stat) -> u64 {
    #[allow(clippy::unnecessary_cast)] // Another type on another system.
    let inode = stat.st_ino as u64;
    if has_inode(stat) {
        inode
    } else {
        0
    }
}

/// Whether this can be the descriptor that is meant by `identity`.
pub(crate) fn is(stat: &Stat, identity: u64) -> bool {
    !has_inode(stat) || of(stat) == identity
}

/// A number that no other handover has.
pub(crate) fn nonce() -> Option<u64> {
    Some(RandomState::new().build_hasher().finish())
}
