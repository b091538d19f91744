//! The same in a container: `hold` is its PID 1, and its image consists of two static binaries.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{is_there, supervise_at, Supervisor};
use crate::support::{generation, output, tempdir, Load, Server};

const RUNC: Supervisor = Supervisor {
    name: "a container (runc)",
    tools: &["runc"],
    // It uses the host's network, so that the clients can reach it.
    start: r#"mkdir -p bundle/rootfs/proc bundle/rootfs/run && cp $PROGRAMS/hold $PROGRAMS/whoami bundle/rootfs/
            args=$(for word in $HOLD; do printf '"%s",' "$word"; done)
            cat >bundle/config.json <<END
{"ociVersion":"1.0.2","root":{"path":"rootfs","readonly":true},
 "process":{"user":{"uid":0,"gid":0},"cwd":"/","noNewPrivileges":true,"args":[${args%,}],
   "env":["ECDYSIS_TEST=$ECDYSIS_TEST","ECDYSIS_TEST_SERVICE=$ECDYSIS_TEST_SERVICE"]},
 "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
   {"destination":"/run","type":"bind","source":"$PWD","options":["bind","ro"]}],
 "linux":{"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"}]}}
END
            exec runc --root state run --bundle bundle ecdysis-test-$$"#,
    pid: "runc --root state state $(runc --root state list -q) | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'",
    upgrade: "runc --root state kill $(runc --root state list -q) HUP",
    stop: "runc --root state kill $(runc --root state list -q) TERM",
    ended: "echo $CODE",
    expected: "0",
    leave: "",
};

/// Writes the script `p`, which runs podman with all of its files in this directory, and creates the image.
macro_rules! podman {
    ($options:literal) => {
        concat!(
            r#"chmod 755 . && mkdir root && cp $PROGRAMS/hold $PROGRAMS/whoami root/
            printf '#!/bin/sh\nexec podman --root %s/store --runroot %s/run --tmpdir %s/tmp --storage-driver vfs \
              --cgroup-manager cgroupfs --events-backend file --runtime "$(command -v runc)" "$@"\n' $PWD $PWD $PWD >p
            chmod +x p && tar -C root -c . | ./p import -q - ecdysis-test >/dev/null 2>&1
            exec ./p run --rm --name test --network host --read-only --ulimit nofile=20000:20000 \
              --ulimit nproc=10000:10000 -v $PWD:/run:ro -e ECDYSIS_TEST -e ECDYSIS_TEST_SERVICE "#,
            $options,
            " localhost/ecdysis-test $HOLD"
        )
    };
}

/// With podman's default seccomp profile, which is Docker's, and a read-only root.
const PODMAN: Supervisor = Supervisor {
    name: "a container (podman, its seccomp profile, read-only)",
    tools: &["podman", "runc"],
    start: podman!(""),
    pid: "pid=$(./p inspect test --format '{{.State.Pid}}') && grep -q 'Seccomp:.2' /proc/$pid/status && echo $pid",
    upgrade: "./p kill -s HUP test",
    stop: "./p stop -t 100 test",
    ended: "echo $CODE",
    expected: "0",
    leave: "",
};

/// Root inside the container is an unprivileged user outside.
const PODMAN_USERS: Supervisor = Supervisor {
    name: "a container (podman, user namespace)",
    start: podman!("--uidmap 0:100000:65536 --gidmap 0:100000:65536"),
    pid: "pid=$(./p inspect test --format '{{.State.Pid}}') && grep -q 'Uid:.100000' /proc/$pid/status && echo $pid",
    ..PODMAN
};

/// Builds the two programs as static binaries. Returns their paths.
fn build_static() -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    // With an explicit target, the flags do not apply to programs that run at build time.
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let directory = project.join("target/static");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "build",
        "--quiet",
        "--features",
        "systemd",
        "--example",
        "hold",
        "--example",
        "whoami",
        "--target",
        &target,
    ]);
    cargo.arg("--target-dir").arg(&directory).current_dir(project);
    cargo.env("RUSTFLAGS", "-Ctarget-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
    assert!(cargo.status().unwrap().success(), "the static programs do not build");
    directory.join(target).join("debug/examples")
}

fn contained(supervisor: &Supervisor) {
    if let Some(missing) = supervisor.tools.iter().find(|tool| !is_there(tool)) {
        return println!("skipped: {}: needs {missing}; see tests/it/supervisors/install", supervisor.name);
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: {}: needs root", supervisor.name);
    }
    supervise_at(supervisor, &build_static(), ["/hold", "/whoami", "/run"]);
}

#[test]
#[ignore = "needs root and a supervisor"]
fn in_a_container() {
    contained(&RUNC);
}

#[test]
#[ignore = "needs root and a supervisor"]
fn in_a_container_of_podman() {
    contained(&PODMAN);
}

#[test]
#[ignore = "needs root and a supervisor"]
fn in_a_user_namespace_of_podman() {
    contained(&PODMAN_USERS);
}

/// Each version is a container whose process 1 is the server. The takeover socket is on a shared volume.
#[test]
#[ignore = "needs root and a supervisor"]
fn containers_take_over_from_each_other() {
    if !is_there("podman") || !is_there("runc") || !rustix::process::geteuid().is_root() {
        return println!("skipped: a takeover between containers: needs root, podman and runc");
    }
    let (programs, dir) = (build_static(), tempdir());
    let container = |number: usize| {
        let start = podman!("-v $PWD/share:/share").replace("--name test", &format!("--name test-{number}"));
        // The directory and the image are created only once.
        let start =
            if number == 1 { format!("mkdir share; {start}") } else { start[start.find("exec ./p").unwrap()..].into() };
        let whoami =
            "/whoami --listen 127.0.0.1:0 --probation 50 --take-over /share/socket --takeover-socket /share/socket";
        let mut command = Command::new("sh");
        command.args(["-c", &start]).env("HOLD", whoami).env("PROGRAMS", &programs).env("ECDYSIS_TEST_SERVICE", "");
        Server::serving({
            command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
            command
        })
    };
    let mut old = container(1);
    let addr = old.addr();
    // Process 1 cannot be upgraded inside its container, and keeps serving.
    let hangup = output(Command::new("./p").args(["kill", "-s", "HUP", "test-1"]).current_dir(dir.path()));
    assert!(hangup.status.success(), "{hangup:?}");
    let failed = old.wait("upgrade failed");
    assert!(failed.contains("this is process 1"), "{failed}");
    let load = Load::on(&addr, 2);
    for number in 2..=4 {
        let new = container(number);
        old.wait("upgrade ok");
        old.wait_all_ended();
        assert_eq!(generation(&addr), number as u64);
        old = new;
    }
    let counts = load.stop();
    counts.assert_none_failed();
    println!("| takeovers between containers (podman) | {}, 0 failed |", counts.requests);
    let stopped = output(Command::new("./p").args(["stop", "-t", "100", "test-4"]).current_dir(dir.path()));
    assert!(stopped.status.success(), "{stopped:?}");
    old.wait_all_ended();
}
