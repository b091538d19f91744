//! A server whose next version takes over from it without being its child. In one terminal:
//!
//!     mkdir -m 700 /tmp/takeover
//!     cargo run --example takeover -- --listen 127.0.0.1:7000 --socket /tmp/takeover/socket
//!
//! It prints `serving: generation 1, pid 4711, 0 answers so far`. Send it a few lines with `nc 127.0.0.1 7000`, and leave
//! one connection open. Then run the same command in another terminal:
//!
//!     cargo run --example takeover -- --listen 127.0.0.1:7000 --socket /tmp/takeover/socket
//!
//! It prints `serving: generation 2, pid 4720, 3 answers so far`: it has the listener and the count. The first process prints
//! `handed over to pid 4720`, and ends when its last connection has ended. Ctrl-C ends the second process.
//!
//!     --listen ADDR       the address to listen on
//!     --socket PATH       the takeover socket, the same for every version
//!     --drain SECONDS     how long connections may take to end (30)
//!     --pid-file PATH     a file that is written when this process serves
//!     --linger            after being replaced, wait for SIGTERM before exiting; for supervisors that restart every
//!                         process that exits, see takeover.yaml beside this file

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

/// How long a connection may be idle, before and after the handover.
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

    // The same line in every generation: the first binds, and later ones inherit the listener.
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

    // From here on this version serves. If an error occurs before, the other version keeps serving.
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

/// Answers each line with a line, until the client closes or this generation is over. The last answer announces the end, and
/// an idle connection is closed only after a grace period, so that no line is lost.
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
