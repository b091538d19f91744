//! The child's half of a handover from the `ecdysis` crate 1.1.1, so that a migration loses no connection.
//!
//! That version sets `ECDYSIS_RUST_UPGRADE=yes` and names two pipes by number. It writes the list of its sockets into
//! one, in bincode 1 (little endian, fixed sizes), and waits for `OK` in the other. It has no commit and no verdict:
//! the child serves when it has written `OK`, and the parent notices within its polling interval of 500 ms.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::fs::FileType;

use super::ancestors::Ancestors;
use super::entry::Entry;
use super::manifest::Origin;
use super::receive::Inherited;
use crate::error::Error;
use crate::key::{Key, Kind};
use crate::sys::adopt::{check, Adopter};
use crate::sys::poll::{wait_readable, Deadline};
use crate::sys::program::{is_secure, SECURE};

/// Its environment variables. They are meant for one child and must not be inherited by others.
pub(crate) const VARIABLES: [&str; 3] = [UPGRADE, LIST_PIPE, READY_PIPE];
const UPGRADE: &str = "ECDYSIS_RUST_UPGRADE";
const LIST_PIPE: &str = "ECDYSIS_RUST_PIPE_FDS";
const READY_PIPE: &str = "ECDYSIS_RUST_PIPE_READY";

/// How long the list may take to arrive. The parent gives up after 5 seconds.
const LIST: Duration = Duration::from_secs(5);

/// The message that the upgrade has succeeded.
pub(crate) const READY: &str = "OK";

/// Returns the sockets of a parent of version 1.1.1, and the pipe for [`READY`]. `None` if no such parent started this
/// process.
pub(crate) fn inherit() -> Result<Option<Inherited>, Error> {
    let number = |variable| env::var(variable).ok().and_then(|value| value.parse::<RawFd>().ok());
    if env::var_os(UPGRADE).is_none_or(|value| value != "yes") {
        return Ok(None);
    }
    let failed = |source| Error::Handover { what: "list of version 1.1.1", source };
    let (Some(list), Some(ready)) = (number(LIST_PIPE), number(READY_PIPE)) else {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "its pipe variables are invalid")));
    };
    // Version 1.1.1 provides no way to verify its numbers. A process that merely inherited the variables has no such
    // pipes.
    if [list, ready].iter().all(|fd| check(*fd, Some(FileType::Fifo), None).is_err()) {
        return Ok(None);
    }
    if is_secure() {
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, SECURE)));
    }
    let Some(mut adopter) = Adopter::take() else { return Ok(None) };
    let list = adopter.adopt(list, Some(FileType::Fifo), None).map_err(failed)?;
    let ready = adopter.adopt(ready, Some(FileType::Fifo), None).map_err(failed)?;
    let list = File::from(list);
    let sockets = decode(&read(&list).map_err(failed)?)
        .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidData, "malformed")))?;
    let entry = |(fd, key): (RawFd, Key)| {
        let adopted = adopter.adopt(fd, Some(FileType::Socket), None).and_then(|fd| Entry::new(key.clone(), fd));
        adopted.map_err(|source| Error::Socket { key, source })
    };
    let entries = sockets.into_iter().map(entry).collect::<Result<_, _>>()?;
    // That version does not count its generations.
    let origin = Origin { generation: 1, ..Origin::default() };
    let ancestors = Ancestors { of_1_1_1: Some(ready), ..Ancestors::default() };
    Ok(Some(Inherited { origin, is_takeover: false, entries, ancestors }))
}

/// Reads everything up to the end of the pipe.
fn read(mut pipe: &File) -> io::Result<Vec<u8>> {
    let (deadline, mut list) = (Deadline::after(LIST), Vec::new());
    while wait_readable(pipe, deadline) {
        let mut chunk = [0; 4096];
        match pipe.read(&mut chunk)? {
            0 => return Ok(list),
            n => list.extend_from_slice(&chunk[..n]),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Decodes the list into the number and the key of each socket. `None` if the bytes are not exactly such a list.
pub(crate) fn decode(mut list: &[u8]) -> Option<Vec<(RawFd, Key)>> {
    let list = &mut list;
    let count = number::<8>(list).map(u64::from_le_bytes)?;
    let mut sockets = Vec::new();
    for _ in 0..count {
        let fd = number::<4>(list).map(i32::from_le_bytes)?;
        let key = match number::<4>(list).map(u32::from_le_bytes)? {
            0 => Key::unix(OsStr::from_bytes(path(list)?)),
            1 => Key::tcp(address(list)?),
            2 => Key::udp(address(list)?),
            3 => Key::from_parts(Kind::DatagramPair, bytes(list)?),
            4 => Key::unix_seqpacket(OsStr::from_bytes(path(list)?)),
            _ => return None,
        };
        sockets.push((fd, key));
    }
    list.is_empty().then_some(sockets)
}

fn number<const N: usize>(list: &mut &[u8]) -> Option<[u8; N]> {
    let (number, rest) = list.split_first_chunk()?;
    *list = rest;
    Some(*number)
}

fn bytes<'a>(list: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = number::<8>(list).map(u64::from_le_bytes)?;
    let (bytes, rest) = list.split_at_checked(usize::try_from(length).ok()?)?;
    *list = rest;
    Some(bytes)
}

/// Decodes an optional path. A socket without a path cannot be asked for by its address.
fn path<'a>(list: &mut &'a [u8]) -> Option<&'a [u8]> {
    match number::<1>(list)? {
        [0] => Some(b""),
        [1] => bytes(list),
        _ => None,
    }
}

fn address(list: &mut &[u8]) -> Option<SocketAddr> {
    let ip: IpAddr = match number::<4>(list).map(u32::from_le_bytes)? {
        0 => Ipv4Addr::from(number::<4>(list)?).into(),
        1 => Ipv6Addr::from(number::<16>(list)?).into(),
        _ => return None,
    };
    Some((ip, number::<2>(list).map(u16::from_le_bytes)?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two listeners, as 1.1.1 wrote them.
    const LIST: &[u8] = &[
        2, 0, 0, 0, 0, 0, 0, 0, // two sockets
        9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 127, 0, 0, 1, 144, 31, // fd 9, tcp 127.0.0.1:8080
        10, 0, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 0, 0, 0, b'/', b'a', b'/', b'b', // fd 10, unix /a/b
    ];

    #[test]
    fn decodes_what_1_1_1_wrote() {
        let expected = vec![(9, Key::tcp("127.0.0.1:8080".parse().unwrap())), (10, Key::unix("/a/b"))];
        assert_eq!(decode(LIST), Some(expected));
    }

    #[test]
    fn refuses_a_list_that_is_cut_or_followed_by_more() {
        for length in 0..LIST.len() {
            assert_eq!(decode(&LIST[..length]), None, "{length} bytes");
        }
        assert_eq!(decode(&[LIST, b"x"].concat()), None);
        assert_eq!(decode(&[255; 64]), None);
    }
}
