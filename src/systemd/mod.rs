//! systemd without its library: notifications (feature `systemd_notify`), sockets (feature `systemd_sockets`).
//!
//! What an upgrade needs of both is done by [`Builder::systemd_notify`](crate::Builder::systemd_notify) and
//! [`Builder::systemd_sockets`](crate::Builder::systemd_sockets); see the [guide](crate::guide::systemd).

#[cfg(feature = "systemd_notify")]
mod notify;
#[cfg(feature = "systemd_sockets")]
pub(crate) mod sockets;
#[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
pub(crate) mod stored;

#[cfg(feature = "systemd_notify")]
pub use notify::{watchdog_interval, Notifier, NotifyError};
