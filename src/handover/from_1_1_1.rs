//! The child's half of a handover from the `ecdysis` crate 1.1.1, so that migrating loses no connection either.
//!
//! That version sets `ECDYSIS_RUST_UPGRADE=yes` and names two pipes by number. It writes the list of its sockets into
//! one, in bincode 1 (little endian, fixed sizes), and waits for `OK` in the other. It has no commit and no verdict:
//! the child serves when it has written `OK`, and the parent notices within its tick of 500 ms.

use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use crate::key::{Key, Kind};

pub(crate) const VARIABLE: &str = "ECDYSIS_RUST_UPGRADE";
pub(crate) const LIST_PIPE: &str = "ECDYSIS_RUST_PIPE_FDS";
pub(crate) const READY_PIPE: &str = "ECDYSIS_RUST_PIPE_READY";

/// The answer that ends such an upgrade well.
pub(crate) const READY: &[u8] = b"OK";

/// Decodes the list: the number and the key of each socket. `None` if it is not such a list from the first byte to
/// the last.
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
            3 => Key::from_parts(Kind::DatagramPair, bytes(list)?.to_vec()),
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

/// An optional path. One without a path cannot be asked for by its address.
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
