//! Sends a text and any number of descriptors over a connected Unix stream socket (SCM_RIGHTS, unix(7)), or a text over a
//! pipe, one step at a time.
//!
//! Nothing here blocks. `step` of a [`Sender`] or [`Receiver`] does as much as the socket allows at that moment and
//! returns whether everything is done, so that a stalled peer cannot keep this process from handling its triggers. The
//! caller has the deadline.
//!
//! There is no header. The text ends with the line `end`, and the last byte of that line is sent after the last
//! descriptor, so a receiver that has the whole text has every descriptor. A message with descriptors carries one byte
//! of the text, because the kernel delivers descriptors with the first byte that they were sent with. The rest of the
//! text follows the last descriptor, in pieces as large as the socket accepts.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage,
};

use crate::sys::net::{received, CMSG_CLOEXEC, NOSIGNAL};
use crate::sys::poll::{wait_writable, Deadline};
use crate::sys::signal::without_sigpipe;

/// How long to wait when the kernel accepts no more descriptors. No event reports when it accepts them again.
pub(crate) const CROWDED: Duration = Duration::from_millis(10);

/// The kernel's limit (SCM_MAX_FD) on descriptors in one message.
pub(crate) const DESCRIPTORS_PER_MESSAGE: usize = 253;

const CLOSED: &str = "the other process closed the connection during the handover";

/// The newline before the last line, and the last line.
const END: &[u8] = b"\nend\n";

/// The length of the last line. It is sent only when the socket has room again after everything else, so that every
/// later message fits, most importantly `stop`.
const LAST_LINE: usize = b"end\n".len();

/// The result of a sender's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Everything was sent.
    All,
    /// The socket is full. Step again when it is writable.
    Blocked,
    /// The kernel accepts no more descriptors now (ETOOMANYREFS), because too many descriptors of this user are in
    /// flight in all sockets together. The socket may still be writable, so step again after a pause.
    Crowded,
}

/// The sending end of one handover.
pub(crate) struct Sender<F> {
    text: Vec<u8>,
    text_sent: usize,
    /// Those that are not sent yet.
    descriptors: Vec<F>,
    /// It sends over a pipe, so it has no descriptors.
    pub(super) is_pipe: bool,
}

impl<F: AsFd> Sender<F> {
    /// Prepares to send `text`, which must end with the line `end`, and `descriptors` in this order.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a text without that end, or one too short to have a byte for every message.
    pub(crate) fn new(text: Vec<u8>, descriptors: Vec<F>) -> io::Result<Self> {
        let messages = descriptors.len().div_ceil(DESCRIPTORS_PER_MESSAGE);
        if !text.ends_with(END) || text.len() <= messages {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the text of a handover must end with the line \"end\" and have more bytes than messages",
            ));
        }
        Ok(Sender { text, text_sent: 0, descriptors, is_pipe: false })
    }

    /// Sends as much as `fd` accepts now. It is a nonblocking socket or, without descriptors, a nonblocking pipe.
    ///
    /// # Errors
    ///
    /// The error of sendmsg(2) or write(2): EPIPE, without SIGPIPE, if the peer has closed. After an error nothing more
    /// can be sent.
    pub(crate) fn step(&mut self, fd: impl AsFd) -> io::Result<Sent> {
        while self.text_sent < self.text.len() {
            let batch: Vec<_> = self.descriptors.iter().take(DESCRIPTORS_PER_MESSAGE).map(AsFd::as_fd).collect();
            let unsent = &self.text[self.text_sent..];
            let piece = match unsent.len().checked_sub(LAST_LINE) {
                _ if !batch.is_empty() => &unsent[..1],
                None | Some(0) if !wait_writable(&fd, Deadline::after(Duration::ZERO)) => return Ok(Sent::Blocked),
                None | Some(0) => unsent,
                Some(before_last) => &unsent[..before_last],
            };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !batch.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&batch));
            }
            let sent = match self.is_pipe {
                true => without_sigpipe(|| rustix::io::write(&fd, piece)),
                false => sendmsg(&fd, &[IoSlice::new(piece)], &mut control, NOSIGNAL),
            };
            match sent {
                // The kernel sends the descriptors with the first byte, so if one byte was sent, all of them were.
                Ok(count) => {
                    self.text_sent += count;
                    let batch = batch.len();
                    self.descriptors.drain(..batch);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Sent::Blocked),
                Err(Errno::TOOMANYREFS) => return Ok(Sent::Crowded),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Sent::All)
    }
}

