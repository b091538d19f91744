//! The interval of the service manager's watchdog.

use std::env;
use std::ffi::OsString;
use std::time::Duration;

/// Returns how long the manager waits for `WATCHDOG=1` before it considers this process hung (`WatchdogSec=`); `None`
/// if there is no watchdog. Send the message twice per interval.
///
/// After an upgrade this is still the interval with which the first generation was started.
pub fn watchdog_interval() -> Option<Duration> {
    interval(env::var_os("WATCHDOG_USEC"), env::var_os("WATCHDOG_PID"), std::process::id())
}

/// WATCHDOG_PID names the process for which the variables are meant. Without it they are meant for any process.
fn interval(usec: Option<OsString>, pid: Option<OsString>, me: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.to_str().and_then(|pid| pid.parse().ok()) != Some(me)) {
        return None;
    }
    let usec: u64 = usec?.to_str()?.parse().ok()?;
    (usec > 0 && usec < u64::MAX).then(|| Duration::from_micros(usec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_for_the_process_it_names() {
        let os = |text: &str| Some(OsString::from(text));
        let second = Some(Duration::from_secs(1));
        assert_eq!(interval(os("1000000"), os("7"), 7), second);
        assert_eq!(interval(os("1000000"), None, 7), second);
        assert_eq!(interval(os("1000000"), os("8"), 7), None);
        assert_eq!(interval(os("1000000"), os("x"), 7), None);
        for usec in ["0", "-1", "x", "", "18446744073709551615"] {
            assert_eq!(interval(os(usec), None, 7), None, "{usec}");
        }
        assert_eq!(interval(None, os("7"), 7), None);
    }
}
