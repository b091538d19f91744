//! The start of a generation: its handover, its signal handlers, its control sockets.

use crate::builder::Builder;
use crate::ecdysis::Starting;
use crate::error::Error;
use crate::generation::Generation;
use crate::handover::drain_status::DrainStatus;
use crate::handover::manifest::Origin;
use crate::handover::receive::Inherited;
use crate::logging;
use crate::pid_file::PidFile;
use crate::program::Program;
use crate::reporter::Reporter;
use crate::service::Service;
use crate::shutdown::Shutdown;
use crate::sockets::Sockets;
use crate::started::Started;
use crate::sys::attributes::Attributes;
use crate::sys::program::mounts;
use crate::sys::signal::{self, Handlers};
#[cfg(feature = "systemd_notify")]
use crate::systemd::manager::{is_nested, Systemd, EXEC_PID};
use crate::triggers::control::ControlSockets;
#[cfg(feature = "tokio_ecdysis")]
use crate::triggers::control::Purpose;
#[cfg(feature = "tokio_ecdysis")]
use crate::triggers::request::Action;
use crate::triggers::request::Calls;
use crate::triggers::Triggers;
use crate::upgrade::child::inherit;
#[cfg(feature = "tokio_ecdysis")]
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

impl Builder {
    /// Starts this generation: adopts the handover of the parent, if there is one, installs the signal handlers, and
    /// opens the control sockets. Call this early, before other threads run and before descriptors are opened.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyStarted`], [`Error::Signal`], [`Error::Socket`] for a control socket, [`Error::Handover`]. An
    /// error in a child fails the upgrade: return it from `main`, and the parent keeps serving.
    pub fn start(&mut self) -> Result<Starting, Error> {
        let started = match self.options.standalone {
            true => None,
            false => Some(Started::claim().ok_or(Error::AlreadyStarted)?),
        };
        // Read these first, while they are still as the parent set them.
        let attributes = Attributes::of_this_thread().map_err(Error::prepare("signal mask"))?;
        #[cfg_attr(not(feature = "systemd_notify"), allow(unused_mut))]
        let mut program = Program::running().with(&self.changes);
        let (trust, app) = (self.trust(), self.application.clone());
        let inherited = match self.options.standalone {
            true => None,
            false => inherit(self.take_over.as_deref(), &trust, app.as_deref(), self.options.ready_timeout)?,
        };
        let Inherited { origin: parent, is_takeover, entries, ancestors } = inherited.unwrap_or_default();
        let number = parent.generation + 1;
        let origin = Origin { generation: number, app: app.clone(), mounts: mounts() };
        let same_paths = match (&parent.mounts, &origin.mounts) {
            (Some(parent), Some(own)) => parent == own,
            // A child usually sees the same files as its parent. A process that takes over may be in another mount
            // namespace.
            _ => !is_takeover,
        };
        logging::set_generation(number);
        #[cfg(feature = "systemd_notify")]
        {
            let nested = is_nested(ancestors.parent.is_some());
            program.set_env(EXEC_PID, nested.then_some("0"));
        }
        if number == 1 && program.names_its_version() {
            let program = program.path.display();
            logging::warn!("the path {program} contains a version, so an upgrade runs the same version again: start it through a symlink, or use Builder::exec");
        }

        let (mut handlers, mut signals) = (Handlers::default(), Vec::new());
        let calls = if self.options.standalone {
            Calls::standalone().map_err(Error::prepare("wake descriptor"))?
        } else {
            signal::wake_fd().map_err(Error::prepare("wake descriptor"))?;
            for &(signal, _) in &self.signals {
                handlers.install(signal).map_err(|source| Error::Signal { signal, source })?;
            }
            signals.clone_from(&self.signals);
            Calls::default()
        };
        let sockets = Sockets::new(entries, ancestors.is_child(), same_paths);
        let shutdown = Shutdown::new(self.spread).map_err(Error::prepare("shutdown handle"))?;
        let ancestors = Arc::new(ancestors);
        let reporter = Reporter::new(self.observer.clone(), ancestors.clone(), sockets.clone());
        let pid_file = PidFile::new(self.pid_file.clone());
        let calls = Arc::new(calls);
        let began = Instant::now();
        let drain_status = DrainStatus::new(number, began).map(Arc::new);
        let drain_status =
            drain_status.map_err(|e| logging::debug!("later generations will not see a status: {e}")).ok();
        let (status, manager) = (drain_status.clone(), reporter.manager.clone());
        shutdown.drains().on_progress(Box::new(move |left| {
            if let Some(status) = &status {
                status.write(left);
            }
            if let Some(manager) = manager.get() {
                manager.progress(left);
            }
        }));
        let generation = Generation {
            number,
            origin,
            began,
            options: self.options.clone(),
            program,
            attributes,
            keep_passed: self.keep_passed.into(),
            sockets,
            shutdown,
            ancestors,
            pid_file,
            reporter,
            drain_status,
            calls: calls.clone(),
        };
        #[cfg(feature = "systemd_notify")]
        if self.systemd_notify && !self.options.standalone {
            enable_manager(&generation)?;
        }
        #[cfg(feature = "systemd_sockets")]
        if self.systemd_sockets && !self.options.standalone {
            inherit_from_manager(&generation)?;
        }
        let control =
            self.sockets.iter().map(|(path, purpose)| Ok((generation.sockets.listen_control(path)?, *purpose)));
        let control = control.collect::<Result<_, Error>>()?;
        // Only the program's own claims count.
        generation.sockets.registry().claimed = false;
        let triggers = Triggers::new(signals, handlers, ControlSockets::new(control, trust.clone(), app), calls);
        Ok(Starting(Arc::new(Service::new(generation, triggers, trust, started))))
    }
}