/// The receiving end of one handover. Dropping it closes what it has received.
pub(crate) struct Receiver {
    /// The limits on what it accepts. From a pipe it accepts no descriptors.
    most_bytes: usize,
    most_descriptors: usize,
    text: Vec<u8>,
    /// The length of the text, once its end has been received.
    length: Option<usize>,
    descriptors: Vec<OwnedFd>,
}

impl Receiver {
    pub(crate) fn new(most_bytes: usize, most_descriptors: usize) -> Self {
        Receiver { most_bytes, most_descriptors, text: Vec::new(), length: None, descriptors: Vec::new() }
    }

    /// Receives pending data. Returns true when the handover is complete.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if the peer has closed, `InvalidData` for more than the limits allow, `Other` if the kernel
    /// dropped descriptors, and the error of recvmsg(2). After an error the receiver can only be dropped.
    pub(crate) fn step(&mut self, fd: impl AsFd) -> io::Result<bool> {
        let mut buffer = [0; 16 * 1024];
        while self.length.is_none() {
            let arrived = match self.most_descriptors {
                0 => rustix::io::read(&fd, &mut buffer).map_err(io::Error::from),
                _ => self.receive(fd.as_fd(), &mut buffer),
            };
            let count = match arrived {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, CLOSED)),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            };
            // The last line may arrive in two pieces.
            let looked_at = self.text.len().saturating_sub(END.len());
            self.text.extend_from_slice(&buffer[..count]);
            self.length = length(&self.text, looked_at);
            let (bytes, descriptors) = (self.most_bytes, self.most_descriptors);
            if self.text.len() > bytes || self.descriptors.len() > descriptors {
                let reason = format!("the other process sent more than {bytes} bytes or {descriptors} descriptors");
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
        }
        Ok(true)
    }

    /// Receives one message of a socket: bytes, whose number is returned, and descriptors.
    fn receive(&mut self, socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                for fd in descriptors {
                    self.descriptors.push(received(fd)?);
                }
            }
        }
        // The kernel drops descriptors for which this process has no free number. Only this flag reports it.
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other("the kernel dropped descriptors: is the limit on open files too low here?"));
        }
        Ok(message.bytes)
    }

    /// Returns the text, the bytes after it, and the descriptors in the order in which they were sent, with
    /// close-on-exec.
    pub(crate) fn into_parts(mut self) -> (Vec<u8>, Vec<u8>, Vec<OwnedFd>) {
        let rest = self.text.split_off(self.length.unwrap_or(self.text.len()));
        (self.text, rest, self.descriptors)
    }
}

