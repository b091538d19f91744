//! The two states of a generation that a program holds: `Starting` and `Ecdysis`.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::event::Event;
use crate::exit::{Exit, ExitReason, Upgraded};
use crate::handover::lines::FromChild;
use crate::logging;
use crate::service::Service;
use crate::shutdown::{Shutdown, State};
use crate::sockets::Sockets;
use crate::triggers::control::TakeoverSocket;
use crate::triggers::request::Reply;
use crate::upgrade::child;

/// A generation that does not serve yet: it claims or creates its sockets, reads its configuration, and warms up. Its
/// parent, if there is one, keeps serving.
///
/// Dropping it gives up. In a child, the parent is notified and keeps serving.
pub struct Starting(pub(crate) Arc<Service>);

impl Starting {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.generation.ancestors.is_child()
    }

    /// Returns the number of this generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation.number
    }

    /// Returns the handle through which this generation accepts, once it is ready.
    pub fn shutdown(&self) -> Shutdown {
        self.0.generation.shutdown.clone()
    }

    /// Serves from here on. In a child, this closes unclaimed sockets, writes the PID file, notifies the parent, and
    /// returns when the parent has stopped accepting. If the parent is dead, or does not answer within 5 seconds, this
    /// process serves without it.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`]: this generation does not serve, and the parent keeps serving.
    pub fn ready(self) -> Result<Ecdysis, Error> {
        let generation = &self.0.generation;
        if let Err(error) = child::ready(generation) {
            self.give_up(error.to_string());
            return Err(error);
        }
        if let Some(triggers) = &mut self.0.lead().triggers {
            triggers.keep_handlers();
        }
        generation.shutdown.set(State::Accepting);
        generation.reporter.store_sockets();
        generation.reporter.emit(&Event::Serving { generation: generation.number });
        if generation.number == 1 {
            if let Err(e) = generation.reporter.check_unit() {
                logging::warn!("upgrades by a child will fail: {e}");
            }
            generation.warn_of_lost_rights();
        }
        self.0.watch_probation();
        // From here on, dropping `Starting` must not give up.
        Ok(Ecdysis(self.0.clone()))
    }

    /// Refuses to serve, with a reason for the operator: the parent's upgrade fails with [`Error::Refused`] and this
    /// reason. Return the error from `main`.
    ///
    /// ```
    /// # fn config() -> Result<(), std::num::ParseIntError> { Ok(()) }
    /// fn main() -> Result<(), Box<dyn std::error::Error>> {
    ///     let starting = ecdysis::Ecdysis::builder().start()?;
    ///     if let Err(e) = config() {
    ///         return Err(starting.refuse(format!("config: {e}")).into());
    ///     }
    ///     starting.ready()?;
    ///     Ok(())
    /// }
    /// ```
    pub fn refuse(self, reason: impl fmt::Display) -> Error {
        let reason = reason.to_string();
        self.give_up(reason.clone());
        Error::RefusedHere { reason }
    }

    /// Notifies the parent that this process will not serve, and closes the sockets.
    fn give_up(&self, reason: String) {
        let generation = &self.0.generation;
        if generation.shutdown.state() == State::Starting {
            generation.ancestors.send_to_parent(&FromChild::Refused(reason));
            generation.sockets.registry().close_all();
            generation.shutdown.set(State::HandedOver);
        }
    }
}

impl Deref for Starting {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.generation.sockets
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // After `ready` this does nothing. During a panic the parent gets a better error from this process's exit status.
        if !std::thread::panicking() {
            self.give_up("dropped before it was ready".into());
        }
    }
}

/// A generation that serves. Clones refer to the same one.
#[derive(Clone)]
pub struct Ecdysis(pub(crate) Arc<Service>);

