//! A stop signal that ends a drain: a second stop signal, if the program chose that; or a stop signal after the crash
//! of every later generation. A service manager that restarts the service after that crash sends it, and waits for this
//! process.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::logging;
use crate::shutdown::{End, EndSignal};
use crate::sys::signal::{clear_wake, name, put_back, take_pending, wake_fd};

/// Created once the service is over in this process. From then on, only this and `wait_for_stop` take pending signals.
#[derive(Debug)]
pub(crate) struct StopSignal {
    signals: Vec<i32>,
    wake: BorrowedFd<'static>,
    /// Whether the signal stays pending, for `wait_for_stop` after the drain.
    puts_back: bool,
}

impl StopSignal {
    pub(crate) fn new(signals: Vec<i32>, puts_back: bool) -> io::Result<Self> {
        Ok(Self { signals, wake: wake_fd()?, puts_back })
    }
}

impl EndSignal for StopSignal {
    fn fd(&self) -> BorrowedFd<'_> {
        self.wake
    }

    fn read(&self) -> End {
        // Do this first, so that a signal that arrives after the next line makes the descriptor readable again.
        clear_wake();
        match take_pending().find(|signal| self.signals.contains(signal)) {
            Some(signal) => {
                logging::info!("a stop signal ends the drain: signal={}", name(signal));
                if self.puts_back {
                    put_back(signal);
                }
                End::Within(Duration::ZERO)
            }
            None => End::Continue,
        }
    }
}