/// Returns the length of the text at the start of `bytes`. Searches for its end from `from` on.
pub(crate) fn length(bytes: &[u8], from: usize) -> Option<usize> {
    bytes[from..].windows(END.len()).position(|window| window == END).map(|at| from + at + END.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    use rustix::io::{fcntl_getfd, FdFlags};
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    fn receiver() -> Receiver {
        Receiver::new(1 << 20, 2000)
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (left, right) = UnixStream::pair().unwrap();
        left.set_nonblocking(true).unwrap();
        right.set_nonblocking(true).unwrap();
        (left, right)
    }

    fn text(lines: usize) -> Vec<u8> {
        let mut text: Vec<u8> = (0..lines).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
        text.extend_from_slice(b"end\n");
        text
    }

    /// Returns `count` descriptors, and the inodes that distinguish them.
    fn descriptors(count: usize) -> (Vec<OwnedFd>, Vec<u64>) {
        let all: Vec<OwnedFd> = (0..count).map(|_| OwnedFd::from(UnixStream::pair().unwrap().0)).collect();
        let inodes = all.iter().map(inode).collect();
        (all, inodes)
    }

    fn inode(fd: impl AsFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    fn wait_readable(socket: &UnixStream) {
        let deadline = Timespec { tv_sec: 10, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&deadline)).unwrap();
        assert_eq!(ready, 1, "nothing came within 10 s");
    }

    /// Runs both ends alternately, as two event loops would.
    fn transfer<F: AsFd>(mut sender: Sender<F>, mut receiver: Receiver) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let (left, right) = pair();
        loop {
            let sent = sender.step(&left)?;
            let complete = receiver.step(&right)?;
            assert_eq!(complete, sent == Sent::All);
            if complete {
                let (text, rest, descriptors) = receiver.into_parts();
                assert!(rest.is_empty());
                return Ok((text, descriptors));
            }
        }
    }

    /// Sets a limit on open files that leaves room for a test with `count` descriptors and its copies.
    fn room_for(count: u64) {
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        if limit.current.is_some_and(|now| now < count) {
            limit.current = Some(limit.maximum.map_or(count, |maximum| maximum.min(count)));
            rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        }
    }

    #[test]
    fn a_text_alone_arrives() {
        let sender = Sender::new(text(3), Vec::<OwnedFd>::new()).unwrap();
        let (bytes, received) = transfer(sender, receiver()).unwrap();
        assert_eq!(bytes, text(3));
        assert!(received.is_empty());
    }

    #[test]
    fn a_thousand_descriptors_arrive_in_order_and_close_on_exec() {
        room_for(4096);
        let (all, inodes) = descriptors(1000);
        let sender = Sender::new(text(1000), all).unwrap();
        let (bytes, received) = transfer(sender, receiver()).unwrap();
        assert_eq!(bytes, text(1000));
        assert_eq!(received.iter().map(inode).collect::<Vec<_>>(), inodes);
        for fd in &received {
            assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn a_text_larger_than_the_socket_goes_in_steps() {
        let (left, right) = pair();
        let long = text(50_000);
        let (all, inodes) = descriptors(300);
        let mut sender = Sender::new(long.clone(), all).unwrap();
        let mut receiver = receiver();
        assert_eq!(sender.step(&left).unwrap(), Sent::Blocked, "a peer that does not read does not block the sender");
        assert_eq!(sender.step(&left).unwrap(), Sent::Blocked);
        assert!(!receiver.step(&right).unwrap());
        while sender.step(&left).unwrap() != Sent::All {
            assert!(!receiver.step(&right).unwrap());
        }
        assert!(receiver.step(&right).unwrap());
        let (bytes, _, received) = receiver.into_parts();
        assert!(bytes == long);
        assert_eq!(received.iter().map(inode).collect::<Vec<_>>(), inodes);
    }

    #[test]
    fn the_last_byte_comes_after_the_last_descriptor() {
        let (all, _) = descriptors(254);
        // Two messages and a text of five bytes: one byte with each message, and the rest last.
        let sender = Sender::new(b"\nend\n".to_vec(), all).unwrap();
        let (bytes, received) = transfer(sender, receiver()).unwrap();
        assert_eq!(bytes, b"\nend\n");
        assert_eq!(received.len(), 254);
    }

    #[test]
    fn a_text_without_an_end_or_too_short_is_refused() {
        let none = Vec::<OwnedFd>::new;
        for bad in [&b""[..], b"end\n", b"\nend", b"an end\n", b"\nend\nmore\n"] {
            assert!(Sender::new(bad.to_vec(), none()).is_err(), "{bad:?}");
        }
        let one = File::open("/dev/null").unwrap();
        let many: Vec<_> = (0..5 * DESCRIPTORS_PER_MESSAGE).map(|_| one.as_fd()).collect();
        assert!(Sender::new(b"\nend\n".to_vec(), many).is_err());
    }

    #[test]
    fn what_follows_the_text_is_kept_apart() {
        let (mut left, right) = pair();
        left.write_all(b"line\nen").unwrap();
        let mut receiver = receiver();
        assert!(!receiver.step(&right).unwrap());
        left.write_all(b"d\nstop\n").unwrap();
        assert!(receiver.step(&right).unwrap());
        let (text, rest, _) = receiver.into_parts();
        assert_eq!((&text[..], &rest[..]), (&b"line\nend\n"[..], &b"stop\n"[..]));
    }

    #[test]
    fn nothing_yet_is_not_an_error() {
        let (_left, right) = pair();
        assert!(!receiver().step(&right).unwrap());
    }

    #[test]
    fn an_empty_message_of_a_peer_that_leaves_is_an_end() {
        let (left, right) = pair();
        drop(left);
        let error = receiver().step(&right).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_peer_that_dies_midway_leaves_no_descriptor_behind() {
        let (left, right) = pair();
        let (watch, far) = pair();
        let mut sender = Sender::new(text(50_000), vec![far]).unwrap();
        assert_eq!(sender.step(&left).unwrap(), Sent::Blocked);
        drop(sender);
        drop(left);
        let mut receiver = receiver();
        let error = receiver.step(&right).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(receiver.descriptors.len(), 1);
        drop(receiver);
        // The last copy of the other end is closed, so its peer reads EOF.
        wait_readable(&watch);
        assert_eq!(rustix::io::read(&watch, &mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_receiver_that_is_gone_is_an_error_and_no_signal() {
        let (left, right) = pair();
        drop(right);
        let mut sender = Sender::new(text(1), Vec::<OwnedFd>::new()).unwrap();
        let error = sender.step(&left).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn garbage_without_an_end_stops_at_the_limit() {
        let (mut left, right) = pair();
        left.set_nonblocking(true).unwrap();
        let mut receiver = Receiver::new(10_000, 1);
        let error = loop {
            // The peer never stops sending; the receiver stops at its limit.
            let _ = left.write(&[0xff; 3000]);
            match receiver.step(&right) {
                Ok(complete) => assert!(!complete),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(receiver.text.len() <= 10_000 + 16 * 1024);
    }

    #[test]
    fn too_many_descriptors_stop_at_the_limit() {
        let (all, _) = descriptors(300);
        let sender = Sender::new(text(300), all).unwrap();
        let error = transfer(sender, Receiver::new(1 << 20, 299)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("299 descriptors"), "{error}");
    }

    /// For tests that change the limits of their process: runs the test again in a separate process.
    fn in_a_process_of_its_own(name: &str) -> bool {
        if std::env::var_os("ECDYSIS_TEST_ALONE").is_some() {
            return true;
        }
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "--test-threads=1", name]).env("ECDYSIS_TEST_ALONE", "1");
        let output = command.output().unwrap();
        assert!(
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        false
    }

    fn limit_open_files(limit: u64) {
        let limit = rustix::process::Rlimit { current: Some(limit), maximum: Some(limit) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }

    #[test]
    fn a_receiver_out_of_descriptor_numbers_says_so() {
        if !in_a_process_of_its_own("handover::scm::tests::a_receiver_out_of_descriptor_numbers_says_so") {
            return;
        }
        let (all, _) = descriptors(20);
        let (left, right) = pair();
        let mut sender = Sender::new(text(20), all.iter().collect()).unwrap();
        assert_eq!(sender.step(&left).unwrap(), Sent::All);
        limit_open_files(32);
        let error = receiver().step(&right).unwrap_err();
        assert!(error.to_string().contains("dropped descriptors"), "{error}");
    }

    #[test]
    fn too_many_descriptors_in_flight_are_waited_for() {
        if !in_a_process_of_its_own("handover::scm::tests::too_many_descriptors_in_flight_are_waited_for") {
            return;
        }
        // The kernel counts per user, but not for root. Another user might not be allowed to execute this program, so only
        // this thread changes.
        if rustix::process::geteuid().is_root() {
            let user = rustix::process::Uid::from_raw(54_321);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        }
        let (left, right) = pair();
        let (left_2, right_2) = pair();
        let one = File::open("/dev/null").unwrap();
        limit_open_files(100);
        let mut first = Sender::new(text(1), vec![one.as_fd(); 200]).unwrap();
        let mut second = Sender::new(text(1), vec![one.as_fd(); 10]).unwrap();
        // Other tests of the same user may also have descriptors in flight, and the kernel frees those of a closed
        // socket with a delay.
        let until_sent = |sender: &mut Sender<BorrowedFd<'_>>, socket: &UnixStream| {
            let begin = std::time::Instant::now();
            while sender.step(socket).unwrap() == Sent::Crowded {
                assert!(begin.elapsed().as_secs() < 10, "still crowded after 10 s");
                std::thread::yield_now();
            }
        };
        until_sent(&mut first, &left);
        assert_eq!(second.step(&left_2).unwrap(), Sent::Crowded);
        assert_eq!(second.step(&left_2).unwrap(), Sent::Crowded);
        drop((left, right));
        until_sent(&mut second, &left_2);
        let mut receiver = receiver();
        assert!(receiver.step(&right_2).unwrap());
        assert_eq!(receiver.into_parts().2.len(), 10);
    }
}
