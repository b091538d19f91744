//! The server that README shows: an open connection survives an upgrade, and the old process ends when the connection
//! does.

use std::process::Command;

use crate::support::{connect, example, send_signal, tempdir, wait_exit, Conn, Server};
use rustix::process::Signal;

fn echoes(connection: &mut dyn Conn, text: &[u8]) {
    connection.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    connection.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

#[test]
fn an_open_connection_outlives_the_upgrade() {
    let mut command = Command::new(example("echo"));
    let directory = tempdir(); // for its PID file
    command.arg("127.0.0.1:0").current_dir(directory.path());
    let mut server = Server::start(command);
    // pid 815: generation 1 serves 127.0.0.1:4711
    let serves = server.wait("generation 1 serves ");
    let address = serves.rsplit(' ').next().unwrap();

    let mut open = connect(address).unwrap();
    echoes(&mut *open, b"before");
    send_signal(server.first_pid(), Signal::HUP);
    let serves = server.wait("generation 2 serves ");
    assert!(serves.ends_with(address), "{serves}");
    echoes(&mut *open, b"after");
    echoes(&mut *connect(address).unwrap(), b"new");

    drop(open);
    server.wait("; 0 connections cut");
    wait_exit(server.first_pid());
    let second = serves.strip_prefix("pid ").and_then(|rest| rest.split(':').next()).unwrap();
    send_signal(second.parse().unwrap(), Signal::TERM);
    server.wait_all_ended();
}

#[test]
fn readme_shows_it() {
    let (readme, echo) = (include_str!("../../README.md"), include_str!("../../examples/echo.rs"));
    let server = &echo[echo.find("fn serve").unwrap()..echo.find("\nfn main").unwrap()];
    assert!(readme.contains(server), "README and examples/echo.rs differ");
    assert!(server.lines().count() <= 15);
}
