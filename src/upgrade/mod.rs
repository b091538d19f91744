//! One upgrade, in seven steps.
//!
//! | step | process | where |
//! |---|---|---|
//! | 1 | parent | `sockets`: every socket is in the registry before a trigger fires |
//! | 2 | parent | [`parent`]: `pack` builds everything that needs memory |
//! | 3 | parent | [`parent`]: `start` spawns the child, or `begin` hands over to a process that already runs |
//! | 4 | parent | [`parent`]: `wait_ready` is one poll over the link, the triggers and the deadline |
//! | 5 | child | [`child`]: `inherit` checks that the handover is meant for this process, and reads it |
//! | 6 | child | `sockets`: claims each listener; [`child`]: `ready` sends that, and waits for the commit |
//! | 7 | parent | [`parent`]: `commit` pauses accepting, commits, and waits for the verdict |

pub(crate) mod child;
pub(crate) mod parent;
mod successor;
mod verification;
