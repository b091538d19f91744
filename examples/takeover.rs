//! One version of a server takes over from another that it is not a child of. In one terminal:
//!
//!     mkdir -m 700 /tmp/takeover
//!     cargo run --example takeover -- --listen 127.0.0.1:7000 --socket /tmp/takeover/socket
//!
//! It says `serving: generation 1, pid 4711, 0 answers so far`. Ask it a few times with `nc 127.0.0.1 7000`, and leave
//! one of those open. Then, in another terminal, the same command again:
//!
//!     cargo run --example takeover -- --listen 127.0.0.1:7000 --socket /tmp/takeover/socket
//!
//! It says `serving: generation 2, pid 4720, 3 answers so far`: it has the listener and the count. The first one says
//! `handed over to pid 4720`, and ends when its last connection has ended. Ctrl-C ends the second one.
//!
//!     --listen ADDR       what to serve on
//!     --socket PATH       where the running one is found, and the next one will find this
//!     --drain SECONDS     how long connections may take to end (30)
//!     --pid-file PATH     written when this one serves
//!     --linger            once replaced, do not end before SIGTERM: for supervisors that start again whatever ends, see
//!                         takeover.yaml beside this file

mod support;

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use support::{help, say};

use ecdysis::{Ecdysis, ExitMode, Shutdown};

/// How long a connection may be idle, and how long after the handover.
const IDLE: Duration = Duration::from_secs(3600);
const GRACE: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    help(include_str!("takeover.rs"));
    let options = Options::parse()?;
    let mut builder = Ecdysis::builder();
    builder.take_over(&options.socket).takeover_on_socket(&options.socket);
    builder.stop_on_signal(libc::SIGTERM).stop_on_signal(libc::SIGINT);
    if let Some(path) = &options.pid_file {
        builder.pid_file(path);
    }
    let starting = builder.start()?;

    // The same line in every generation: it binds in the first, and takes what was handed over in the others.
    let listener = starting.listen_tcp(options.listen)?;
    let answers = Arc::new(AtomicU64::new(match starting.take_bytes("answers")? {
        Some(bytes) => String::from_utf8(bytes)?.parse()?,
        None => 0,
    }));
    starting.pass_bytes("answers", {
        let answers = answers.clone();
        move || Ok::<_, std::io::Error>(answers.load(Ordering::Relaxed).to_string().into_bytes())
    })?;

    let (generation, shutdown) = (starting.generation(), starting.shutdown());
    thread::spawn({
        let (shutdown, answers) = (shutdown.clone(), answers.clone());
        move || {
            for stream in shutdown.incoming(&listener).flatten() {
                let (guard, shutdown, answers) = (shutdown.guard(), shutdown.clone(), answers.clone());
                thread::spawn(move || {
                    let _guard = guard;
                    let _ = serve(stream, generation, &shutdown, &answers);
                });
            }
        }
    });

    // Until here the other version serves; from here on this one does, or the other one if something goes wrong.
    let server = starting.ready()?;
    let so_far = answers.load(Ordering::Relaxed);
    say(format_args!("serving: generation {generation}, pid {}, {so_far} answers so far", process::id()));

    let exit = server.run()?;
    if let ExitMode::Upgraded(new) = &exit.mode {
        say(format_args!("handed over to pid {}", new.pid));
    }
    let left = shutdown.drain(options.drain);
    if options.linger {
        server.wait_for_stop()?;
    }
    say(format_args!("ended: generation {generation}, pid {}, {left} connections cut", process::id()));
    Ok(())
}

/// A line for a line, until the other end closes or this generation is over. The last answer says so, and an idle
/// connection is closed after a grace, so that no line gets lost.
fn serve(stream: TcpStream, generation: u64, shutdown: &Shutdown, answers: &AtomicU64) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    while shutdown.next_request(&mut stream, IDLE, GRACE)? {
        stream.read_line(&mut String::new())?;
        let last = shutdown.is_over();
        let count = answers.fetch_add(1, Ordering::Relaxed) + 1;
        let word = if last { ", closing" } else { "" };
        let answer = format!("answer {count} from generation {generation}, pid {}{word}\n", process::id());
        stream.get_mut().write_all(answer.as_bytes())?;
        if last {
            break;
        }
    }
    Ok(())
}

struct Options {
    listen: SocketAddr,
    socket: std::path::PathBuf,
    drain: Duration,
    pid_file: Option<std::path::PathBuf>,
    linger: bool,
}

impl Options {
    fn parse() -> Result<Self, Box<dyn Error>> {
        use lexopt::prelude::*;
        let (mut listen, mut socket, mut drain, mut pid_file, mut linger) = (None, None, 30, None, false);
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                Long("listen") => listen = Some(args.value()?.parse()?),
                Long("socket") => socket = Some(args.value()?.into()),
                Long("drain") => drain = args.value()?.parse()?,
                Long("pid-file") => pid_file = Some(args.value()?.into()),
                Long("linger") => linger = true,
                other => return Err(other.unexpected().into()),
            }
        }
        Ok(Self {
            listen: listen.ok_or("--listen is missing")?,
            socket: socket.ok_or("--socket is missing")?,
            drain: Duration::from_secs(drain),
            pid_file,
            linger,
        })
    }
}
