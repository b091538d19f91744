//! A UDP server that is upgraded without losing a datagram: the old and the new process share one socket and its queue.
//!
//!     cargo run --example udp                         # or: udp 127.0.0.1:7001 /tmp/udp.control
//!     echo hello | nc -u -w1 127.0.0.1 7000           # in a second terminal: gen=1 hello
//!     kill -HUP 4711                                  # the upgrade, with the PID that the server has printed
//!     echo hello | nc -u -w1 127.0.0.1 7000           # gen=2 hello
//!
//! The second argument is a control socket for `--example ctl`. A protocol without state between datagrams, such as DNS,
//! needs no more than this. QUIC does: a datagram for a connection of the old process must reach that process.

mod support;

use ecdysis::{Ecdysis, Socket};
use std::{env, error::Error, io, net::SocketAddr, thread, time::Duration};
use support::{help, say};

fn main() -> Result<(), Box<dyn Error>> {
    help(include_str!("udp.rs"));
    let mut args = env::args().skip(1);
    let address: SocketAddr = args.next().as_deref().unwrap_or("127.0.0.1:7000").parse()?;
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM).stop_on_signal(libc::SIGINT);
    if let Some(path) = args.next() {
        builder.control_on_socket(path);
    }

    let starting = builder.start()?;
    let bind = |socket: Socket, address| socket.bind(address).map(|()| socket.into());
    let socket = starting.build_socket_udp(address, bind)?;
    let whoami = format!("gen={} pid={}", starting.generation(), std::process::id());
    say(format_args!("listening {} {whoami}", socket.local_addr()?));
    let server = starting.ready()?;
    say(format_args!("serving {whoami}"));

    let shutdown = server.shutdown();
    let receiving = shutdown.clone();
    let guard = shutdown.guard(); // so that `drain` waits for the last answer
    let prefix = format!("gen={} ", server.generation());
    let receiver = thread::spawn(move || -> io::Result<()> {
        let _guard = guard;
        let mut datagram = [0; 65536];
        // Every received datagram is answered, because `None` is returned only between two datagrams.
        while let Some(received) = receiving.recv_from(&socket, &mut datagram) {
            let (length, peer) = received?;
            // An answer may get lost, as on any network, so a full queue does not end the server.
            let _ = socket.send_to(&[prefix.as_bytes(), &datagram[..length]].concat(), peer);
        }
        Ok(())
    });

    let exit = server.run()?;
    shutdown.drain(Duration::from_secs(10));
    say(format_args!("ended {whoami} {exit}"));
    receiver.join().map_err(|_| "the receiving thread panicked")??;
    Ok(())
}
