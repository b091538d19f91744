//! systemd without its library: notifications (feature `systemd_notify`), sockets (feature `systemd_sockets`).
//!
//! Enable them with `systemd_notify` and `systemd_sockets` of [`Builder`](crate::Builder), which then does everything
//! that an upgrade needs; see the [guide](crate::guide::systemd).

#[cfg(feature = "systemd_notify")]
pub(crate) mod manager;
#[cfg(feature = "systemd_notify")]
mod notify;
#[cfg(feature = "systemd_sockets")]
pub(crate) mod sockets;
#[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
pub(crate) mod stored;
#[cfg(feature = "systemd_notify")]
mod watchdog;

#[cfg(feature = "systemd_notify")]
pub use notify::{Notifier, NotifyError};
#[cfg(feature = "systemd_notify")]
pub use watchdog::watchdog_interval;
