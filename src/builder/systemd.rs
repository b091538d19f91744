//! Choices about the service manager.

use super::Builder;

impl Builder {
    /// Notifies the service manager that started this process (`NOTIFY_SOCKET`) when it serves, upgrades and stops, and
    /// of the outcome of an upgrade. Also sends watchdog messages, and extends the timeout while a stop makes progress.
    /// Off by default. Without a service manager this does nothing.
    ///
    /// This works with the default `NotifyAccess=main`, because each generation announces the next.
    /// [`Ecdysis::run`](crate::Ecdysis::run) sends the watchdog messages, so the manager kills a process that does not
    /// return to it within `WatchdogSec=`. See the [guide](crate::guide::systemd).
    ///
    /// # Errors
    ///
    /// [`start`](Self::start) fails with [`Error::ServiceManager`](crate::Error::ServiceManager) if the address in
    /// `NOTIFY_SOCKET` cannot be used.
    #[cfg(feature = "systemd_notify")]
    pub fn systemd_notify(&mut self, on: bool) -> &mut Self {
        self.systemd_notify = on;
        self
    }

    /// Takes the sockets that the service manager passes to this process (`LISTEN_FDS`): those of its socket units,
    /// and, together with `systemd_notify`, those that an earlier run has stored (`FileDescriptorStoreMax=`). Off by
    /// default. `listen_tcp` and similar methods then find them by their addresses, like the sockets of a parent.
    ///
    /// If several sources have a socket for the same address, the parent's comes first, then the store's, then the
    /// unit's. Stored sockets that are not asked for before `ready` are closed and removed from the store. Sockets of a
    /// unit that are not asked for are kept for the next generation.
    ///
    /// No other code of the program may use the passed descriptors.
    ///
    /// # Errors
    ///
    /// [`start`](Self::start) fails with [`Error::ServiceManager`](crate::Error::ServiceManager) if the variables are
    /// malformed or name descriptors that are not open.
    #[cfg(feature = "systemd_sockets")]
    pub fn systemd_sockets(&mut self, on: bool) -> &mut Self {
        self.systemd_sockets = on;
        self
    }

    /// Sets whether a stop passes state, streams and descriptors to the next start of the service, as an upgrade passes
    /// them to the child: everything from [`pass_bytes`](crate::Sockets::pass_bytes),
    /// [`pass_stream`](crate::Sockets::pass_stream) and [`pass_fd`](crate::Sockets::pass_fd). So they survive
    /// `systemctl restart`. The next start takes them with the same calls as a child. Default: no.
    ///
    /// It needs [`systemd_notify`](Self::systemd_notify), [`systemd_sockets`](Self::systemd_sockets), and
    /// `FileDescriptorStoreMax=` in the unit: one for each listener, one for each passed item, and one more. The next
    /// start gets everything or nothing: an incomplete handover is logged and not used. A crash passes nothing.
    ///
    /// The stop acts as the commit: accepting is paused while the callbacks run, which have 3 seconds together. From
    /// [`Event::Ended`](crate::Event::Ended) on, the streams belong to the next start, and the bytes do not contain
    /// changes that connections make during the drain.
    ///
    /// ```
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let starting = ecdysis::Ecdysis::builder()
    ///     .systemd_notify(true)
    ///     .systemd_sockets(true)
    ///     .systemd_keep_passed(true)
    ///     .start()?;
    /// let sessions = starting.take_bytes("sessions")?.unwrap_or_default();
    /// starting.pass_bytes("sessions", move || Ok::<_, std::io::Error>(sessions.clone()))?;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
    pub fn systemd_keep_passed(&mut self, on: bool) -> &mut Self {
        self.keep_passed = on;
        self
    }
}
