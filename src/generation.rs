//! One generation: its facts and its handles, without locks or loops.

use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::handover::ancestors::Ancestors;
use crate::handover::drain_status::{self, DrainStatus};
use crate::handover::escape::escaped;
use crate::handover::manifest::Origin;
use crate::logging;
use crate::options::{Options, Overlap};
use crate::pid_file::PidFile;
use crate::program::Program;
use crate::reporter::Reporter;
use crate::shutdown::Shutdown;
use crate::sockets::Sockets;
use crate::sys::attributes::Attributes;
use crate::triggers::request::Calls;

pub(crate) struct Generation {
    /// The number of this generation. The first is 1.
    pub(crate) number: u64,
    /// How this generation identifies itself when it hands over.
    pub(crate) origin: Origin,
    pub(crate) began: Instant,
    pub(crate) options: Options,
    /// What the next generation runs, unless `before_upgrade` changes it.
    pub(crate) program: Program,
    /// The attributes with which this process was started, and with which every child will start.
    pub(crate) attributes: Attributes,
    /// Whether a stop passes state to the next start, through the service manager's store.
    pub(crate) keep_passed: AtomicBool,
    pub(crate) sockets: Sockets,
    pub(crate) shutdown: Shutdown,
    pub(crate) ancestors: Arc<Ancestors>,
    pub(crate) pid_file: PidFile,
    pub(crate) reporter: Reporter,
    /// The status that later generations can read while this one drains. `None` if there was no memory for it.
    pub(crate) drain_status: Option<Arc<DrainStatus>>,
    /// Where threads of this process leave requests.
    pub(crate) calls: Arc<Calls>,
}

impl Generation {
    /// Returns the answer to `status`.
    pub(crate) fn status(&self, phase: &str) -> String {
        let draining: Vec<_> = self.ancestors.draining().map(|link| link.generation().to_string()).collect();
        let mut line = format!(
            "pid={} generation={} uptime_ms={} phase={phase} connections={} draining={}",
            std::process::id(),
            self.number,
            self.began.elapsed().as_millis(),
            self.shutdown.guarded(),
            draining.join(","),
        );
        let phase = if self.ancestors.on_probation() { "probation" } else { "draining" };
        let parent = self.ancestors.parent.as_ref().map(|parent| parent.generation());
        for link in self.ancestors.draining() {
            let phase = if Some(link.generation()) == parent { phase } else { "draining" };
            // Writing to a string cannot fail.
            let _ = write!(line, " older=generation:{},phase:{phase}", link.generation());
            if let Some((pid, age, left)) = self.ancestors.status_of(link).and_then(drain_status::read) {
                let _ = write!(line, ",pid:{pid},uptime_ms:{},connections:{left}", age.as_millis());
            }
        }
        for key in self.sockets.registry().keys() {
            line += &format!(" socket={}", escaped(&key.to_string()));
        }
        line.push('\n');
        line
    }

    /// Warns of files that this process can no longer replace, because it has dropped privileges since it created them
    /// and the next version will start without these privileges. The first generation checks this after its start and
    /// before it is replaced.
    pub(crate) fn warn_of_lost_rights(&self) {
        if self.number > 1 {
            return;
        }
        let mut files = self.sockets.registry().out_of_reach();
        files.extend(self.pid_file.out_of_reach());
        if !files.is_empty() {
            logging::warn!(
                "this process can no longer replace or remove {files:?}, nor can the next version: drop rights in a process \
                 whose user may write to their directories"
            );
        }
    }

    /// Updates and returns the status of this generation.
    pub(crate) fn drain_status(&self) -> Option<&DrainStatus> {
        let status = self.drain_status.as_deref()?;
        status.write(self.shutdown.guarded());
        Some(status)
    }

    /// Checks that the program allows an upgrade now.
    pub(crate) fn may_overlap(&self) -> bool {
        self.options.overlap != Overlap::Refuse || self.ancestors.draining().next().is_none()
    }

    /// After a successful upgrade, asks the oldest generations to end their drains if too many generations drain.
    pub(crate) fn bound_overlap(&self) {
        let Overlap::AtMost(most) = self.options.overlap else { return };
        let draining: Vec<_> = self.ancestors.draining().collect();
        let too_many = (draining.len() + 1).saturating_sub(most);
        for link in draining.iter().take(too_many) {
            logging::info!("ending the drain of generation {}", link.generation());
            link.end_drain(Duration::ZERO);
        }
        if too_many > draining.len() {
            self.shutdown.drains().end(Duration::ZERO);
        }
    }
}
