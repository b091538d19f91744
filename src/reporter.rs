//! Reports events to the log, to the program's observer, and to the service manager.

use std::env;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::event::{Delivery, Event};
use crate::exit::Upgraded;
use crate::foreign::Foreign;
use crate::handover::ancestors::Ancestors;
use crate::manager::{Child, ServiceManager, Store, ANNOUNCE};
use crate::sockets::Sockets;

pub(crate) type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

pub(crate) struct Reporter {
    observer: Option<Foreign<Delivery>>,
    ancestors: Arc<Ancestors>,
    sockets: Sockets,
    /// Not set if there is no service manager, or the program does not use it.
    pub(crate) manager: Arc<OnceLock<Arc<dyn ServiceManager>>>,
    /// Whether the program takes the sockets that the manager passes. Only then may the manager store sockets.
    takes_sockets: AtomicBool,
}

impl Reporter {
    pub(crate) fn new(observer: Option<Observer>, ancestors: Arc<Ancestors>, sockets: Sockets) -> Self {
        let thread = |observer: Observer| Foreign::new("ecdysis-events", move |call: Delivery| call(&*observer));
        let observer = observer.map(thread);
        Self { observer, ancestors, sockets, manager: Arc::default(), takes_sockets: AtomicBool::new(false) }
    }

    pub(crate) fn emit(&self, event: &Event<'_>) {
        event.log();
        if let Some(manager) = self.main() {
            manager.on_event(event);
        }
        match (&self.observer, event) {
            // Clients wait until the new version serves, so this does not wait for the observer.
            (Some(observer), Event::Upgrading | Event::Spawned { .. } | Event::Committed(_)) => {
                observer.post(event.delivery());
            }
            (Some(observer), _) => observer.call(event.delivery()),
            (None, _) => {}
        }
    }

    /// Returns the service manager, if this process is its main process. A child becomes the main process when its
    /// parent has announced it.
    pub(crate) fn main(&self) -> Option<&Arc<dyn ServiceManager>> {
        let manager = self.manager.get()?;
        if !manager.is_main() {
            let parent = self.ancestors.parent.as_ref()?.state();
            if !parent.announced && !parent.ended {
                return None;
            }
            manager.become_main(parent.announced);
            self.store_sockets();
        }
        Some(manager)
    }

    /// Makes the manager store every socket, current and future.
    pub(crate) fn store_sockets(&self) {
        if let Some(store) = self.store() {
            self.sockets.registry().store_in(store);
        }
    }

    /// Returns the service manager's store, if the program takes its contents and this process may use it.
    pub(crate) fn store(&self) -> Option<Arc<dyn Store>> {
        self.main().filter(|_| self.takes_sockets()).cloned().and_then(ServiceManager::store)
    }

    pub(crate) fn takes_sockets(&self) -> bool {
        self.takes_sockets.load(Ordering::Relaxed)
    }

    /// Records that the program takes the sockets that the manager passes. Returns whether that was already recorded.
    #[cfg(feature = "systemd_sockets")]
    pub(crate) fn take_sockets(&self) -> bool {
        self.takes_sockets.swap(true, Ordering::Relaxed)
    }

    /// Checks that the service would survive the end of this process.
    ///
    /// # Errors
    /// systemd started this process as the main process of a unit and gets no notification of its successors, or this
    /// is the first process of a PID namespace.
    pub(crate) fn check_unit(&self) -> io::Result<()> {
        let dead = |why| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        if std::process::id() == 1 {
            return dead(
                "this is process 1: when it ends, the kernel kills the new version; start it under hold (examples/hold)",
            );
        }
        let executed = env::var("SYSTEMD_EXEC_PID").ok().and_then(|pid| pid.parse::<u32>().ok());
        let is_notified = self.manager.get().is_some() || env::var_os("NOTIFY_SOCKET").is_some();
        match executed {
            Some(executed) if executed == std::process::id() && !is_notified => dead(
                "systemd would end this unit with the old process: use Type=notify-reload with Builder::systemd_notify; \
                 or UnsetEnvironment=SYSTEMD_EXEC_PID, if the old process stays until it is stopped",
            ),
            _ => Ok(()),
        }
    }

    /// Waits until the parent has announced this process to the manager, which may know it before this process does. A
    /// parent that has sent its verdict, ended or given up on this process announces nothing.
    pub(crate) fn wait_announced(&self) {
        let Some(manager) = self.manager.get() else { return };
        if let Some(parent) = self.ancestors.parent.as_ref().filter(|_| !manager.is_main()) {
            parent.wait_for(ANNOUNCE, |state| state.announced || state.free || state.given_up);
        }
    }

    /// Announces the process that serves now, before this one may end. A child becomes the main process of the service.
    /// A process that took over belongs to another unit or to none, so this service ends. Returns false if there is a
    /// manager and the child could not be announced.
    pub(crate) fn announce(&self, upgraded: &Upgraded, child_id: Option<impl FnOnce() -> Option<u64>>) -> bool {
        // This process may itself be a child that its parent is about to announce.
        self.wait_announced();
        match self.main() {
            Some(manager) => manager.announce(upgraded, child_id.map(|id| Child { id: id() })),
            None => self.manager.get().is_none(),
        }
    }

    /// Announces this process as the main process again, because the child that it has announced has died.
    pub(crate) fn announce_self(&self) {
        if let Some(manager) = self.main() {
            manager.become_main(false);
        }
    }

    /// Sends a watchdog message if one is due. Returns when the next one is due.
    pub(crate) fn watchdog_tick(&self) -> Option<Instant> {
        self.manager.get()?.watchdog_tick(&|| self.main().is_some())
    }
}