/// Reports to the service manager from now on, if there is one.
#[cfg(feature = "systemd_notify")]
pub(crate) fn enable_manager(generation: &Generation) -> Result<(), Error> {
    let is_child = generation.ancestors.parent.is_some();
    let times = generation.options.ready_timeout.saturating_add(generation.options.probation);
    if let Some(systemd) = Systemd::from_env(generation.number, is_child, times)? {
        // The first manager is kept.
        let _ = generation.reporter.manager.set(Arc::new(systemd));
    }
    Ok(())
}

/// Takes the sockets that the service manager passed, in addition to those of the parent. Returns false if that was
/// already done.
#[cfg(feature = "systemd_sockets")]
pub(crate) fn inherit_from_manager(generation: &Generation) -> Result<bool, Error> {
    if generation.reporter.take_sockets() {
        return Ok(false);
    }
    let passed = crate::systemd::sockets::inherit()?;
    generation.sockets.registry().inherit(passed.sockets);
    generation.sockets.registry().closed.extend(passed.stale);
    #[cfg(feature = "systemd_notify")]
    {
        let (kept, names) = passed.pieces.join();
        let (entries, early) = kept.unwrap_or_default();
        generation.sockets.registry().inherit_kept(entries, early, names);
    }
    Ok(true)
}

/// For the asynchronous interface, whose builder starts first and lets the program choose triggers later.
#[cfg(feature = "tokio_ecdysis")]
impl Starting {
    pub(crate) fn add_signal(&self, signal: i32, action: Action) -> Result<(), Error> {
        self.with_triggers(|triggers| triggers.add_signal(signal, action))?
            .map_err(|source| Error::Signal { signal, source })
    }

    pub(crate) fn add_socket(&self, path: &Path, purpose: Purpose) -> Result<(), Error> {
        let socket = self.0.generation.sockets.listen_control(path)?;
        self.with_triggers(|triggers| triggers.control.sockets.push((socket, purpose)))
    }

    fn with_triggers<T>(&self, change: impl FnOnce(&mut Triggers) -> T) -> Result<T, Error> {
        self.0.lead().triggers.as_mut().map(change).ok_or(Error::Busy)
    }
}
