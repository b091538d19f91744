//! The messages between two generations, one per line, from the manifest to the end of the probation.
//!
//! Lines starting with `?` are optional extensions; receivers ignore those they do not know. Any other unknown line is
//! a protocol error.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::io::{retry_on_intr, Errno};

use super::escape::{escaped, unescape};
use crate::sys::signal::without_sigpipe;

/// A message from a child to its parent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FromChild {
    /// The child does not ask for these listeners, which are named by their inodes in the manifest. Sent before
    /// `ready`. A long list takes several lines.
    Dropped(Vec<u64>),
    /// The child can serve, and waits for [`FromParent::Commit`].
    Ready,
    /// The child will not serve, or has stopped accepting because it was given up. Contains the reason.
    Refused(String),
    /// A step between fork and execve failed with this errno.
    Failed { step: String, errno: i32 },
    /// The child serves from here on, because it has received [`FromParent::Commit`], or nothing for too long.
    Serving,
    /// After `serving`: the service was asked to stop, and the child has stopped accepting.
    Stopping,
    /// From any later generation: the receiver must end its drain within this time, because too many generations drain
    /// or the service stops.
    EndDrain(Duration),
}

impl FromChild {
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Dropped(inodes) => {
                format!("dropped {}\n", inodes.iter().map(u64::to_string).collect::<Vec<_>>().join(" "))
            }
            Self::Ready => "ready\n".into(),
            // The reason is for people. If it is too long, its beginning is better than nothing.
            Self::Refused(reason) => format!("refused {}\n", escaped(truncate(reason, MAX_REASON))),
            Self::Failed { step, errno } => format!("failed {step} {errno}\n"),
            Self::Serving => "serving\n".into(),
            Self::Stopping => "stopping\n".into(),
            Self::EndDrain(Duration::ZERO) => "end-drain\n".into(),
            Self::EndDrain(within) => format!("end-drain {}\n", within.as_millis().min(u64::MAX.into())),
        }
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let status = match words.next()? {
            "dropped" => Self::Dropped(words.by_ref().map(|word| word.parse().ok()).collect::<Option<_>>()?),
            "ready" => Self::Ready,
            "refused" => Self::Refused(String::from_utf8_lossy(&unescape(words.next()?)?).into_owned()),
            "failed" => {
                let step = words.next().filter(|step| step.len() <= 32)?.to_owned();
                Self::Failed { step, errno: words.next()?.parse().ok()? }
            }
            "serving" => Self::Serving,
            "stopping" => Self::Stopping,
            "end-drain" => match words.next() {
                None => Self::EndDrain(Duration::ZERO),
                Some(milliseconds) => Self::EndDrain(Duration::from_millis(milliseconds.parse().ok()?)),
            },
            _ => return None,
        };
        words.next().is_none().then_some(status)
    }
}

/// A message from a parent to its child, after the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromParent {
    /// The parent has stopped accepting, and the child may serve.
    Commit,
    /// The parent has given up on the child, which must never accept (again). This is not a stop of the service.
    Stop,
    /// The parent received this request during the probation, and forwards it to the child.
    RequestStop,
    RequestPartialStop,
    RequestUpgrade,
    /// The service manager knows the child as the main process.
    Main,
    /// The probation is over: the parent never accepts again, and the child may upgrade.
    Verdict,
}

impl FromParent {
    const LINES: [(Self, &'static str); 7] = [
        (Self::Commit, "commit\n"),
        (Self::Stop, "stop\n"),
        (Self::RequestStop, "request stop\n"),
        (Self::RequestPartialStop, "request partial-stop\n"),
        (Self::RequestUpgrade, "request upgrade\n"),
        (Self::Main, "main\n"),
        (Self::Verdict, "verdict\n"),
    ];

    pub(crate) fn line(self) -> &'static str {
        Self::LINES[self as usize].1
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        Self::LINES.into_iter().find(|(_, known)| known.trim_end() == line).map(|(message, _)| message)
    }
}

/// How long a process may take to answer `ready` or `commit`, or to end. It does so immediately, unless it is stopped.
pub(crate) const COMMIT: Duration = Duration::from_secs(5);

const MAX_REASON: usize = 1000;

/// The number of inodes that fit into one line, with at most 20 digits each.
pub(crate) const MAX_DROPPED: usize = 150;

/// No valid line is this long; a longer one is a protocol error.
const MAX_LINE: usize = 4096;

fn truncate(text: &str, length: usize) -> &str {
    let mut end = length.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Splits what is read from a nonblocking descriptor into lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
}

