//! A pool of std threads that speaks HTTP/1.0 and HTTP/1.1 with keep-alive: no framework, no runtime.
//!
//!     cargo run -p ecdysis-pool -- 127.0.0.1:8000     # in examples/frameworks
//!     curl http://127.0.0.1:8000/                     # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711
//!
//! Each thread accepts one connection and serves it to its end, so there are at most as many connections as threads.

use ecdysis::{Ecdysis, Shutdown};
use say::say;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const THREADS: usize = 64;

/// How long a connection may be idle, before and after the upgrade.
const IDLE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(2);

/// How long requests may run after the upgrade.
const DRAIN: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    say::help(include_str!("main.rs"));
    let addr = std::env::args().nth(1).unwrap_or("127.0.0.1:8000".into());
    let starting = Ecdysis::builder()
        .upgrade_on_signal(libc::SIGHUP)
        .stop_on_signal(libc::SIGTERM)
        .stop_on_signal(libc::SIGINT)
        .start()?;
    let listener = Arc::new(starting.listen_tcp(addr.parse()?)?);
    let who: Arc<str> = format!("gen={} pid={}", starting.generation(), std::process::id()).into();
    say(format!("listening {} {who}", listener.local_addr()?));

    let shutdown = starting.shutdown();
    for _ in 0..THREADS {
        let (listener, shutdown, who) = (listener.clone(), shutdown.clone(), who.clone());
        thread::spawn(move || {
            for stream in shutdown.incoming(&*listener).flatten() {
                let _guard = shutdown.guard();
                let _ = connection(stream, &shutdown, &who);
            }
        });
    }
    drop(listener); // only the threads keep it, until they end
    let server = starting.ready()?;
    say(format!("serving {who}"));
    let exit = server.run()?;
    let left = shutdown.drain(DRAIN);
    say(format!("ended {who} left={} {exit}", left > 0));
    Ok(())
}

fn connection(stream: TcpStream, shutdown: &Shutdown, who: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream);
    while shutdown.next_request(&mut requests, IDLE, GRACE)? {
        let Some(keep) = head(&mut requests)? else { return Ok(()) };
        let last = !keep || shutdown.is_over();
        let word = if last { "close" } else { "keep-alive" };
        let length = who.len() + 1;
        let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\nConnection: {word}\r\n\r\n{who}\n");
        requests.get_mut().write_all(answer.as_bytes())?;
        if last {
            break;
        }
    }
    Ok(())
}

/// Reads the head of a request without a body. Returns whether to keep the connection, or `None` at its end.
fn head(requests: &mut BufReader<TcpStream>) -> io::Result<Option<bool>> {
    let (mut line, mut keep) = (String::new(), false);
    let mut head = requests.take(16 << 10);
    while head.read_line(&mut line)? > 0 {
        match line.trim_end().to_ascii_lowercase().as_str() {
            "" => return Ok(Some(keep)),
            "connection: close" => keep = false,
            "connection: keep-alive" => keep = true,
            other => keep |= other.ends_with(" http/1.1"),
        }
        line.clear();
    }
    Ok(None)
}
