//! systemd without its library: notifications (feature `systemd_notify`), sockets (feature `systemd_sockets`).

#[cfg(feature = "systemd_notify")]
mod notify;

#[cfg(feature = "systemd_notify")]
pub use notify::{watchdog_interval, Notifier, NotifyError};
