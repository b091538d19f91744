//! A second stop signal, which ends the drain of a program that chose so.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::logging;
use crate::shutdown::{End, EndSignal};
use crate::sys::signal::{clear_wake, name, take_pending, wake_fd};

/// Set once the service has stopped: then nobody else takes the pending signals.
#[derive(Debug)]
pub(crate) struct SecondStop {
    signals: Vec<i32>,
    wake: BorrowedFd<'static>,
}

impl SecondStop {
    pub(crate) fn new(signals: Vec<i32>) -> io::Result<Self> {
        Ok(Self { signals, wake: wake_fd()? })
    }
}

impl EndSignal for SecondStop {
    fn fd(&self) -> BorrowedFd<'_> {
        self.wake
    }

    fn read(&self) -> End {
        // First: a signal that arrives after the next line makes the descriptor readable again.
        clear_wake();
        match take_pending().find(|signal| self.signals.contains(signal)) {
            Some(signal) => {
                logging::info!("a second stop signal ends the drain: signal={}", name(signal));
                End::Within(Duration::ZERO)
            }
            None => End::Continue,
        }
    }
}
