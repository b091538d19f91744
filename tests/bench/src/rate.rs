//! Counts the connections or requests of a server, and reports a rate.

use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::{hear, say, sys};

pub static ACCEPTED: AtomicU64 = AtomicU64::new(0);

pub fn count<S>(stream: S) {
    drop(stream);
    ACCEPTED.fetch_add(1, Ordering::Relaxed);
}

/// Answers each line `measure MS` with the connections accepted in that time.
pub fn report_rate(listener: &TcpListener) -> io::Result<()> {
    report_rate_of(listener.local_addr()?.port());
    Ok(())
}

/// The same for a listener of another type. Ends the process.
pub fn report_rate_of(port: u16) {
    say(&format!("port {port}"));
    while let Some(ms) = hear().strip_prefix("measure ").and_then(|ms| ms.parse().ok()) {
        let state = || (sys::now(), ACCEPTED.load(Ordering::Relaxed), sys::cpu_seconds(false));
        let before = state();
        // The time over which the rate is measured.
        thread::sleep(Duration::from_millis(ms));
        let after = state();
        let (time, accepted) = (after.0 - before.0, after.1 - before.1);
        let rate = accepted as f64 / (time as f64 / 1e9);
        let cpu = (after.2 - before.2) * 1e6 / accepted.max(1) as f64;
        say(&format!("rate per_second={rate:.0} cpu_us={cpu:.3}"));
    }
    std::process::exit(0)
}
