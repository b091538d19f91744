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
    // generation 1 serves 127.0.0.1:4711 as pid 815
    let serves = server.wait("generation 1 serves ");
    let address = serves.split(' ').nth(3).unwrap();

    let mut open = connect(address).unwrap();
    echoes(&mut *open, b"before");
    send_signal(server.first_pid(), Signal::HUP);
    let serves = server.wait("generation 2 serves ");
    assert_eq!(serves.split(' ').nth(3).unwrap(), address);
    echoes(&mut *open, b"after");
    echoes(&mut *connect(address).unwrap(), b"new");

    drop(open);
    let ended = server.wait("generation 1 ends");
    assert!(ended.ends_with("0 connections cut"), "{ended}");
    wait_exit(server.first_pid());
    send_signal(serves.rsplit(' ').next().unwrap().parse().unwrap(), Signal::TERM);
    server.wait_all_ended();
}

#[test]
fn readme_shows_it() {
    let (readme, echo) = (include_str!("../../README.md"), include_str!("../../examples/echo.rs"));
    assert!(readme.contains(&echo[echo.find("use std::io").unwrap()..]), "README and examples/echo.rs differ");
}
