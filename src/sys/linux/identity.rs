//! What proves that a descriptor is the one meant: the inode of a file, pipe or socket.

use rustix::fs::Stat;

pub(crate) fn of(stat: &Stat) -> u64 {
    stat.st_ino
}
