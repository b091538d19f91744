//! A threaded HTTP/1.1 server whose keep-alive clients do not notice an upgrade, with metrics for Prometheus.
//!
//!     cargo run --example http                        # or: http 127.0.0.1:8001 /tmp/http.control
//!     curl -s http://127.0.0.1:8000/                  # in a second terminal: gen=1 pid=4711
//!     kill -HUP 4711                                  # the upgrade
//!     curl -s http://127.0.0.1:8000/metrics           # …, ecdysis_upgrades_total{outcome="ok"} 1, ecdysis_generation 2, …
//!
//! The second argument is a control socket for `--example ctl`. At an upgrade:
//!
//! - A request that has begun is answered with `Connection: close`, so the client sends its next request to the new process.
//! - An idle connection is closed if no request arrives within `GRACE`.
//! - The old process ends with its last connection, or after `DRAIN`.
//!
//! `httparse` parses the heads. A server crate with its own accept loop would not work, because connections must be accepted
//! through `Shutdown`.

mod metrics;
#[path = "../support/mod.rs"]
mod support;

use ecdysis::{Ecdysis, Shutdown};
use metrics::Metrics;
use std::error::Error;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, process, thread};
use support::{help, say};

/// How long a connection may be idle, and how long a whole request, or each write of a response, may take. (With a limit per
/// read, a client that sends its bytes slowly could keep every old process until the drain's deadline.)
const IDLE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an idle connection stays open after the upgrade.
const GRACE: Duration = Duration::from_secs(2);
const DRAIN: Duration = Duration::from_secs(30);

const MAX_HEAD: usize = 16 << 10;
const MAX_BODY: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    help(include_str!("main.rs"));
    let mut args = env::args().skip(1);
    let address: SocketAddr = args.next().as_deref().unwrap_or("127.0.0.1:8000").parse()?;

    let metrics = Arc::new(Metrics::default());
    let mut builder = Ecdysis::builder();
    builder.upgrade_on_signal(libc::SIGHUP).stop_on_signal(libc::SIGTERM).stop_on_signal(libc::SIGINT);
    builder.on_event(metrics.observer());
    if let Some(path) = args.next() {
        builder.control_on_socket(path);
    }

    let starting = builder.start()?;
    metrics.inherit(&starting)?;
    let listener = starting.listen_tcp(address)?;
    let whoami = format!("gen={} pid={}", starting.generation(), process::id());
    say(format_args!("listening {} {whoami}", listener.local_addr()?));
    let server = starting.ready()?;
    say(format_args!("serving {whoami}"));

    let shutdown = server.shutdown();
    let app = Arc::new(App { shutdown: shutdown.clone(), metrics, whoami });
    thread::spawn({
        let app = app.clone();
        move || {
            for stream in app.shutdown.incoming(&listener).flatten() {
                let (app, guard) = (app.clone(), app.shutdown.guard());
                thread::spawn(move || {
                    // An error here means that the client has gone away.
                    let _ = app.connection(&stream);
                    drop(guard);
                });
            }
        }
    });

    let exit = server.run()?;
    let left = shutdown.drain(DRAIN);
    say(format_args!("ended {} left={left} {exit}", app.whoami));
    Ok(())
}

struct App {
    shutdown: Shutdown,
    metrics: Arc<Metrics>,
    whoami: String,
}

