//! The two states of a generation that a program holds: starting, and running.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::builder::Builder;
use crate::error::{chain, Error};
use crate::event::Event;
use crate::exit::{Exit, ExitMode, ExitReason, Upgraded};
use crate::handover::lines::FromChild;
use crate::service::{Core, Turn};
use crate::shutdown::{Shutdown, State};
use crate::sockets::Sockets;
use crate::takeover::TakeoverSocket;
use crate::trigger::{Action, Outcome, Reply, Request};
use crate::upgrade;

/// A generation that does not serve yet: it claims or makes its sockets, reads its configuration, warms up. A parent,
/// if there is one, serves meanwhile.
///
/// Dropping it gives up: in a child, the parent hears of it and serves on.
pub struct Starting(pub(crate) Arc<Core>);

impl Starting {
    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.ancestors.parent.is_some()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// The handle through which this generation accepts, once it is ready.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
    }

    /// Serves from here on. In a child: closes what was inherited and not claimed, writes the PID file, tells the
    /// parent, and returns when the parent has stopped accepting. If the parent is dead, or does not answer within 5
    /// seconds, this process serves without it.
    ///
    /// # Errors
    ///
    /// [`Error::PidFile`], [`Error::Ready`]: this generation does not serve, and the parent does.
    pub fn ready(self) -> Result<Ecdysis, Error> {
        if let Err(error) = upgrade::ready(&self.0) {
            self.0.ancestors.send_to_parent(&FromChild::Refused(chain(&error)));
            return Err(error);
        }
        self.0.shutdown.set(State::Accepting);
        if self.0.is_main() {
            self.0.store_sockets();
        }
        self.0.emit(&Event::Serving { generation: self.0.generation });
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
        self.0.ancestors.send_to_parent(&FromChild::Refused(reason.clone()));
        Error::RefusedHere { reason }
    }
}

impl Deref for Starting {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.sockets
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // After `ready` there are two owners.
        if self.0.shutdown.state() == State::Starting {
            self.0.shutdown.set(State::HandedOver);
        }
    }
}

/// A generation that serves. A clone is the same one.
#[derive(Clone)]
pub struct Ecdysis(pub(crate) Arc<Core>);

impl Ecdysis {
    /// Begins with the choices.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Whether another generation handed over to this one: it was started by an upgrade, or took over.
    pub fn is_child(&self) -> bool {
        self.0.ancestors.parent.is_some()
    }

    /// This process's generation. The first is 1.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// The handle through which this generation accepts.
    pub fn shutdown(&self) -> Shutdown {
        self.0.shutdown.clone()
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
        let core = &*self.0;
        if core.shutdown.state() == State::Starting {
            return Err(Error::NotReady);
        }
        let mut driver = core.lock();
        loop {
            if let Some(exit) = &driver.exit {
                return Ok(exit.clone());
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    let mut turn = Turn { core, triggers: Some(triggers) };
                    while !turn.serve()? {}
                    drop(turn);
                    driver = core.lock();
                }
                // Another thread upgrades; it gives the triggers back.
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
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
        self.wait_upgraded(Reply::Call)
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
        let Some(taker) = socket.accept(&self.0.config.trust)? else { return Ok(None) };
        self.wait_upgraded(|outcome| Reply::TakeoverRequest(taker, Some(outcome))).map(Some)
    }

    fn wait_upgraded(&self, reply: impl FnOnce(Outcome) -> Reply) -> Result<Upgraded, Error> {
        let core = &*self.0;
        if core.shutdown.state() == State::Starting {
            return Err(Error::NotReady);
        }
        let outcome = Outcome::default();
        self.post(Action::Upgrade, reply(outcome.clone()));
        let mut driver = core.lock();
        loop {
            if let Some(outcome) = outcome.lock().unwrap_or_else(PoisonError::into_inner).take() {
                drop(driver);
                if outcome.is_ok() {
                    core.shutdown.wait();
                }
                return outcome;
            }
            if driver.exit.is_some() {
                return Err(Error::Over);
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    Turn { core, triggers: Some(triggers) }.serve()?;
                    driver = core.lock();
                }
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Stops: accepting ends, and `run` returns. If nobody is in `run`, that is done here. A child of an upgrade that
    /// is under way is ended. Asked before `ready`, it stops at once after it.
    pub fn stop(&self) {
        self.post(Action::Stop, Reply::Nobody);
        if self.0.shutdown.state() == State::Starting {
            return;
        }
        let triggers = self.0.lock().triggers.take();
        if let Some(triggers) = triggers {
            let mut turn = Turn { core: &self.0, triggers: Some(triggers) };
            while let Ok(false) = turn.serve() {}
        }
    }

    /// Waits until the parent has ended, for what only one process may use: a lock, a write-ahead log. Returns at once
    /// if there is no parent. The parent ends when its connections do.
    ///
    /// # Errors
    ///
    /// [`Error::ParentLives`] after `deadline`; [`Error::Wait`] if poll(2) fails.
    pub fn wait_for_parent(&self, deadline: Duration) -> Result<(), Error> {
        let Some(parent) = &self.0.ancestors.parent else { return Ok(()) };
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
        let exit = self.run()?;
        if !matches!(exit.mode, ExitMode::Upgraded(_)) {
            return Ok(exit.reason);
        }
        let core = &*self.0;
        let mut driver = core.lock();
        loop {
            if let Some(reason) = &driver.stop {
                return Ok(reason.clone());
            }
            match driver.triggers.take() {
                Some(triggers) => {
                    drop(driver);
                    let mut turn = Turn { core, triggers: Some(triggers) };
                    let reason = turn.wait_for_stop()?;
                    core.lock().stop = Some(reason);
                    drop(turn);
                    driver = core.lock();
                }
                // Another thread waits for the same.
                None => driver = core.changed.wait(driver).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn post(&self, action: Action, reply: Reply) {
        let request = Request { action, reason: ExitReason::Call, since: Instant::now(), reply };
        self.0.calls.post(request);
    }
}

#[cfg(feature = "tokio_ecdysis")]
impl Ecdysis {
    /// Asks the service manager, if it listens to this process, for so much more time.
    #[cfg(feature = "systemd_notify")]
    pub(crate) fn extend_timeout(&self, time: Duration) -> Result<(), crate::systemd::NotifyError> {
        let manager = self.0.manager();
        match manager.notifier().filter(|_| manager.is_main() && !self.0.shutdown.is_handed_over()) {
            Some(notifier) => notifier.extend_timeout(time),
            None => Ok(()),
        }
    }

    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn takes_sockets(&self) -> bool {
        self.0.takes_sockets.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl Deref for Ecdysis {
    type Target = Sockets;

    fn deref(&self) -> &Sockets {
        &self.0.sockets
    }
}
