//! The server in README: an echo server with threads and one listener, upgraded without losing a connection.
//!
//!     cargo run --example echo                # writes its PID to ./echo.pid; takes an address as its argument
//!     nc 127.0.0.1 7000                       # in a second terminal: the server sends back what you type
//!     kill -HUP $(cat echo.pid)               # in a third: the upgrade
//!
//! The open `nc` stays connected to the old process, which exits when `nc` does. A new `nc` reaches the new process.

use std::io::{self, Write};
use std::{env, error::Error, net::SocketAddr, process, thread, time::Duration};

use ecdysis::Ecdysis;
use libc::{SIGHUP, SIGTERM};

fn serve(address: SocketAddr) -> Result<String, Box<dyn Error>> {
    let starting = Ecdysis::builder().upgrade_on_signal(SIGHUP).stop_on_signal(SIGTERM).pid_file("echo.pid").start()?;
    let listener = starting.listen_tcp(address)?; // the first generation binds it, later ones inherit it
    let server = starting.ready()?; // from here on this process accepts, and the previous one does not
    say(format!("generation {} serves {}", server.generation(), listener.local_addr()?));
    let (shutdown, accepting) = (server.shutdown(), server.shutdown());
    thread::spawn(move || {
        for stream in accepting.incoming(&listener).flatten() {
            let guard = accepting.guard(); // `drain` waits until this is dropped
            thread::spawn(move || io::copy(&mut &stream, &mut &stream).map(|_| drop(guard)));
        }
    });
    let exit = server.run()?; // returns once a successor serves, or at a stop
    Ok(format!("{exit}; {} connections cut", shutdown.drain(Duration::from_secs(60))))
}

fn main() -> Result<(), Box<dyn Error>> {
    let address = env::args().nth(1).unwrap_or("127.0.0.1:7000".into());
    if address == "--help" {
        return Ok(io::stdout().write_all(include_bytes!("echo.rs"))?); // the top of this file explains the usage
    }
    say(serve(address.parse()?)?);
    Ok(())
}

/// Unlike `eprintln`, this does not panic if the terminal is gone.
fn say(text: String) {
    let _ = writeln!(io::stderr(), "pid {}: {text}", process::id());
}
