//! Waiting in many threads for one listener: each has its own epoll(7), so that a connection wakes only one of them.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::epoll;

use crate::sys::stdio::above_stdio;

#[derive(Debug)]
pub(crate) struct Watch(OwnedFd);

impl Watch {
    /// Watches `listener`, exclusively (EPOLLEXCLUSIVE), and `gate`.
    pub(crate) fn new(listener: BorrowedFd<'_>, gate: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        let watch = Self(above_stdio(epoll::create(epoll::CreateFlags::CLOEXEC)?)?);
        let data = epoll::EventData::new_u64(0);
        epoll::add(&watch.0, listener, data, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
        epoll::add(&watch.0, gate, data, epoll::EventFlags::IN)?;
        Ok(watch)
    }

    /// Blocks until one of the two is readable, or a signal arrives.
    pub(crate) fn wait(&self) {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let _ = epoll::wait(&self.0, &mut events, None);
    }
}
