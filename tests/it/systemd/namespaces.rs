//! A server in a PID namespace below the manager's, where its PIDs mean other processes.

use super::bed::{text, under_systemd, Machine};
use crate::support::{ask, field, Load};

fn version(machine: &Machine) -> u32 {
    machine.version.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap()
}

/// A shell is process 1, like an init in a container, and the manager accepts messages from every process.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn main_pid_stays_what_it_is_outside() {
    under_systemd("namespaces::main_pid_stays_what_it_is_outside", |machine| {
        let control = "/run/whoami-execreload/control";
        let settings = format!(
            "NotifyAccess=all\nExecStart=\nExecStart=/usr/bin/unshare --pid --fork --kill-child --mount-proc sh -c \
             'trap \"exit 0\" TERM; /usr/local/bin/whoami --systemd --listen 127.0.0.1:8002 --control-socket {control} & \
             wait; while :; do sleep 1; done'\nExecStop=/usr/local/bin/ctl {control} stop"
        );
        let service = machine.service("notify-execreload", &settings);
        service.start();
        let pid = service.main_pid();
        let load = Load::on("127.0.0.1:8002", 1);
        for generation in 2..=4 {
            service.succeed("reload");
            assert_eq!(field::<u64>(&ask("127.0.0.1:8002").unwrap(), "gen"), generation);
            assert_eq!(service.main_pid(), pid);
        }
        load.stop().assert_none_failed();
        service.succeed("stop");
        assert_eq!(service.get("Result"), "success");
        assert_eq!(machine.complaints(), Vec::<String>::new());
    });
}

/// With `PrivatePIDs=` the main process is process 1 of a namespace, and its end kills all other processes. So it
/// refuses to upgrade, but a server under `hold` upgrades.
#[test]
#[ignore = "needs root, cgroup2, overlayfs and apt"]
fn private_pids() {
    under_systemd("namespaces::private_pids", |machine| {
        if version(&machine) < 257 {
            return println!("skipped: PrivatePIDs= came with systemd 257");
        }
        let service = machine.service("notify-reload", "PrivatePIDs=yes");
        service.start();
        let pid = service.main_pid();
        service.succeed("reload");
        let failed = service.log.expect("upgrade failed");
        assert!(failed.contains("this is process 1"), "{failed}");
        assert_eq!((service.main_pid(), service.get("ActiveState").as_str()), (pid, "active"));
        service.succeed("stop");

        machine.install("hold");
        let settings = "PrivatePIDs=yes\nExecStart=\nExecStart=/usr/local/bin/hold -- /usr/local/bin/whoami --systemd \
                        --listen 127.0.0.1:8003";
        let text_of_unit = std::fs::read_to_string(machine.units.join("notify-reload.service")).unwrap();
        machine.unit("held.service", &text_of_unit);
        let service = machine.service("held", settings);
        service.start();
        let pid = service.main_pid();
        let load = Load::on("127.0.0.1:8003", 1);
        for generation in 2..=4 {
            let output = service.try_to("reload");
            assert!(output.status.success(), "{}", text(&output));
            assert_eq!(field::<u64>(&ask("127.0.0.1:8003").unwrap(), "gen"), generation);
            assert_eq!(service.main_pid(), pid);
        }
        load.stop().assert_none_failed();
        service.succeed("stop");
        // systemd 257 may see the main process before it becomes its child. Then it does not wait for it at a stop.
        if machine.complaints().is_empty() {
            assert_eq!(service.get("Result"), "success");
        }
    });
}
