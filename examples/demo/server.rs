//! The server that is upgraded, and the lines with which it reports events to the demo. `demo --serve` runs it.

use ecdysis::{Accept, Connection, Ecdysis, Event, Readable, Shutdown, Socket};
use std::io::{self, BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::time::Duration;
use std::{error::Error, process, thread};

use crate::load::now;
use crate::request::Use;
use crate::Options;

/// The number of threads that accept (or receive) and answer. Enough, because the requests are short.
const THREADS: usize = 4;

/// How long a client may be silent.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long an idle connection stays open after the upgrade.
pub const GRACE: Duration = Duration::from_secs(2);

pub fn serve(options: &Options) -> Result<(), Box<dyn Error>> {
    let began = now();
    let starting = Ecdysis::builder()
        .upgrade_on_signal(libc::SIGHUP)
        .stop_on_signal(libc::SIGTERM)
        .ready_timeout(options.timeout)
        .probation(options.probation())
        .on_event(tell)
        .start()?;
    let (gen, pid) = (starting.generation(), process::id());
    let (shutdown, answer) = (starting.shutdown(), format!("gen={gen} pid={pid}"));
    let kept = options.connections;
    let address = if let Some(path) = options.listen.strip_prefix("unix:") {
        let listener = starting.listen_unix(path)?;
        threads(&shutdown, &answer, move |shutdown, answer| accept(&listener, shutdown, answer, kept));
        options.listen.clone()
    } else if let Some(address) = options.listen.strip_prefix("udp:") {
        let socket = starting.build_socket_udp(address.parse()?, |socket: Socket, address| {
            socket.bind(address)?;
            Ok(socket.into())
        })?;
        let address = socket.local_addr()?;
        threads(&shutdown, &answer, move |shutdown, answer| datagrams(&socket, shutdown, answer));
        format!("udp:{address}")
    } else {
        let listener = starting.listen_tcp(options.listen.parse()?)?;
        let address = listener.local_addr()?;
        threads(&shutdown, &answer, move |shutdown, answer| accept(&listener, shutdown, answer, kept));
        address.to_string()
    };
    let ready = now();
    let ecdysis = starting.ready()?;
    say(format!("listening {address} gen={gen} pid={pid} began={began} ready={ready}"));

    // The demo holds the other end of stdin, so every generation ends when the demo ends for any reason.
    let stop = ecdysis.clone();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        stop.stop();
    });
    let exit = ecdysis.run()?;
    let left = shutdown.drain(options.timeout);
    say(format!("ended gen={gen} pid={pid} left={left} at={} {exit}", now()));
    Ok(())
}

fn threads(shutdown: &Shutdown, answer: &str, serve: impl Fn(&Shutdown, &str) + Send + Sync + 'static) {
    let serve = std::sync::Arc::new(serve);
    for _ in 0..THREADS {
        let (serve, shutdown, answer) = (serve.clone(), shutdown.clone(), answer.to_string());
        thread::spawn(move || serve(&shutdown, &answer));
    }
}

fn accept<L>(listener: &L, shutdown: &Shutdown, answer: &str, kept: Use)
where
    L: Accept<Stream: Connection + Write + Send + 'static>,
{
    for stream in shutdown.incoming(listener).flatten() {
        if kept == Use::Once {
            let _ = reply(stream, shutdown, answer);
            continue;
        }
        let (shutdown, guard, answer) = (shutdown.clone(), shutdown.guard(), answer.to_owned());
        thread::spawn(move || {
            let _ = replies(stream, &shutdown, &answer, kept);
            drop(guard);
        });
    }
}

fn reply(stream: impl Connection + Write, shutdown: &Shutdown, answer: &str) -> io::Result<()> {
    if shutdown.readable(&stream, Some(PATIENCE))? == Readable::TimedOut {
        return Ok(());
    }
    let mut stream = BufReader::with_capacity(64, stream);
    stream.read_until(b'\n', &mut Vec::with_capacity(64))?;
    stream.get_mut().write_all(format!("{answer}\n").as_bytes())
}

/// Answers requests until one side ends the connection. The server announces the end in an answer, or closes the connection
/// if it is idle after the upgrade.
fn replies(stream: impl Connection + Write, shutdown: &Shutdown, answer: &str, kept: Use) -> io::Result<()> {
    let mut requests = BufReader::with_capacity(256, stream);
    while shutdown.next_request(&mut requests, PATIENCE, GRACE)? {
        let mut line = String::new();
        while requests.read_line(&mut line)? > 0 && kept == Use::Http && line != "\r\n" {
            line.clear();
        }
        let last = line.is_empty() || shutdown.is_over();
        requests.get_mut().write_all(text(answer, kept, last).as_bytes())?;
        if last {
            break;
        }
    }
    Ok(())
}

/// Returns an answer, which says whether it is the last one on its connection.
pub fn text(answer: &str, kept: Use, last: bool) -> String {
    match (kept, last) {
        (Use::Once, _) | (Use::KeepAlive, false) => format!("{answer}\n"),
        (Use::KeepAlive, true) => format!("{answer} last\n"),
        (Use::Http, _) => {
            let (length, connection) = (answer.len() + 1, if last { "close" } else { "keep-alive" });
            format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{answer}\n")
        }
    }
}

fn datagrams(socket: &UdpSocket, shutdown: &Shutdown, answer: &str) {
    let _guard = shutdown.guard(); // so that the drain waits for the answer to the last datagram
    let mut datagram = [0; 2048];
    while let Some(received) = shutdown.recv_from(socket, &mut datagram) {
        let Ok((length, peer)) = received else {
            continue;
        };
        let _ = socket.send_to(&[answer.as_bytes(), b" ", &datagram[..length]].concat(), peer);
    }
}

pub fn tell(event: &Event) {
    match event {
        Event::Committed(new) => say(format!("committed pid={} gen={} at={}", new.pid, new.generation, now())),
        Event::Upgraded(new) => say(format!("upgrade ok pid={} gen={}", new.pid, new.generation)),
        Event::UpgradeFailed { error, .. } => {
            let (mut line, mut next) = (format!("upgrade failed: {error}"), error.source());
            while let Some(error) = next {
                line += &format!(": {error}");
                next = error.source();
            }
            say(line);
        }
        _ => {}
    }
}

/// Writes each line with one call, because several generations share stderr.
pub fn say(line: String) {
    let _ = io::stderr().write_all((line + "\n").as_bytes());
}