impl App {
    /// Answers requests until one side ends the connection.
    fn connection(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (mut requests, mut received) = (BufReader::new(stream), Vec::new());
        while !received.is_empty() || self.shutdown.next_request(&mut requests, IDLE, GRACE)? {
            let request = Request::read(&mut requests, &mut received)?;
            let (status, text) = match &request {
                Ok(request) => self.answer(request),
                Err(status) => (*status, String::new()),
            };
            let last = self.shutdown.is_over() || !request.as_ref().is_ok_and(|request| request.keep_alive);
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: {}\r\n\r\n",
                text.len(),
                if last { "close" } else { "keep-alive" },
            );
            let body = if request.is_ok_and(|request| request.method == "HEAD") { "" } else { &text };
            (&mut &*stream).write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
            if last {
                break;
            }
        }
        close(&mut requests)
    }

    /// Returns the status and the body.
    fn answer(&self, request: &Request) -> (&'static str, String) {
        self.metrics.count_request();
        match (&*request.method, &*request.path) {
            (_, "/") => ("200 OK", format!("{}\n", self.whoami)),
            ("GET" | "HEAD", "/metrics") => ("200 OK", self.metrics.text(self.shutdown.guarded())),
            (_, "/metrics") => ("405 Method Not Allowed", String::new()),
            _ => ("404 Not Found", "try / or /metrics\n".into()),
        }
    }
}

struct Request {
    method: String,
    path: String,
    keep_alive: bool,
    head: usize,
    body: usize,
}

impl Request {
    /// Removes one request from `received`, and reads until it is complete. Its body is discarded. If this returns a status,
    /// that is the answer, and the connection ends after it.
    fn read(requests: &mut BufReader<&TcpStream>, received: &mut Vec<u8>) -> io::Result<Result<Self, &'static str>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::parse(received) {
                Ok(Some(request)) if received.len() >= request.head + request.body => {
                    received.drain(..request.head + request.body);
                    return Ok(Ok(request));
                }
                Ok(Some(_)) => {}
                Ok(None) if received.len() < MAX_HEAD => {}
                Ok(None) => return Ok(Err("431 Request Header Fields Too Large")),
                Err(status) => return Ok(Err(status)),
            }
            let mut chunk = [0; 8 << 10];
            match read_until(deadline, requests, &mut chunk)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                length => received.extend_from_slice(&chunk[..length]),
            }
        }
    }

    /// Returns `None` if the head is not complete, and the status to answer with if the request cannot be served.
    fn parse(received: &[u8]) -> Result<Option<Self>, &'static str> {
        const BAD: &str = "400 Bad Request";
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(head) = request.parse(received).map_err(|_| BAD)? else { return Ok(None) };

        let values = |name: &'static str| {
            let named = request.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
            named.map(|header| std::str::from_utf8(header.value).unwrap_or("").trim())
        };
        // Reject anything ambiguous about where the request ends: it could smuggle a request past a proxy.
        let mut lengths = values("content-length");
        let body = match (lengths.next(), lengths.next(), values("transfer-encoding").next()) {
            (_, _, Some(_)) => return Err("501 Not Implemented"),
            (None, _, None) => 0,
            (Some(length), None, None) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                length.parse().map_err(|_| BAD)?
            }
            _ => return Err(BAD),
        };
        if body > MAX_BODY {
            return Err("413 Content Too Large");
        }
        let closes = values("connection")
            .flat_map(|value| value.split(','))
            .any(|word| word.trim().eq_ignore_ascii_case("close"));
        Ok(Some(Self {
            method: request.method.unwrap_or_default().into(),
            path: request.path.unwrap_or_default().into(),
            keep_alive: request.version == Some(1) && !closes,
            head,
            body,
        }))
    }
}

/// Reads until the client closes, or for a short time. Closing a socket with unread data resets the connection, and the
/// client could lose the last response.
fn close(requests: &mut BufReader<&TcpStream>) -> io::Result<()> {
    requests.get_ref().shutdown(std::net::Shutdown::Write)?;
    let deadline = Instant::now() + GRACE;
    while read_until(deadline, requests, &mut [0; 8 << 10])? > 0 {}
    Ok(())
}

fn read_until(deadline: Instant, requests: &mut BufReader<&TcpStream>, chunk: &mut [u8]) -> io::Result<usize> {
    if requests.buffer().is_empty() {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        requests.get_ref().set_read_timeout(Some(left.ok_or(ErrorKind::TimedOut)?))?;
    }
    requests.read(chunk)
}
