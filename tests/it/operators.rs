//! What operators rely on: PID files, the log, and what the next generation is.

use std::fs::{self, Permissions};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::support::{field, install, tempdir, Server};

fn can(program: &str, args: &[&str]) -> bool {
    let can = Command::new(program).args(args).output().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("not run: this machine does not allow {program} {args:?}");
    }
    can
}

fn names_the_server_through_an_upgrade(mut server: Server, pid_file: &Path) {
    let named = || fs::read_to_string(pid_file).unwrap();
    assert_eq!(named(), format!("{}\n", server.pid()));
    let line = server.upgrade();
    assert_eq!(named(), format!("{}\n", field::<u32>(&line, "pid")));
    server.signal(rustix::process::Signal::TERM);
    server.wait_all_ended();
    assert_eq!(named(), "", "it cannot be removed, and names nobody");
}

const WHOAMI: [&str; 5] = ["--listen", "127.0.0.1:0", "--probation", "20", "--pid-file"];

#[test]
fn a_pid_file_that_is_a_mount_point_is_written_in_place() {
    let dir = tempdir();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::write(&source, "").unwrap();
    fs::write(&target, "").unwrap();
    if !can("unshare", &["--mount", "mount", "--bind", source.to_str().unwrap(), target.to_str().unwrap()]) {
        return;
    }
    install("whoami", dir.path().join("whoami"));
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#, "sh"]);
    command.args([&source, &target, &dir.path().join("whoami")]).args(WHOAMI).arg(&target);
    names_the_server_through_an_upgrade(Server::serving(command), &source);
}

#[test]
fn a_pid_file_in_a_directory_of_root_is_written_in_place() {
    const NOBODY: [&str; 5] = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    if !can("setpriv", &[&NOBODY[..], &["true"]].concat()) {
        return;
    }
    let dir = tempdir();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let pid_file = dir.path().join("pid");
    fs::write(&pid_file, "").unwrap();
    std::os::unix::fs::chown(&pid_file, Some(65534), None).unwrap();
    install("whoami", dir.path().join("whoami"));
    let mut command = Command::new("setpriv");
    command.args(NOBODY).arg(dir.path().join("whoami")).args(WHOAMI).arg(&pid_file);
    names_the_server_through_an_upgrade(Server::serving(command), &pid_file);
}

#[test]
fn what_the_next_generation_runs_is_chosen_at_the_upgrade() {
    let dir = tempdir();
    let (next, other) = (dir.path().join("next"), dir.path().join("other"));
    install("whoami", &other);
    let mut server = Server::whoami([WHOAMI[..4].to_vec(), vec!["--next", next.to_str().unwrap()]].concat());
    let line = server.fail_to_upgrade();
    assert!(line.contains("cannot prepare the upgrade: before_upgrade: No such file"), "{line}");
    fs::write(&next, "exec=/nowhere/whoami\n").unwrap();
    let line = server.fail_to_upgrade();
    assert!(line.contains("cannot run /nowhere/whoami: execve: No such file"), "{line}");
    fs::write(&next, format!("exec={}\nCHOSEN=at the upgrade\n", other.display())).unwrap();
    let pid: u32 = field(&server.upgrade(), "pid");
    assert_eq!(fs::read_link(format!("/proc/{pid}/exe")).unwrap(), other);
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.split(|byte| *byte == 0).any(|variable| variable == b"CHOSEN=at the upgrade"));
}

#[test]
fn a_path_that_names_a_version_is_warned_of() {
    let dir = tempdir();
    let real = dir.path().canonicalize().unwrap().join("app-1.2");
    fs::create_dir(&real).unwrap();
    install("whoami", real.join("whoami"));
    symlink(&real, dir.path().join("current")).unwrap();
    let warned = |program: &Path| {
        let mut command = Command::new(program);
        command.args(&WHOAMI[..4]).arg("--log");
        Server::serving(command).said().iter().any(|line| line.starts_with("log warn") && line.contains("app-1.2"))
    };
    assert!(warned(&real.join("whoami")));
    assert!(!warned(&dir.path().join("current/whoami")));
}

#[test]
fn each_line_of_the_log_names_its_process_and_generation() {
    let mut server = Server::whoami([&WHOAMI[..4], &["--log"]].concat());
    let first = server.pid();
    server.upgrade();
    let second = server.pid();
    let ended = server.wait_any("log info ended");
    assert!(ended.ends_with(&format!(" pid={first} generation=1")), "{ended}");
    let serving = server.wait_any(&format!("log info serving pid={second} generation=2"));
    let logged: Vec<_> = server.said().into_iter().filter(|line| line.starts_with("log ")).collect();
    assert!(logged.contains(&serving));
    for line in logged {
        assert!(line.contains(" pid=") && line.contains(" generation="), "{line}");
    }
}
