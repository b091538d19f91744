//! One request to the demo's server or to `whoami`, and the ways in which it can fail. The integration tests use it too.

use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{connect, socket_with, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Where a server listens, in the form of `whoami --listen`.
#[derive(Clone, Debug)]
pub enum Target {
    Tcp(SocketAddr),
    /// A path, or an abstract name after `@`.
    Unix(String),
    Udp(SocketAddr),
}

impl FromStr for Target {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Target, Self::Err> {
        Ok(match text.split_once(':') {
            Some(("unix", path)) => Target::Unix(path.into()),
            Some(("udp", address)) => Target::Udp(address.parse()?),
            _ => Target::Tcp(text.parse()?),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// No process listened.
    Refused,
    Reset,
    /// The connection was closed normally, but before the answer was complete.
    Eof,
    Timeout,
    Other,
    /// The client found no free local port, so the request was never sent. This is not the server's fault.
    NoPort,
}

impl Failure {
    pub fn of(error: &io::Error) -> Failure {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => Failure::Refused,
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Failure::Reset,
            ErrorKind::UnexpectedEof => Failure::Eof,
            // When SO_SNDTIMEO ends a connect, the error is EINPROGRESS on TCP and EAGAIN on a Unix socket.
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Timeout,
            ErrorKind::AddrNotAvailable => Failure::NoPort,
            _ if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => Failure::Timeout,
            _ => Failure::Other,
        }
    }
}

/// The generation and process that answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub generation: u64,
    pub pid: u32,
}

impl Answer {
    fn parse(text: &str) -> io::Result<Answer> {
        let answer = || Some(Answer { generation: field(text, "gen")?, pid: field(text, "pid")? });
        answer().ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("unexpected answer: {text:?}")))
    }
}

/// Returns the value of `name=value` in a line of words.
pub fn field<T: FromStr>(line: &str, name: &str) -> Option<T> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// How a client uses its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A new connection for each request.
    Once,
    /// The connection is kept until an answer says that it is the last one.
    KeepAlive,
    /// The same with HTTP/1.1.
    Http,
}

pub struct Client {
    target: Target,
    timeout: Duration,
    connections: Use,
    kept: Option<BufReader<File>>,
    /// Only for UDP: the socket, and the number of the last datagram.
    udp: Option<(UdpSocket, u64)>,
}

impl Client {
    pub fn new(target: Target, timeout: Duration) -> Client {
        Client { target, timeout, connections: Use::Once, kept: None, udp: None }
    }

    pub fn using(self, connections: Use) -> Client {
        Client { connections, ..self }
    }

    /// Sends one request. No step waits longer than the timeout.
    pub fn ask(&mut self) -> io::Result<Answer> {
        match self.target {
            Target::Udp(address) => self.datagram(address),
            _ if self.connections == Use::Once => self.exchange(),
            _ => {
                let connection = self.kept.take().map_or_else(|| self.connect().map(BufReader::new), Ok)?;
                let (answer, kept) = self.exchange_on(connection)?;
                self.kept = kept;
                Ok(answer)
            }
        }
    }

    fn connect(&self) -> io::Result<File> {
        let address: SocketAddrAny = match &self.target {
            Target::Tcp(address) | Target::Udp(address) => (*address).into(),
            Target::Unix(path) => match path.strip_prefix('@') {
                Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?.into(),
                None => SocketAddrUnix::new(path.as_str())?.into(),
            },
        };
        let socket = socket_with(address.address_family(), SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Linux applies the send timeout to connect, for Unix sockets too.
        set_socket_timeout(&socket, Timeout::Send, Some(self.timeout))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(self.timeout))?;
        connect(&socket, &address)?;
        Ok(File::from(socket))
    }

    /// The client reads to the end, so the *server* closes first. The side that closes first keeps the connection in
    /// TIME_WAIT for a minute. At full speed the client would use up its local ports in a second or two. On the server's side
    /// TIME_WAIT is harmless, because a new connection from the same port may replace the old one. So the client does not
    /// need SO_LINGER, which could hide a reset.
    fn exchange(&self) -> io::Result<Answer> {
        let mut stream = self.connect()?;
        stream.write_all(b"who?\n")?;
        let (mut answer, mut length) = ([0; 64], 0);
        loop {
            match stream.read(&mut answer[length..])? {
                0 if answer[..length].ends_with(b"\n") => break,
                0 if length == answer.len() => {
                    return Err(io::Error::new(ErrorKind::InvalidData, "the answer is too long"))
                }
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => length += n,
            }
        }
        Answer::parse(&String::from_utf8_lossy(&answer[..length]))
    }

    /// Sends a request on a persistent connection. Returns the connection too, unless the answer says that it ends. There is
    /// no retry: a request without an answer has failed.
    fn exchange_on(&self, mut connection: BufReader<File>) -> io::Result<(Answer, Option<BufReader<File>>)> {
        let http = self.connections == Use::Http;
        connection.get_mut().write_all(if http { b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n" } else { b"keep\n" })?;
        let mut line = next_line(&mut connection)?;
        let mut last = line.ends_with(" last");
        if http {
            while !line.is_empty() {
                last |= line.eq_ignore_ascii_case("connection: close");
                line = next_line(&mut connection)?;
            }
            line = next_line(&mut connection)?;
        }
        Ok((Answer::parse(&line)?, (!last).then_some(connection)))
    }

    /// Sends a numbered datagram, so that a late answer to an earlier one is not mistaken for this one's.
    fn datagram(&mut self, address: SocketAddr) -> io::Result<Answer> {
        let (socket, number) = match &mut self.udp {
            Some(udp) => udp,
            none => {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                socket.set_read_timeout(Some(self.timeout))?;
                none.insert((socket, 0))
            }
        };
        *number += 1;
        let (number, deadline) = (number.to_string(), Instant::now() + self.timeout);
        socket.send(number.as_bytes())?;
        let mut datagram = [0; 128];
        loop {
            let length = socket.recv(&mut datagram)?;
            let text = String::from_utf8_lossy(&datagram[..length]);
            if text.ends_with(&format!(" {number}")) {
                return Answer::parse(&text);
            }
            if Instant::now() > deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }
}

fn next_line(connection: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    connection.read_line(&mut line)?;
    let whole = line.strip_suffix('\n').ok_or(ErrorKind::UnexpectedEof)?;
    Ok(whole.trim_end_matches('\r').to_owned())
}
