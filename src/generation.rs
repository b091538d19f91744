//! One generation: its facts and its handles. It holds no lock and runs no loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::handover::ancestors::Ancestors;
use crate::handover::escape::escape;
use crate::handover::manifest::Origin;
use crate::logging;
use crate::options::{Launch, Limits, Overlap};
use crate::pid_file::PidFile;
use crate::reporter::Reporter;
use crate::shutdown::Shutdown;
use crate::sockets::Sockets;
use crate::triggers::request::Calls;

pub(crate) struct Generation {
    /// The first is 1.
    pub(crate) number: u64,
    /// What this generation says of itself when it hands over.
    pub(crate) origin: Origin,
    pub(crate) began: Instant,
    pub(crate) launch: Launch,
    pub(crate) limits: Limits,
    pub(crate) sockets: Sockets,
    pub(crate) shutdown: Shutdown,
    pub(crate) ancestors: Arc<Ancestors>,
    pub(crate) pid_file: PidFile,
    pub(crate) reporter: Reporter,
    /// Where threads of this process leave requests.
    pub(crate) calls: Arc<Calls>,
}

impl Generation {
    /// The answer to `status`.
    pub(crate) fn status(&self, phase: &str) -> String {
        let draining: Vec<_> = self.ancestors.draining().map(|link| link.generation.to_string()).collect();
        let mut line = format!(
            "pid={} generation={} uptime_ms={} phase={phase} connections={} draining={}",
            std::process::id(),
            self.number,
            self.began.elapsed().as_millis(),
            self.shutdown.guarded(),
            draining.join(","),
        );
        for key in self.sockets.registry().keys() {
            line.push_str(" socket=");
            escape(key.to_string().as_bytes(), &mut line);
        }
        line.push('\n');
        line
    }

    /// Warns of the files that this process can no longer replace: it has dropped rights since it made them, and the next
    /// version will start without those rights. The first generation looks, after its start and before it is replaced.
    pub(crate) fn warn_of_lost_rights(&self) {
        let mut files = self.sockets.registry().out_of_reach();
        files.extend(self.pid_file.out_of_reach());
        if self.number == 1 && !files.is_empty() {
            logging::warn!(
                "this process can no longer replace or remove {files:?}, nor can the next version: drop rights in a process \
                 whose user may write to their directories"
            );
        }
    }

    /// Whether the program allows an upgrade now.
    pub(crate) fn may_overlap(&self) -> bool {
        self.limits.overlap != Overlap::Refuse || self.ancestors.draining().next().is_none()
    }

    /// After a successful upgrade: asks the oldest generations to end their drains if too many drain.
    pub(crate) fn bound_overlap(&self) {
        let Overlap::AtMost(most) = self.limits.overlap else { return };
        let draining: Vec<_> = self.ancestors.draining().collect();
        let too_many = (draining.len() + 1).saturating_sub(most);
        for link in draining.iter().take(too_many) {
            logging::info!("ending the drain of generation {}", link.generation);
            link.end_drain(Duration::ZERO);
        }
        if too_many > draining.len() {
            self.shutdown.end_drain();
        }
    }
}
