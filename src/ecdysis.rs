//! The two states of a generation that a program holds: starting, and running.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::event::Event;
use crate::exit::{Exit, ExitReason, Upgraded};
use crate::handover::lines::FromChild;
use crate::service::Service;
use crate::shutdown::{Shutdown, State};
use crate::sockets::Sockets;
use crate::triggers::control::TakeoverSocket;
use crate::triggers::request::Reply;
use crate::upgrade::child;

/// A generation that does not serve yet: it claims or makes its sockets, reads its configuration, warms up. A parent,
/// if there is one, serves meanwhile.
///
/// Dropping it gives up: in a child, the parent hears of it and serves on.
pub struct Starting(pub(crate) Arc<Service>);

impl Starting {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.generation.ancestors.is_child()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation.number
    }

    /// The handle through which this generation accepts, once it is ready.
    pub fn shutdown(&self) -> Shutdown {
        self.0.generation.shutdown.clone()
    }

    /// Serves from here on. In a child: closes what was inherited and not claimed, writes the PID file, tells the
    /// parent, and returns when the parent has stopped accepting. If the parent is dead, or does not answer within 5
    /// seconds, this process serves without it.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`]: this generation does not serve, and the parent does.
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
            generation.reporter.warn_of_the_end();
            generation.warn_of_lost_rights();
        }
        self.0.watch_probation();
        // From here `Starting` has nothing left to give up.
        Ok(Ecdysis(self.0.clone()))
    }

    /// Refuses to serve, in words for an operator: the parent's upgrade fails with [`Error::Refused`] and this reason.
    /// Return the error from `main`.
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

    /// Tells a parent that this process will not serve, and closes the sockets.
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
        // After `ready` this does nothing. A panic is about to end this process, and that says more.
        if !std::thread::panicking() {
            self.give_up("dropped before it was ready".into());
        }
    }
}

/// A generation that serves. A clone is the same one.
#[derive(Clone)]
pub struct Ecdysis(pub(crate) Arc<Service>);

impl Ecdysis {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.generation.ancestors.is_child()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation.number
    }

    /// The handle through which this generation accepts.
    pub fn shutdown(&self) -> Shutdown {
        self.0.generation.shutdown.clone()
    }

    /// Waits for triggers, in one poll, and does what they ask for. After a failed upgrade it goes on. Returns when
    /// this generation's service is over: accepting has ended, and it is time to [`drain`](Shutdown::drain).
    ///
    /// A second call, or one after [`upgrade`](Self::upgrade) or [`stop`](Self::stop) ended the service, returns the
    /// same.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] before `ready`, where an asynchronous program has this handle already. [`Error::Wait`] if the
    /// poll itself fails. The service goes on, without triggers.
    pub fn run(&self) -> Result<Exit, Error> {
        self.0.run()
    }

    /// Upgrades now, from any thread, and waits for the verdict: after the probation of the child. If `run` runs in
    /// another thread, that does the work and then returns too.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let server = ecdysis::Ecdysis::builder().start()?.ready()?;
    /// match server.upgrade() {
    ///     Ok(new) => println!("pid {} serves", new.pid),
    ///     Err(e) => println!("{e}; this process serves on"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Whatever failed, this process serves on as before; [`Error::Busy`] during another upgrade, [`Error::NotReady`]
    /// before `ready`, [`Error::Over`] when this process's service has ended.
    pub fn upgrade(&self) -> Result<Upgraded, Error> {
        self.0.upgrade(Reply::Call)
    }

    /// Hands over to the process that has connected to `socket` and asks to take over; for programs with a loop of their
    /// own. Otherwise as [`upgrade`](Self::upgrade), which does the same with a child. `None` if nobody has connected, or
    /// nobody who may take over and asks within 5 seconds.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use ecdysis::Readable;
    /// let path = "/run/app/takeover";
    /// let starting = ecdysis::Ecdysis::builder().take_over(path).start()?;
    /// let socket = starting.listen_takeover(path)?;
    /// let server = starting.ready()?;
    /// // Any poll, select or epoll does; this is the one at hand.
    /// while server.shutdown().readable(&socket, None)? == Readable::Ready {
    ///     match server.hand_over(&socket) {
    ///         Ok(Some(new)) => println!("pid {} serves", new.pid),
    ///         Ok(None) => {}
    ///         Err(e) => println!("{e}; this process serves on"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`upgrade`](Self::upgrade), and [`Error::Connect`] if accept(2) fails.
    pub fn hand_over(&self, socket: &TakeoverSocket) -> Result<Option<Upgraded>, Error> {
        self.0.hand_over(socket)
    }

    /// Stops: accepting ends, and `run` returns. If nobody is in `run`, that is done here. A child of an upgrade that
    /// is under way is ended. Asked before `ready`, it stops at once after it.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Waits until the parent has ended, for what only one process may use: a lock, a write-ahead log. Returns at once
    /// if there is no parent. The parent ends when its connections do.
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

    /// Waits until this process is asked to stop, by a signal chosen for that or by [`stop`](Self::stop), although
    /// another one serves already. To be called after [`run`](Self::run) and the drain, in a process whose supervisor
    /// would start it again if it ended by itself: that of a container, say, whose new version is another container.
    /// Started again, it would take everything back.
    ///
    /// Returns at once what `run` gave as the reason if that was a stop.
    ///
    /// # Errors
    ///
    /// [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_stop(&self) -> Result<ExitReason, Error> {
        self.0.wait_for_stop()
    }
}

#[cfg(feature = "tokio_ecdysis")]
impl Ecdysis {
    /// Asks the service manager to extend the current timeout by `time`, if it listens to this process.
    #[cfg(feature = "systemd_notify")]
    pub(crate) fn extend_timeout(&self, time: Duration) -> std::io::Result<()> {
        let manager = self.0.generation.reporter.main().filter(|_| !self.0.generation.shutdown.is_handed_over());
        manager.map_or(Ok(()), |manager| manager.extend_timeout(time))
    }

    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn takes_sockets(&self) -> bool {
        self.0.generation.reporter.takes_sockets()
    }
}

impl Deref for Ecdysis {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.generation.sockets
    }
}
