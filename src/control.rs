//! The client of a control socket: sends one command and receives one line.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{connect, recv, send, AddressFamily, RecvFlags, SocketType};

use crate::listen::unix_address;
use crate::sys::poll::{send_until, wait_readable, Deadline};
use crate::sys::{net, Mode};

/// The longest answer. `status` lists the sockets, and there may be thousands.
const LONGEST: usize = 16 << 20;

/// Sends `command` to the server whose [control socket](crate::Builder::control_on_socket) is at `path`, and returns its
/// answer, without the end of the line. Blocks for at most `timeout`.
///
/// [`Builder::control_on_socket`](crate::Builder::control_on_socket) lists the commands and their answers. `stop` and
/// `partial-stop` are answered immediately, but this returns only when the server has also closed the connection, which
/// it does when it exits.
///
/// # Errors
///
/// [`NotFound`](ErrorKind::NotFound), [`ConnectionRefused`](ErrorKind::ConnectionRefused) or another error of
/// [connect(2)](https://man7.org/linux/man-pages/man2/connect.2.html) if no server can be reached;
/// [`UnexpectedEof`](ErrorKind::UnexpectedEof) if the server closed the connection without an answer, because it ended
/// or does not trust this user; [`TimedOut`](ErrorKind::TimedOut). After the last two, the server may still carry out
/// the command.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = std::env::temp_dir().join(format!("control-{}", std::process::id()));
/// # std::fs::create_dir(&dir)?;
/// # let socket = dir.join("socket");
/// use std::time::Duration;
/// let server = ecdysis::Ecdysis::builder().control_on_socket(&socket).start()?.ready()?;
/// let run = std::thread::spawn({
///     let server = server.clone();
///     move || server.run()
/// });
/// let answer = ecdysis::control::request(&socket, "status", Duration::from_secs(10))?;
/// assert!(answer.contains("generation=1"), "{answer}");
/// # server.stop();
/// # run.join().unwrap()?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok(())
/// # }
/// ```
pub fn request(path: impl AsRef<Path>, command: &str, timeout: Duration) -> Result<String> {
    let (path, deadline) = (path.as_ref(), Deadline::after(timeout));
    let failed = |what: &str, error: Error| {
        Error::new(error.kind(), format!("cannot {what} control socket {}: {error}", path.display()))
    };
    let socket = reach(path, deadline).map_err(|error| failed("connect to", error))?;
    let line = format!("{command}\n");
    send_until(&socket, deadline, || send(&socket, line.as_bytes(), net::NOSIGNAL))
        .map_err(|e| failed("write to", e.into()))?;
    let stops = matches!(command, "stop" | "partial-stop");
    let answer = receive(&socket, deadline, stops).map_err(|error| failed("read an answer from", error))?;
    Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
}

/// Connects, which blocks while the queue is full.
fn reach(path: &Path, deadline: Deadline) -> Result<OwnedFd> {
    let socket = net::socket(AddressFamily::UNIX, SocketType::STREAM, Mode::Blocking)?;
    let address = unix_address(path)?;
    send_until(&socket, deadline, || connect(&socket, &address))?;
    Ok(socket)
}

/// Reads the answer. If `to_the_end`, also waits for the end of the connection.
fn receive(socket: &OwnedFd, deadline: Deadline, to_the_end: bool) -> Result<Vec<u8>> {
    let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        if !wait_readable(socket, deadline) {
            return Err(ErrorKind::TimedOut.into());
        }
        let length = match recv(socket, &mut chunk, RecvFlags::DONTWAIT) {
            Ok((_, length)) => length,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            // The server ended with unread data, which is an end of the connection too.
            Err(Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        answer.extend_from_slice(&chunk[..length]);
        let complete = answer.ends_with(b"\n");
        // A refusal, such as `busy`, does not end the server.
        let goes_on = to_the_end && answer.starts_with(b"stopping");
        match length {
            0 if complete => return Ok(answer),
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            _ if complete && !goes_on => return Ok(answer),
            _ if answer.len() > LONGEST => return Err(ErrorKind::InvalidData.into()),
            _ => {}
        }
    }
}