/// The next line, or the reason why there is none.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Line(String),
    /// No complete line has arrived yet.
    Wait,
    /// The other side has closed.
    End,
    /// Not UTF-8, or longer than a line may be. Contains the beginning.
    Garbage(String),
}

impl Lines {
    /// Starts with bytes that were already read, after the data that precedes these lines.
    pub(crate) fn with(buffer: Vec<u8>) -> Self {
        Self { buffer }
    }

    /// Returns the next line that is not an optional extension.
    pub(crate) fn next(&mut self, fd: BorrowedFd<'_>) -> io::Result<Read> {
        loop {
            match self.buffered() {
                Some(Read::Line(line)) if line.starts_with('?') => continue,
                Some(next) => return Ok(next),
                None => {}
            }
            let mut chunk = [0; 512];
            match retry_on_intr(|| rustix::io::read(fd, &mut chunk)) {
                Ok(0) if self.buffer.is_empty() => return Ok(Read::End),
                Ok(0) => return Ok(Read::Garbage(preview(&self.buffer))),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(Errno::AGAIN) => return Ok(Read::Wait),
                // The peer of a Unix socket closed it with unread data.
                Err(Errno::CONNRESET) => return Ok(Read::End),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn buffered(&mut self) -> Option<Read> {
        match self.buffer.iter().position(|&byte| byte == b'\n') {
            Some(end) if end <= MAX_LINE => {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                Some(match std::str::from_utf8(&line[..end]) {
                    Ok(line) => Read::Line(line.to_owned()),
                    Err(_) => Read::Garbage(preview(&line)),
                })
            }
            None if self.buffer.len() <= MAX_LINE => None,
            _ => Some(Read::Garbage(preview(&self.buffer))),
        }
    }
}

/// Returns the beginning of the received data, for an error message.
pub(crate) fn preview(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned()
}

/// Writes one line. Every line is shorter than PIPE_BUF, so a pipe accepts it either completely or not at all.
pub(crate) fn send(fd: impl AsFd, line: &str) -> io::Result<()> {
    match without_sigpipe(|| retry_on_intr(|| rustix::io::write(&fd, line.as_bytes())))? {
        written if written == line.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{pipe_with, PipeFlags};

    #[test]
    fn messages_are_read_as_they_were_sent() {
        for status in [
            FromChild::Dropped(vec![u64::MAX; MAX_DROPPED]),
            FromChild::Dropped(vec![1, 48213]),
            FromChild::Ready,
            FromChild::Refused("config: line 3\nis bad %".into()),
            FromChild::Failed { step: "execve".into(), errno: 2 },
            FromChild::Serving,
            FromChild::Stopping,
            FromChild::EndDrain(Duration::ZERO),
            FromChild::EndDrain(Duration::from_millis(2500)),
        ] {
            let line = status.line();
            assert!(line.len() <= MAX_LINE, "{}", line.len());
            assert_eq!(FromChild::parse(line.strip_suffix('\n').unwrap()), Some(status));
        }
        for (message, line) in FromParent::LINES {
            assert_eq!((message.line(), FromParent::parse(line.trim_end())), (line, Some(message)));
        }
        for garbage in ["", "readyish", "ready now", "failed execve", "failed execve x", "refused %4", "dropped x"] {
            assert_eq!(FromChild::parse(garbage), None, "{garbage:?}");
        }
    }

    #[test]
    fn a_long_reason_is_truncated() {
        let line = FromChild::Refused("ä".repeat(5000)).line();
        assert!(line.len() < MAX_LINE, "{}", line.len());
        assert!(matches!(FromChild::parse(line.trim_end()), Some(FromChild::Refused(r)) if r.len() == MAX_REASON));
    }

    #[test]
    fn lines_arrive_in_pieces_and_end() {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut lines = Lines::default();
        assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::Wait);
        send(&writer, "rea").unwrap();
        assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::Wait);
        send(&writer, "dy\n?progress 50\nserving\n").unwrap();
        assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::Line("ready".into()));
        assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::Line("serving".into()));
        drop(writer);
        assert_eq!(lines.next(reader.as_fd()).unwrap(), Read::End);
    }

    #[test]
    fn an_endless_line_is_garbage_and_bounded() {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        send(&writer, &"x".repeat(MAX_LINE + 600)).unwrap();
        let mut lines = Lines::default();
        assert!(matches!(lines.next(reader.as_fd()).unwrap(), Read::Garbage(_)));
        assert!(lines.buffer.len() <= MAX_LINE + 600);
    }
}
