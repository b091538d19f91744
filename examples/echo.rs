//! A complete threaded server that is replaced by its next version without losing a connection.
//!
//!     cargo run --example echo                        # or: echo 127.0.0.1:7001
//!     nc 127.0.0.1 7000                               # in a second terminal: what you type comes back
//!     kill -HUP $(pgrep -n -x echo)                   # in a third: the upgrade
//!
//! The `nc` that was open stays with the old process, which ends when `nc` does. A new `nc` talks to the new one.
//! (A protocol that may close an idle connection ends it at the upgrade with `shutdown.readable(&stream, None)`.)

use ecdysis::Ecdysis;
use std::{env, error::Error, io, net::SocketAddr, thread, time::Duration};

fn main() -> Result<(), Box<dyn Error>> {
    let address: SocketAddr = env::args().nth(1).as_deref().unwrap_or("127.0.0.1:7000").parse()?;

    let starting = Ecdysis::builder()
        .upgrade_on_signal(libc::SIGHUP)
        .stop_on_signal(libc::SIGTERM)
        .stop_on_signal(libc::SIGINT)
        .start()?;
    // The first generation binds here. Every later one is handed the same socket.
    let listener = starting.listen_tcp(address)?;
    // From here on this process serves, and the one before it stops accepting.
    let ecdysis = starting.ready()?;
    eprintln!("generation {} serves {} as pid {}", ecdysis.generation(), listener.local_addr()?, std::process::id());

    let shutdown = ecdysis.shutdown();
    let accepting = shutdown.clone();
    thread::spawn(move || {
        for stream in accepting.incoming(&listener).flatten() {
            let guard = accepting.guard(); // what `drain` waits for
            thread::spawn(move || {
                let _ = io::copy(&mut &stream, &mut &stream);
                drop(guard);
            });
        }
    });

    let exit = ecdysis.run()?; // until a successor serves, or a stop
    let left = shutdown.drain(Duration::from_secs(60));
    eprintln!("generation {} ends: {exit}, {left} connections cut", ecdysis.generation());
    Ok(())
}