impl Ecdysis {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.generation.ancestors.is_child()
    }

    /// Returns the number of this generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation.number
    }

    /// Returns the handle through which this generation accepts.
    pub fn shutdown(&self) -> Shutdown {
        self.0.generation.shutdown.clone()
    }

    /// Waits for triggers, in one poll, and carries out their requests. A failed upgrade does not end it. Returns when
    /// this generation's service is over: accepting has ended, and it is time to [`drain`](Shutdown::drain).
    ///
    /// A second call, or a call after [`upgrade`](Self::upgrade) or [`stop`](Self::stop) has ended the service, returns
    /// the same value.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] before `ready` (asynchronous programs already have this handle then). [`Error::Wait`] if the
    /// poll itself fails; the service continues without triggers.
    pub fn run(&self) -> Result<Exit, Error> {
        self.0.run()
    }

    /// Upgrades now, from any thread, and waits for the verdict, which comes after the child's probation. If another
    /// thread is in `run`, that thread performs the upgrade, and its `run` returns as well.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let server = ecdysis::Ecdysis::builder().start()?.ready()?;
    /// match server.upgrade() {
    ///     Ok(new) => println!("pid {} serves", new.pid),
    ///     Err(e) => println!("{e}; this process keeps serving"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The upgrade failed, and this process keeps serving. [`Error::Busy`] during another upgrade, [`Error::NotReady`]
    /// before `ready`, [`Error::Over`] after this process's service has ended.
    pub fn upgrade(&self) -> Result<Upgraded, Error> {
        self.0.upgrade(Reply::Call)
    }

    /// Hands over to the process that has connected to `socket` and requests a takeover. For programs with their own
    /// event loop. Otherwise like [`upgrade`](Self::upgrade), which does the same with a child. Returns `None` if no
    /// process has connected, or if it is not allowed to take over or sends no request within 5 seconds.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use ecdysis::Readable;
    /// let path = "/run/app/takeover";
    /// let starting = ecdysis::Ecdysis::builder().take_over(path).start()?;
    /// let socket = starting.listen_takeover(path)?;
    /// let server = starting.ready()?;
    /// // Any poll, select or epoll works. This one is part of the library.
    /// while server.shutdown().readable(&socket, None)? == Readable::Ready {
    ///     match server.hand_over(&socket) {
    ///         Ok(Some(new)) => println!("pid {} serves", new.pid),
    ///         Ok(None) => {}
    ///         Err(e) => println!("{e}; this process keeps serving"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`upgrade`](Self::upgrade), and [`Error::Connect`] if accept(2) fails.
    pub fn hand_over(&self, socket: &TakeoverSocket) -> Result<Option<Upgraded>, Error> {
        self.0.hand_over(socket)
    }

    /// Stops: accepting ends, and `run` returns. If no thread is in `run`, this call performs the stop, and blocks during
    /// the [delay](crate::Builder::stop_delay). A running upgrade is ended together with its child. A stop that is
    /// requested before `ready` takes effect right after it.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Waits until the parent has ended, so that this process can use a resource that only one process may use, such as
    /// a lock or a write-ahead log. Returns immediately if there is no parent. The parent ends when its connections
    /// have ended.
    ///
    /// # Errors
    ///
    /// [`Error::ParentLives`] after `deadline`; [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_parent(&self, deadline: Duration) -> Result<(), Error> {
        let Some(parent) = &self.0.generation.ancestors.parent else { return Ok(()) };
        match parent.wait_end(deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::ParentLives { after: deadline }),
            Err(source) => Err(Error::Wait { source }),
        }
    }

    /// Waits until this process is asked to stop, by one of its stop signals or by [`stop`](Self::stop), although
    /// another process already serves. Call this after [`run`](Self::run) and the drain, if the supervisor restarts
    /// every process that exits. An example is a container whose new version is another container. A restarted old
    /// version would take over again.
    ///
    /// If `run` returned because of a stop, this returns that reason immediately.
    ///
    /// # Errors
    ///
    /// [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_stop(&self) -> Result<ExitReason, Error> {
        self.0.wait_for_stop()
    }
}

#[cfg(all(feature = "tokio_ecdysis", feature = "systemd_notify"))]
impl Ecdysis {
    /// Asks the service manager to extend the current timeout by `time`, if it accepts messages of this process.
    pub(crate) fn extend_timeout(&self, time: Duration) -> std::io::Result<()> {
        let manager = self.0.generation.reporter.main().filter(|_| !self.0.generation.shutdown.is_handed_over());
        manager.map_or(Ok(()), |manager| manager.extend_timeout(time))
    }
}

impl Deref for Ecdysis {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.generation.sockets
    }
}
