//! Wakes a thread that is blocked in a read of a TCP connection.

use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use super::sockopt;

/// Whether a TCP connection whose receiving side is shut down still delivers new data. On other systems the data is
/// discarded.
pub(crate) const STILL_RECEIVES: bool = cfg!(target_os = "linux");

/// Makes a blocked read(2) of connection `fd` return, and every later read without data (shutdown(2)). That cannot be
/// undone, so this does nothing if bytes have arrived within the last `quiet`, or are still unread. Returns whether the
/// reader was woken.
///
/// `fd` must be open and refer to this connection. Otherwise another one is woken. So call this under a lock that the
/// reading thread takes before it closes the connection.
pub(crate) fn wake_reader(fd: RawFd, quiet: Duration) -> bool {
    if fd < 0 {
        return false;
    }
    // SAFETY: the caller keeps it open, and it is not -1, which `BorrowedFd` excludes.
    let connection = unsafe { BorrowedFd::borrow_raw(fd) };
    let unread = rustix::io::ioctl_fionread(connection).unwrap_or(0);
    if unread > 0 || last_received(connection).is_some_and(|ago| ago < quiet) {
        return false;
    }
    rustix::net::shutdown(connection, rustix::net::Shutdown::Read).is_ok()
}

/// Returns how long ago the last byte arrived ([tcp(7)](https://man7.org/linux/man-pages/man7/tcp.7.html), `TCP_INFO`).
fn last_received(connection: BorrowedFd<'_>) -> Option<Duration> {
    /// The position of `tcpi_last_data_recv` in `struct tcp_info`, where four-byte fields follow after eight bytes.
    const LAST_RECEIVED: usize = 13;
    let info = sockopt::get(connection, libc::IPPROTO_TCP, TCP_INFO, [0_u32; LAST_RECEIVED + 1]).ok()?;
    Some(Duration::from_millis(info[LAST_RECEIVED].into()))
}

#[cfg(target_os = "linux")]
use libc::TCP_INFO;
/// On other systems no reader is woken in this way.
#[cfg(not(target_os = "linux"))]
const TCP_INFO: libc::c_int = 0;
