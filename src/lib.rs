//! Replace a running network server by its next version without losing a connection.

#[cfg(any(feature = "systemd_notify", feature = "systemd_sockets"))]
pub mod systemd;
