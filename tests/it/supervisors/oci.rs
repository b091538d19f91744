//! The same in a container: `hold` is its PID 1, and its image consists of two static binaries.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{is_there, supervise_at, Supervisor};

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

#[test]
#[ignore = "needs root and a supervisor"]
fn in_a_container() {
    if !is_there("runc") {
        return println!("skipped: {}: needs runc; see tests/it/supervisors/install", RUNC.name);
    }
    supervise_at(&RUNC, &build_static(), ["/hold", "/whoami", "/run"]);
}
