//! Output of the examples: a reader that has stopped reading or is gone does not stop a server.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use ecdysis::control::request;
use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};
use rustix::io::Errno;
use rustix::pipe::{pipe_with, PipeFlags};

use crate::support::{example, field, guard, readable, tempdir, wait, wait_exit, DEADLINE};

#[derive(Clone, Copy, Debug)]
enum Reader {
    Gone,
    /// The reader is alive but no longer reads, so the pipe is full.
    Stopped,
}

/// Upgrades and then stops an example whose stdout and stderr are no longer read.
fn upgraded_without(reader: Reader, name: &str) {
    let dir = tempdir();
    let control = dir.path().join("control");
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut command = Command::new(example(name));
    command.arg("127.0.0.1:0").arg(&control).stdin(Stdio::null());
    command.stdout(write.try_clone().unwrap()).stderr(write.try_clone().unwrap());
    let mut child = guard::mark(&mut command, 0).spawn().unwrap();
    drop(command);
    let mut read = BufReader::new(File::from(read));
    let mut line = String::new();
    while !line.starts_with("serving ") {
        line.clear();
        if read.buffer().is_empty() {
            readable(read.get_ref(), "the server starts");
        }
        assert_ne!(read.read_line(&mut line).unwrap(), 0, "{name} does not start");
    }
    let kept = Some((read, write)).filter(|_| matches!(reader, Reader::Stopped));
    if let Some((_, write)) = &kept {
        fill(write);
    }
    let answer = request(&control, "upgrade", DEADLINE).unwrap();
    assert!(answer.starts_with("upgraded "), "{name}, {reader:?}: {answer}");
    assert!(wait(&mut child).success(), "{name}, {reader:?}: the old process");
    let new = field(&answer, "pid");
    assert_eq!(request(&control, "stop", DEADLINE).unwrap(), "stopping", "{name}, {reader:?}");
    wait_exit(new);
}

/// Fills the pipe to the last byte. O_NONBLOCK belongs to the open file description, which the server shares, so it is
/// restored.
fn fill(pipe: &OwnedFd) {
    let flags = fcntl_getfl(pipe).unwrap();
    fcntl_setfl(pipe, flags | OFlags::NONBLOCK).unwrap();
    for chunk in [&[b'x'; 4096][..], b"x"] {
        while rustix::io::write(pipe, chunk).is_ok() {}
        assert_eq!(rustix::io::write(pipe, chunk), Err(Errno::AGAIN));
    }
    fcntl_setfl(pipe, flags).unwrap();
}

#[test]
fn no_server_minds_a_reader_that_is_gone_or_stopped() {
    for name in ["http", "udp"] {
        for reader in [Reader::Gone, Reader::Stopped] {
            upgraded_without(reader, name);
        }
    }
}

/// The exit code of `ctl` is the outcome, even if the text cannot be written.
#[test]
fn ctl_does_not_need_its_output() {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    drop(read);
    let mut ctl = Command::new(example("ctl"));
    ctl.args([Path::new("/nonexistent/socket"), Path::new("status")]).stdout(write.try_clone().unwrap()).stderr(write);
    assert_eq!(ctl.status().unwrap().code(), Some(3));
}
