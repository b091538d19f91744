//! The start of a connection to a control or takeover socket: its first line, and the answer to a takeover request.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::{retry_on_intr, Errno};
use rustix::net::{send, RecvFlags, SendFlags};

use super::escape::{escaped, unescape_text};
use crate::error::Error;
use crate::listen::connect_unix;
use crate::sys::net::NOSIGNAL;
use crate::sys::peer::{peer, PeerCred};
use crate::sys::poll::{wait_readable, Deadline};

/// How long a peer may take to send its first line.
pub(crate) const GREETING_TIME: Duration = Duration::from_secs(5);

/// The longest first line, in bytes. A longer one counts as complete at this length, and is invalid.
const MAX_LINE: usize = 512;

/// A first line, which may arrive in pieces.
#[derive(Debug, Default)]
pub(crate) struct FirstLine(Vec<u8>);

impl FirstLine {
    /// Receives pending data without waiting. Returns whether the line is complete.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if the peer has closed, and the error of recv(2).
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let mut chunk = [0; MAX_LINE];
        match rustix::net::recv(socket, &mut chunk[self.0.len()..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, n)) => self.0.extend_from_slice(&chunk[self.0.len()..][..n]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(self.0.contains(&b'\n') || self.0.len() == MAX_LINE)
    }

    /// Returns everything received, which may be more than the line.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Receives a whole line, or its beginning if the deadline passes or the connection ends.
    pub(crate) fn wait(mut self, socket: impl AsFd, deadline: Deadline) -> Vec<u8> {
        while wait_readable(&socket, deadline) && matches!(self.receive(&socket), Ok(false)) {}
        self.0
    }
}

/// Returns the takeover request: `takeover 1`, and the name of the application if it has one.
fn takeover(app: Option<&str>) -> String {
    let app = app.map(|app| format!(" app={}", escaped(app)));
    format!("takeover 1{}\n", app.unwrap_or_default())
}

/// Returns the name of the application in a takeover request. The outer `None` means anything but exactly one such line.
/// Additions of later versions are ignored.
pub(crate) fn parse_takeover(received: &[u8]) -> Option<Option<String>> {
    let line = std::str::from_utf8(received).ok()?.strip_suffix('\n')?;
    let (mut words, mut app) = (line.split(' '), None);
    if (words.next()?, words.next()?) != ("takeover", "1") {
        return None;
    }
    for word in words {
        if let ("app", name) = word.split_once('=')? {
            app = Some(unescape_text(name)?);
        }
    }
    (!line.contains('\n')).then_some(app)
}

/// Answers a process that does not get the handover, with one line and the line `end`.
pub(crate) fn refuse(socket: impl AsFd, why: &str) {
    let text = format!("{}\nend\n", why.trim_end());
    let _ = send(socket, text.as_bytes(), NOSIGNAL | SendFlags::DONTWAIT);
}

/// Returns the name of the application at the other end, if it differs from ours. An application without a name matches
/// any other.
pub(crate) fn another_app<'a>(ours: Option<&str>, theirs: Option<&'a str>) -> Option<&'a str> {
    theirs.filter(|theirs| ours.is_some_and(|ours| ours != *theirs))
}

/// Connects to the serving process, and requests the handover. `None` if no process listens there.
pub(crate) fn connect(
    path: &Path,
    trust: impl Fn(&PeerCred) -> bool,
    app: Option<&str>,
) -> Result<Option<OwnedFd>, Error> {
    let failed = |source| Error::Connect { path: path.to_owned(), source };
    let Some(socket) = connect_unix(path).map_err(failed)? else { return Ok(None) };
    let peer = peer(&socket).map_err(failed)?;
    if !trust(&peer) {
        return Err(Error::Untrusted { path: path.to_owned(), uid: peer.uid });
    }
    match retry_on_intr(|| send(&socket, takeover(app).as_bytes(), NOSIGNAL)) {
        // If the process has ended in the meantime, the wait for its answer reports that.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(Some(socket)),
        Err(e) => Err(failed(e.into())),
    }
}

/// Whether the other process closed its end before the handover was complete.
pub(crate) fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_line_is_the_contract() {
        for (app, line) in [
            (None, "takeover 1\n"),
            (Some("shop"), "takeover 1 app=shop\n"),
            (Some("my shop%\n"), "takeover 1 app=my%20shop%25%0A\n"),
        ] {
            assert_eq!(takeover(app), line);
            assert_eq!(parse_takeover(line.as_bytes()), Some(app.map(str::to_owned)));
        }
        assert_eq!(parse_takeover(b"takeover 1 color=blue app=shop\n"), Some(Some("shop".into())));
        for other in [
            "",
            "takeover 1",
            "takeover 2\n",
            "takeover 12\n",
            "takeover 1 \n",
            "takeover 1\nready\n",
            "upgrade\n",
            "takeover 1 app\n",
        ] {
            assert_eq!(parse_takeover(other.as_bytes()), None, "{other:?}");
        }
    }

    #[test]
    fn a_first_line_may_come_in_pieces_and_is_bounded() {
        let (mut peer, socket) = UnixStream::pair().unwrap();
        let mut line = FirstLine::default();
        assert!(!line.receive(&socket).unwrap());
        peer.write_all(b"upg").unwrap();
        assert!(!line.receive(&socket).unwrap());
        peer.write_all(b"rade\n").unwrap();
        assert!(line.receive(&socket).unwrap());
        assert_eq!(line.bytes(), b"upgrade\n");

        peer.write_all(&[b'x'; 2 * MAX_LINE]).unwrap();
        assert_eq!(FirstLine::default().wait(&socket, Deadline::after(GREETING_TIME)).len(), MAX_LINE);
        drop(peer);
        assert_eq!(FirstLine::default().wait(&socket, Deadline::NEVER).len(), MAX_LINE);
        assert_eq!(FirstLine::default().receive(&socket).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
