//! The units of examples/systemd under a real systemd. They need root, cgroup2, overlayfs and, once, apt:
//!
//!     cargo test --features systemd --test it systemd:: -- --ignored
//!
//! Each test boots a separate systemd (`with-systemd`), and runs the `systemctl` commands that an operator would run.

mod bed;
mod namespaces;
mod passed;
mod stopping;

use self::bed::{systemctl, text, under_systemd};
use crate::support::{self, connect, eventually, field, frozen, Conn, Load};
use std::fs;
use std::io::Read;
use std::process::Command;
use std::time::Duration;

fn ask(address: &str) -> String {
    support::ask(address).unwrap().trim_end().to_owned()
}

/// Sends the line on an open connection and reads the answer.
fn finish(mut stream: Box<dyn Conn>) -> String {
    let mut answer = String::new();
    stream.write_all(b"who\n").unwrap();
    stream.read_to_string(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

fn before_linux_6_15() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(6), Some(15))
}

fn answered(load: Load) {
    let counts = load.stop();
    counts.assert_none_failed();
    println!("{} requests, 0 failed", counts.requests);
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn ten_reloads_under_load_and_a_stop() {
    under_systemd("ten_reloads_under_load_and_a_stop", |machine| {
        let service = machine.service("notify-reload", "");
        service.start();
        let mut pid = service.main_pid();
        assert_eq!(pid, field::<u32>(&service.log.expect("serving"), "pid"));
        assert!(service.status().contains("Status: \"generation 1"), "{}", service.status());

        let load = Load::on("127.0.0.1:8001", 2);
        for generation in 2..=11 {
            service.succeed("reload");
            let child = field::<u32>(&service.log.expect("upgrade ok"), "pid");
            assert_ne!(child, pid);
            pid = child;
            assert_eq!(service.main_pid(), pid, "MainPID follows");
            assert_eq!(ask("127.0.0.1:8001"), format!("gen={generation} pid={pid}"));
            let status = format!("Status: \"generation {generation}");
            assert!(service.status().contains(&status), "{}", service.status());
        }
        answered(load);
        assert_eq!(service.get("ActiveState"), "active");
        assert_eq!(service.get("NRestarts"), "0");
        service.succeed("stop");
        assert_eq!((service.get("Result").as_str(), service.get("ActiveState").as_str()), ("success", "inactive"));
        assert_eq!(service.processes(), Vec::<u32>::new());
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// Type=notify-reload has no message for a failure: `systemctl reload` returns immediately with 0, and STATUS has the
/// reason.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_failed_reload_comes_back_and_the_status_tells() {
    under_systemd("a_failed_reload_comes_back_and_the_status_tells", |machine| {
        let service = machine.service("notify-reload", "");
        service.start();
        let pid = service.main_pid();
        // Since Linux 6.15 the kernel reports the exit status of a process that systemd has reaped.
        let ended = if before_linux_6_15() { "ended before it was ready" } else { "exit status: 1" };
        for (program, cause, errno) in [
            (&b"\x7fELF no program"[..], "Exec format error", libc::ENOEXEC),
            (b"#!/bin/false\n", ended, libc::ECANCELED),
        ] {
            machine.install_file("whoami", program);
            let load = Load::on("127.0.0.1:8001", 1);
            service.succeed("reload");
            answered(load);
            let failed = service.log.expect("upgrade failed");
            assert!(failed.contains(cause), "{failed}");
            let status = service.status();
            assert!(status.contains("Status: \"generation 1, upgrade failed: ") && status.contains(cause), "{status}");
            assert_eq!(service.get("StatusErrno"), errno.to_string());
            assert_eq!(service.get("ActiveState"), "active");
            assert_eq!(service.main_pid(), pid);
        }
        machine.install("whoami");
        service.succeed("reload");
        assert!(service.status().contains("Status: \"generation 2"), "{}", service.status());
        assert_eq!(service.get("StatusErrno"), "0");
        assert_eq!(service.processes(), [service.main_pid()]);
        service.succeed("stop");
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn with_exec_reload_the_exit_code_is_the_outcome() {
    under_systemd("with_exec_reload_the_exit_code_is_the_outcome", |machine| {
        let service = machine.service("notify-execreload", "");
        service.start();
        let load = Load::on("127.0.0.1:8002", 1);
        for generation in 2..=4 {
            service.succeed("reload");
            assert_eq!(service.main_pid(), field::<u32>(&service.log.expect("upgrade ok"), "pid"));
            assert!(service.status().contains(&format!("Status: \"generation {generation}")), "{}", service.status());
        }
        let pid = service.main_pid();
        machine.install_file("whoami", b"#!/bin/false\n");
        let output = service.try_to("reload");
        assert!(!output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("failed"), "{}", text(&output));
        assert_eq!(service.get("ReloadResult"), "exit-code");
        assert_eq!((service.get("ActiveState").as_str(), service.main_pid()), ("active", pid));
        assert!(service.status().contains("upgrade failed: "), "{}", service.status());
        machine.install("whoami");
        service.succeed("reload");
        assert_eq!(service.get("ReloadResult"), "success");
        answered(load);
        service.succeed("stop");
        assert_eq!(service.get("Result"), "success");
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_restart_keeps_the_stored_listeners_and_their_queues() {
    under_systemd("a_restart_keeps_the_stored_listeners_and_their_queues", |machine| {
        let addresses = ["127.0.0.1:8004", "unix:/run/whoami-fdstore.sock"];
        let service = machine.service("fdstore", "");
        service.start();
        assert_eq!(service.get("NFileDescriptorStore"), "2");
        let loads = addresses.map(|address| Load::on(address, 1));
        for generation in [1, 2] {
            service.succeed("restart");
            assert_eq!(ask(addresses[0]), format!("gen=1 pid={}", service.main_pid()));
            if generation == 1 {
                service.succeed("reload");
                service.log.expect("upgrade ok");
                assert_eq!(ask(addresses[1]), format!("gen=2 pid={}", service.main_pid()));
            }
            assert_eq!(service.get("NFileDescriptorStore"), "2", "stored once each");
        }
        loads.into_iter().for_each(answered);

        // A crash loses connections that were being served, but none that wait in the queue.
        let pid = service.main_pid();
        systemctl(&["kill", "--signal=STOP", "fdstore.service"]);
        frozen(pid);
        let waiting = addresses.map(|address| connect(address).unwrap());
        systemctl(&["kill", "--signal=KILL", "fdstore.service"]);
        for stream in waiting {
            assert_eq!(finish(stream), format!("gen=1 pid={}", service.main_pid()));
        }
        assert_ne!(service.main_pid(), pid);
        assert_eq!(service.get("NFileDescriptorStore"), "2");

        // A listener that a new version no longer asks for is removed from the store.
        machine.install_version("--listen 127.0.0.1:8004");
        service.succeed("reload");
        // The new main process can remove it only once it has been announced, which ends the reload.
        eventually("the listener is removed from the store", || service.get("NFileDescriptorStore") == "1");
        assert!(support::ask(addresses[1]).is_err());
        service.succeed("stop");
        assert!(support::ask(addresses[0]).is_err());
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn the_watchdog_ends_a_hung_generation_and_no_other() {
    under_systemd("the_watchdog_ends_a_hung_generation_and_no_other", |machine| {
        let settings = "WatchdogSec=3\nExecStart=\nExecStart=/usr/local/bin/whoami --systemd --listen 127.0.0.1:8001 \
                        --misbehave /run/misbehave";
        let service = machine.service("notify-reload", settings);
        service.start();
        service.log.expect("serving");
        for _ in 0..2 {
            service.succeed("reload");
            service.log.expect("upgrade ok");
            // Wait longer than the watchdog's limit.
            assert_eq!(service.log.within(Duration::from_secs(5), "serving"), None);
        }
        assert_eq!(service.get("NRestarts"), "0");
        assert_eq!(ask("127.0.0.1:8001"), format!("gen=3 pid={}", service.main_pid()));

        fs::write("/run/misbehave", "freeze-after-ready=1000").unwrap();
        service.succeed("reload");
        let hung = field::<u32>(&service.log.expect("upgrade ok"), "pid");
        let next = service.log.expect("serving gen=1");
        assert_ne!(field::<u32>(&next, "pid"), hung);
        assert_eq!(service.get("NRestarts"), "1");
        let log = fs::read_to_string(&machine.journal).unwrap();
        assert!(log.contains("Watchdog timeout"), "{log}");
        service.succeed("stop");
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn sockets_of_a_unit_are_handed_on() {
    under_systemd("sockets_of_a_unit_are_handed_on", |machine| {
        let addresses = ["127.0.0.1:8003", "unix:/run/whoami-socket-activated.sock"];
        let service = machine.service("socket-activated", "");
        let output = systemctl(&["start", "socket-activated.socket"]);
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(service.get("ActiveState"), "inactive");
        // The first connection starts the service.
        assert!(ask(addresses[0]).starts_with("gen=1 "));
        let inodes = |pid: u32| {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            let mut list: Vec<_> = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).collect();
            list.sort();
            list.dedup();
            list
        };
        let sockets_of_the_unit = inodes(1);
        let loads = addresses.map(|address| Load::on(address, 1));
        for generation in 2..=4 {
            service.succeed("reload");
            let pid = service.main_pid();
            for address in addresses {
                assert_eq!(ask(address), format!("gen={generation} pid={pid}"));
            }
            let held = inodes(pid).into_iter().filter(|socket| sockets_of_the_unit.contains(socket)).count();
            assert!(held >= 3, "all three sockets belong to the unit and were handed on: {held}");
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
            let environment = String::from_utf8_lossy(&environment);
            for absent in ["LISTEN_PID=", "LISTEN_FDS=", "LISTEN_FDNAMES=", "LISTEN_PIDFDID=", "WATCHDOG_PID="] {
                assert!(!environment.contains(absent), "{absent} in {environment}");
            }
            for present in ["NOTIFY_SOCKET=", "WATCHDOG_USEC="] {
                assert!(environment.contains(present), "no {present} in {environment}");
            }
        }
        // The unit keeps its sockets across a restart, and the file of the Unix socket belongs to it.
        service.succeed("restart");
        assert!(ask(addresses[1]).starts_with("gen=1 "));
        loads.into_iter().for_each(answered);
        service.succeed("stop");
        assert!(fs::metadata("/run/whoami-socket-activated.sock").is_ok());
        assert!(ask(addresses[1]).starts_with("gen=1 "), "it is started by a connection again");
        systemctl(&["stop", "socket-activated.socket", "socket-activated.service"]);
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// The parent announces its child. A child that announces itself is ignored, as is any other process of the service,
/// unless the unit has `NotifyAccess=all`.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_process_that_announces_itself_needs_notify_access_all() {
    under_systemd("a_process_that_announces_itself_needs_notify_access_all", |machine| {
        let service = machine.service("notify-reload", "");
        service.start();
        let main = service.main_pid();
        let announced = || {
            let procs = format!("/sys/fs/cgroup{}/cgroup.procs", service.get("ControlGroup"));
            // systemd-notify waits until systemd has read the message.
            let script = format!(
                "echo $$ >{procs} && NOTIFY_SOCKET=/run/systemd/notify systemd-notify --pid=$$ && exec sleep infinity"
            );
            let process = Command::new("sh").args(["-c", &script]).spawn().unwrap();
            let name = format!("/proc/{}/comm", process.id());
            eventually("it has sent its message", || fs::read_to_string(&name).unwrap() == "sleep\n");
            process
        };
        let ignored = announced();
        assert_eq!(service.main_pid(), main);
        assert!(
            machine.complaints().iter().any(|line| line.contains("Got notification")),
            "{:?}",
            machine.complaints()
        );
        machine.set("notify-reload.service", "access", "[Service]\nNotifyAccess=all\n");
        let accepted = announced();
        assert_eq!(service.main_pid(), accepted.id());
        service.succeed("stop");
        for mut process in [ignored, accepted] {
            support::wait(&mut process);
        }
    });
}

/// systemd passes sockets only when it starts a service, and does not start a socket unit whose service is running. So
/// the new generation either binds a new address itself, or fails with an error that says why.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_unit_that_gained_a_socket() {
    under_systemd("a_unit_that_gained_a_socket", |machine| {
        let service = machine.service("socket-activated", "");
        machine.set("socket-activated.socket", "test", "[Socket]\nFileDescriptorName=old\n");
        service.start();
        let gained = "[Unit]\n[Socket]\nService=socket-activated.service\nListenStream=127.0.0.1:8013\n\
                      FileDescriptorName=new\n";
        machine.unit("gained.socket", gained);
        let output = systemctl(&["start", "gained.socket"]);
        assert!(!output.status.success(), "systemd starts no socket of a running service: {}", text(&output));

        let old = "--listen 127.0.0.1:8003 --listen unix:/run/whoami-socket-activated.sock --listen udp:127.0.0.1:8003";
        // A socket that is asked for by name must come from systemd.
        machine.install_version(&format!("{old} --listen systemd:new=127.0.0.1:8013"));
        service.succeed("reload");
        let why = service.log.expect("whoami: ");
        assert!(why.contains("did not pass tcp 127.0.0.1:8013 as \"new\""), "{why}");
        assert!(why.contains("only when it starts the service"), "{why}");
        service.log.expect("upgrade failed");
        assert!(ask("127.0.0.1:8003").starts_with("gen=1 "));
        // A socket that is asked for by address may be bound.
        machine.install_version(&format!("{old} --listen 127.0.0.1:8013"));
        service.succeed("reload");
        service.log.expect("upgrade ok");
        assert!(ask("127.0.0.1:8013").starts_with("gen=2 "));
        assert!(ask("127.0.0.1:8003").starts_with("gen=2 "));

        // After a restart with the new socket, the service gets it by name and address, or only by name. Then upgrades
        // hand the sockets on, including those that the old program did not ask for.
        service.succeed("stop");
        systemctl(&["stop", "socket-activated.socket"]);
        systemctl(&["start", "gained.socket", "socket-activated.socket"]);
        machine.install_version("--listen systemd:new=127.0.0.1:8013");
        service.start();
        assert!(ask("127.0.0.1:8013").starts_with("gen=1 "));
        machine.install_version("--listen systemd:new --listen systemd:old");
        service.succeed("reload");
        for address in ["127.0.0.1:8013", "127.0.0.1:8003", "unix:/run/whoami-socket-activated.sock"] {
            assert!(ask(address).starts_with("gen=2 "), "{address}");
        }
        systemctl(&["stop", "socket-activated.socket", "gained.socket", "socket-activated.service"]);
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn an_address_that_is_not_quite_the_units_is_named_beside_it() {
    under_systemd("an_address_that_is_not_quite_the_units_is_named_beside_it", |machine| {
        let service = machine.service("socket-activated", "Restart=no\n");
        machine.set("socket-activated.socket", "test", "[Socket]\nListenStream=\nListenStream=0.0.0.0:8003\n");
        assert!(!service.try_to("start").status.success());
        let why = service.log.expect("whoami: ");
        for part in [
            "cannot open socket tcp 127.0.0.1:8003",
            "in use",
            "passed tcp 0.0.0.0:8003 as \"whoami\"",
            "which is unclaimed",
        ] {
            assert!(why.contains(part), "{why}");
        }
        systemctl(&["stop", "socket-activated.socket"]);
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn a_stop_may_take_as_long_as_it_makes_progress() {
    under_systemd("a_stop_may_take_as_long_as_it_makes_progress", |machine| {
        let settings = "TimeoutStopSec=4\nExecStart=\nExecStart=/usr/local/bin/whoami --systemd --drain 60 \
                        --listen 127.0.0.1:8001";
        let service = machine.service("notify-reload", settings);
        service.start();
        // Test this after an upgrade, because systemd does not wait for a main process that is not its child.
        service.succeed("reload");
        let open: Vec<_> = (0..4).map(|_| connect("127.0.0.1:8001").unwrap()).collect();
        let output = systemctl(&["stop", "--no-block", "notify-reload.service"]);
        assert!(output.status.success(), "{}", text(&output));
        for stream in open {
            // Each connection ends soon enough for TimeoutStopSec, but all together take longer.
            assert_eq!(service.log.within(Duration::from_millis(1500), "ended gen=2"), None);
            assert!(finish(stream).starts_with("gen=2 "));
        }
        let ended = service.log.expect("ended gen=2");
        assert_eq!(field::<usize>(&ended, "left"), 0);
        systemctl(&["stop", "notify-reload.service"]);
        assert_eq!(service.get("Result"), "success");
    });
}

/// A takeover by another unit: the new service is active with its own main process, and the old one has ended
/// successfully.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn another_unit_takes_over() {
    under_systemd("another_unit_takes_over", |machine| {
        let start =
            "ExecStart=\nExecStart=/usr/local/bin/whoami --systemd --listen 127.0.0.1:8001 --takeover-socket /run/take";
        let blue = machine.service("notify-reload", &format!("Restart=on-failure\n{start}"));
        let text = fs::read_to_string(machine.units.join("notify-reload.service")).unwrap();
        machine.unit("green.service", &text);
        let green = machine.service("green", &format!("{start} --take-over /run/take"));
        blue.start();
        let load = Load::on("127.0.0.1:8001", 2);
        green.start();
        let pid = green.main_pid();
        blue.log.expect("ended gen=1");
        eventually("the old service has ended", || blue.get("ActiveState") == "inactive");
        assert_eq!((blue.get("Result").as_str(), blue.get("NRestarts").as_str()), ("success", "0"));
        assert_eq!(ask("127.0.0.1:8001"), format!("gen=2 pid={pid}"));
        assert!(green.status().contains("Status: \"generation 2"), "{}", green.status());
        // From then on, reloads work again.
        green.succeed("reload");
        assert_eq!(ask("127.0.0.1:8001"), format!("gen=3 pid={}", green.main_pid()));
        answered(load);
        green.succeed("stop");
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// With `Spawn::Fork` a generation is not systemd's child, and systemd kills such a main process right after the
/// SIGTERM. An `ExecStop=` that waits avoids that.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn with_fork_alone_exec_stop_waits() {
    under_systemd("with_fork_alone_exec_stop_waits", |machine| {
        let control = "/run/whoami-execreload/control";
        let settings = format!(
            "ExecStart=\nExecStart=/usr/local/bin/whoami --systemd --fork --listen 127.0.0.1:8002 --control-socket {control}\n\
             ExecStop=/usr/local/bin/ctl {control} stop"
        );
        let service = machine.service("notify-execreload", &settings);
        service.start();
        service.succeed("reload");
        service.log.expect("ended gen=1");
        let open = connect("127.0.0.1:8002").unwrap();
        systemctl(&["stop", "--no-block", "notify-execreload.service"]);
        assert_eq!(service.log.within(Duration::from_millis(500), "ended gen=2"), None);
        assert!(finish(open).starts_with("gen=2 "));
        service.log.expect("ended gen=2");
        service.succeed("stop");
        assert_eq!(service.get("Result"), "success");
        // `ctl` returns when the connection ends, shortly before the process is gone. systemd may still see it and kill
        // it, although it has already drained.
        let harmless = |line: &String| ["Supervising", "Killing"].iter().any(|words| line.contains(words));
        assert!(machine.complaints().iter().all(harmless), "{:?}", machine.complaints());
    });
}

#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn few_privileges_are_enough() {
    under_systemd("few_privileges_are_enough", |machine| {
        let service = machine.service("hardened", "");
        service.start();
        let load = Load::on("127.0.0.1:8005", 1);
        for generation in 2..=4 {
            service.succeed("reload");
            let pid = service.main_pid();
            assert_eq!(ask("127.0.0.1:8005"), format!("gen={generation} pid={pid}"));
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
            assert!(!status.contains("Uid:\t0\t"), "{status}");
        }
        answered(load);
        service.succeed("stop");
        assert_eq!(service.get("Result"), "success");
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// The asynchronous interface, which enables the service manager only after the start.
#[cfg(feature = "tokio_ecdysis")]
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn tokio_is_reloaded_and_restarted_under_load() {
    under_systemd("tokio_is_reloaded_and_restarted_under_load", |machine| {
        machine.install("tokio_whoami");
        let settings = "FileDescriptorStoreMax=4\nExecStart=\nExecStart=/usr/local/bin/tokio_whoami --systemd \
                        --workers 2 --listen 127.0.0.1:8001";
        let service = machine.service("notify-reload", settings);
        service.start();
        let mut pid = service.main_pid();
        let load = Load::on("127.0.0.1:8001", 2);
        for generation in 2..=11 {
            service.succeed("reload");
            let child = field::<u32>(&service.log.expect("upgrade ok"), "pid");
            assert_ne!(child, pid);
            pid = child;
            assert_eq!(service.main_pid(), pid, "MainPID follows");
            assert_eq!(ask("127.0.0.1:8001"), format!("gen={generation} pid={pid}"));
        }
        assert_eq!(service.get("NRestarts"), "0");
        eventually("the last one has stored its listener", || service.get("NFileDescriptorStore") == "1");
        service.succeed("restart");
        assert_eq!(ask("127.0.0.1:8001"), format!("gen=1 pid={}", service.main_pid()));
        assert_eq!(service.get("NFileDescriptorStore"), "1");
        answered(load);
        service.succeed("stop");
        assert_eq!((service.get("Result").as_str(), service.get("ActiveState").as_str()), ("success", "inactive"));
        assert_eq!(service.processes(), Vec::<u32>::new());
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// `examples/tokio_echo.rs`, whose port is fixed. It is free here, because this network namespace is new.
#[cfg(feature = "tokio_ecdysis")]
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn the_tokio_echo_server_on_its_port() {
    fn echoes(connection: &mut dyn Conn) {
        connection.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        connection.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
    }
    under_systemd("the_tokio_echo_server_on_its_port", |_| {
        let server = support::Server::start(std::process::Command::new(support::example("tokio_echo")));
        eventually("it listens", || connect("127.0.0.1:8080").is_ok());
        let mut open = connect("127.0.0.1:8080").unwrap();
        echoes(&mut *open);
        let old = server.first_pid();
        server.signal_first(rustix::process::Signal::HUP);
        eventually("the next one is there", || server.processes().len() == 2);
        let new = server.processes().into_iter().find(|pid| *pid != old).unwrap();
        // Although its task keeps the ended stream until the last connection closes.
        let sockets = |pid| support::fds(pid).into_values().filter(|fd| fd.starts_with("socket:")).collect::<Vec<_>>();
        eventually("the old one has closed the listener", || {
            let of_new = sockets(new);
            !of_new.is_empty() && sockets(old).iter().all(|socket| !of_new.contains(socket))
        });
        echoes(&mut *open);
        echoes(&mut *connect("127.0.0.1:8080").unwrap());
        drop(open);
        support::wait_exit(old);
        support::send_signal(new, rustix::process::Signal::USR1);
        server.wait_all_ended();
    });
}
