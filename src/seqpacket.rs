//! Unix seqpacket sockets, which preserve record boundaries. std has no type for them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::io::retry_on_intr;
use rustix::net::{connect, send, AddressFamily, SocketType};

use crate::listen::unix_address;
use crate::sys::{net, Mode};

/// A Unix socket that listens for seqpacket connections.
///
/// Create it with [`Sockets::listen_unix_seqpacket`](crate::Sockets::listen_unix_seqpacket). It is nonblocking, like every
/// listener of this library: accept through [`Shutdown::accept`](crate::Shutdown::accept) or
/// [`Shutdown::incoming`](crate::Shutdown::incoming).
#[derive(Debug)]
pub struct UnixSeqpacketListener(OwnedFd);

impl UnixSeqpacketListener {
    /// Accepts one connection, which is blocking even though the listener is not.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if the queue is empty, and those of
    /// [accept(2)](https://man7.org/linux/man-pages/man2/accept.2.html).
    pub fn accept(&self) -> io::Result<UnixSeqpacketConn> {
        Ok(UnixSeqpacketConn(retry_on_intr(|| net::accept(&self.0, Mode::Blocking))?))
    }
}

/// One seqpacket connection. Each call of `send` on one end is one call of `recv` on the other.
#[derive(Debug)]
pub struct UnixSeqpacketConn(OwnedFd);

impl UnixSeqpacketConn {
    /// Connects to the socket file `path`, or to the abstract name in a path that begins with `@`.
    ///
    /// # Errors
    ///
    /// Those of [connect(2)](https://man7.org/linux/man-pages/man2/connect.2.html): `NotFound` without such a file,
    /// `ConnectionRefused` if no process listens, EPROTOTYPE if the socket is of another type.
    ///
    /// ```no_run
    /// let connection = ecdysis::UnixSeqpacketConn::connect("/run/app/records")?;
    /// connection.send(b"one record")?;
    /// let mut buffer = [0; 4096];
    /// let length = connection.recv(&mut buffer)?;
    /// println!("{:?}", &buffer[..length]);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let fd = net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, Mode::Blocking)?;
        let address = unix_address(path.as_ref())?;
        retry_on_intr(|| connect(&fd, &address))?;
        Ok(UnixSeqpacketConn(fd))
    }

    /// Returns two connected ends.
    ///
    /// # Errors
    ///
    /// Those of [socketpair(2)](https://man7.org/linux/man-pages/man2/socketpair.2.html).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (left, right) = net::socketpair(SocketType::SEQPACKET, Mode::Blocking)?;
        Ok((UnixSeqpacketConn(left), UnixSeqpacketConn(right)))
    }

    /// Sends `record` as a whole. A closed peer is an error (EPIPE), not a signal.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an empty record, which the other end could not distinguish from the end of the connection;
    /// EMSGSIZE for one that is larger than the send buffer; and those of
    /// [send(2)](https://man7.org/linux/man-pages/man2/send.2.html).
    pub fn send(&self, record: &[u8]) -> io::Result<()> {
        if record.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an empty record looks like the end of the connection",
            ));
        }
        // A record is sent whole or not at all, so the length needs no check.
        retry_on_intr(|| send(&self.0, record, net::NOSIGNAL))?;
        Ok(())
    }

    /// Receives one record into `buffer` and returns its length; 0 is the end of the connection.
    ///
    /// # Errors
    ///
    /// `InvalidData` for a record that is longer than `buffer`: it is lost, and the next call returns the next one.
    /// Otherwise those of [recv(2)](https://man7.org/linux/man-pages/man2/recv.2.html).
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = buffer.len();
        let length = retry_on_intr(|| net::receive_record(&self.0, &mut buffer[..]))?;
        if length > size {
            let reason = format!("a record longer than the buffer of {size} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(length)
    }

    /// Makes `send` and `recv` return `WouldBlock` instead of blocking, or block again.
    ///
    /// # Errors
    ///
    /// Those of [ioctl(2)](https://man7.org/linux/man-pages/man2/ioctl.2.html).
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.0, nonblocking)?)
    }
}

macro_rules! is_a_descriptor {
    ($($name:ident),*) => {$(
        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
        }
        impl AsRawFd for $name {
            fn as_raw_fd(&self) -> RawFd {
                self.0.as_raw_fd()
            }
        }
        impl From<OwnedFd> for $name {
            fn from(fd: OwnedFd) -> Self {
                $name(fd)
            }
        }
        impl From<$name> for OwnedFd {
            fn from(socket: $name) -> Self {
                socket.0
            }
        }
    )*};
}
is_a_descriptor!(UnixSeqpacketListener, UnixSeqpacketConn);

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{bind, listen};

    fn listener(path: &Path) -> UnixSeqpacketListener {
        let fd = net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, Mode::Nonblocking).unwrap();
        bind(&fd, &unix_address(path).unwrap()).unwrap();
        listen(&fd, 10).unwrap();
        fd.into()
    }

    #[test]
    fn records_keep_their_bounds() {
        let (left, right) = UnixSeqpacketConn::pair().unwrap();
        left.send(b"one").unwrap();
        left.send(b"three").unwrap();
        let mut buffer = [0; 100];
        assert_eq!(right.recv(&mut buffer).unwrap(), 3);
        assert_eq!(&buffer[..3], b"one");
        assert_eq!(right.recv(&mut buffer).unwrap(), 5);
        assert_eq!(&buffer[..5], b"three");
        drop(left);
        assert_eq!(right.recv(&mut buffer).unwrap(), 0);
        assert_eq!(right.send(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_record_too_long_is_an_error_and_the_next_one_is_whole() {
        let (left, right) = UnixSeqpacketConn::pair().unwrap();
        left.send(&[1; 50]).unwrap();
        left.send(&[2; 10]).unwrap();
        let mut buffer = [0; 10];
        let error = right.recv(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(error.to_string(), "a record longer than the buffer of 10 bytes");
        assert_eq!(right.recv(&mut buffer).unwrap(), 10);
        assert_eq!(buffer, [2; 10]);
    }

    #[test]
    fn an_empty_record_is_refused() {
        let (left, _right) = UnixSeqpacketConn::pair().unwrap();
        assert_eq!(left.send(b"").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn an_accepted_connection_blocks_though_the_listener_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records");
        let listener = listener(&path);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let client = UnixSeqpacketConn::connect(&path).unwrap();
        let server = listener.accept().unwrap();
        assert!(!rustix::fs::fcntl_getfl(&server).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
        client.send(b"hello").unwrap();
        let mut buffer = [0; 10];
        assert_eq!(server.recv(&mut buffer).unwrap(), 5);
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn nobody_listens() {
        let error = UnixSeqpacketConn::connect("/nonexistent/socket").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
