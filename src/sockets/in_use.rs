//! Explains why an address is in use: names the other socket, if this process can know it.

use std::env;
use std::net::SocketAddr;
use std::process;

use rustix::net::{getsockname, sockopt};

use crate::handover::entry::Entry;
use crate::key::{Key, Kind};

/// Explains why bind(2) for `key` fails with "address in use": unclaimed `inherited` sockets, sockets that are `ours`,
/// or those that a service manager passed to another process.
pub(super) fn causes(key: &Key, inherited: &[Entry], ours: &[Entry], is_child: bool) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    let overlapping = |entry: &&Entry| entry.key.kind() == key.kind() && overlaps(key, entry);
    for Entry { key: other, unit, .. } in inherited.iter().filter(overlapping) {
        causes.push(match unit {
            Some(unit) => format!("the service manager passed {other} as {unit:?}, which is unclaimed"),
            None => format!("it belongs to the inherited {other}, which is unclaimed"),
        });
    }
    for other in ours.iter().filter(overlapping).map(|entry| entry.key.to_string()) {
        let both = other.contains('[') && !key.to_string().contains('[');
        let hint = if both { ", which accepts IPv4 as well (Socket::set_only_v6)" } else { "" };
        causes.push(format!("it belongs to {other} of this process{hint}"));
    }
    // In a child the variables are those of the first generation.
    let taken = inherited.iter().chain(ours).any(|entry| entry.unit.is_some());
    if !is_child && !taken {
        causes.extend(passed_elsewhere(|name| env::var(name).ok(), process::id()));
    }
    causes
}

/// Whether a socket is bound to an address that conflicts with bind(2) for `key`.
fn overlaps(key: &Key, entry: &Entry) -> bool {
    if !matches!(key.kind(), Kind::Tcp | Kind::Udp) {
        return false;
    }
    let wanted = key.name().to_str().and_then(|name| name.parse::<SocketAddr>().ok());
    let bound = getsockname(&entry.fd).ok().and_then(|address| SocketAddr::try_from(address).ok());
    let (Some(wanted), Some(bound)) = (wanted, bound) else { return false };
    let only_v6 = || sockopt::ipv6_v6only(&entry.fd).unwrap_or(true);
    wanted.port() == bound.port()
        && match (wanted.ip().is_ipv4(), bound.ip().is_ipv4()) {
            (true, true) | (false, false) => {
                wanted.ip() == bound.ip() || wanted.ip().is_unspecified() || bound.ip().is_unspecified()
            }
            (true, false) => bound.ip().is_unspecified() && !only_v6(),
            (false, true) => wanted.ip().is_unspecified(),
        }
}

/// Describes the sockets that a service manager has passed and that this process did not take, according to its
/// variables.
fn passed_elsewhere(variable: impl Fn(&str) -> Option<String>, me: u32) -> Option<String> {
    let count = variable("LISTEN_FDS").filter(|count| count != "0")?;
    Some(match variable("LISTEN_PID") {
        None => format!("LISTEN_FDS={count} without LISTEN_PID (systemfd --no-pid?), and such sockets are not used"),
        Some(pid) if pid == me.to_string() => {
            format!("the service manager passed {count} sockets, which this program does not use (Builder::systemd_sockets)")
        }
        Some(pid) => format!(
            "the service manager passed {count} sockets to process {pid}, and this is {me}: does a wrapper start it without \
             exec?"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn of(listener: TcpListener, asked_for: &str) -> Entry {
        Entry::new(Key::tcp(asked_for.parse().unwrap()), listener.into()).unwrap()
    }

    #[test]
    fn the_socket_that_has_the_address_is_named() {
        let any = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = any.local_addr().unwrap().port();
        let key = |addr: &str| Key::tcp(format!("{addr}:{port}").parse().unwrap());
        // The key has port 0, as asked for.
        let inherited = [of(any, "0.0.0.0:0")];
        for wanted in ["127.0.0.1", "0.0.0.0", "[::]"] {
            let causes = causes(&key(wanted), &inherited, &[], true);
            assert_eq!(causes, ["it belongs to the inherited tcp 0.0.0.0:0, which is unclaimed"], "{wanted}");
        }
        assert!(causes(&key("[::1]"), &inherited, &[], true).is_empty());
        assert!(causes(&Key::udp(format!("0.0.0.0:{port}").parse().unwrap()), &inherited, &[], true).is_empty());
        assert!(causes(&Key::tcp("0.0.0.0:1".parse().unwrap()), &inherited, &[], true).is_empty());
    }

    #[test]
    fn a_dual_stack_socket_has_the_ipv4_address_too() {
        let both = TcpListener::bind("[::]:0").unwrap();
        let port = both.local_addr().unwrap().port();
        let ours = [of(both, &format!("[::]:{port}"))];
        let key = Key::tcp(format!("0.0.0.0:{port}").parse().unwrap());
        let why =
            format!("it belongs to tcp [::]:{port} of this process, which accepts IPv4 as well (Socket::set_only_v6)");
        assert_eq!(causes(&key, &[], &ours, true), [why]);
    }

    #[test]
    fn sockets_for_another_process_are_named() {
        let causes = |pid: Option<&str>| {
            let pid = pid.map(str::to_owned);
            let variable = |name: &str| if name == "LISTEN_PID" { pid.clone() } else { Some("2".into()) };
            passed_elsewhere(variable, 7).unwrap()
        };
        assert!(causes(None).contains("systemfd --no-pid"));
        assert!(causes(Some("8")).contains("to process 8, and this is 7"));
        assert!(causes(Some("7")).contains("Builder::systemd_sockets"));
        assert_eq!(passed_elsewhere(|_| None, 7), None);
    }
}
