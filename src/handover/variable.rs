//! The environment variable that names a child's handover, and lets the child verify that the handover is meant for it.
//!
//! `v1:manifest=5@48211,status=7@48212` names two pipes by descriptor number and inode; `v1:socket=5@48211` names a
//! socket. The inode verifies that the variable is meant for this process: in a grandchild that only inherited the
//! variable, the numbers belong to other files or to none. On systems where pipes and sockets have no inodes, a nonce
//! replaces it, which the manifest repeats in a line `nonce 48211`.

use super::entry::FdRef;

/// The variable's name, which is part of the contract between versions.
pub(crate) const VARIABLE: &str = "ECDYSIS_HANDOVER";

/// The carrier of the messages between a child and its parent: two pipes, or one socket in place of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Carrier {
    /// The descriptor from which the child reads the manifest and later messages.
    pub(crate) reader: FdRef,
    pub(crate) writer: FdRef,
}

/// Whether the value has the form of any version. Then it is a handover, for this process or for another.
pub(crate) fn is_handover(value: &str) -> bool {
    let version = value.strip_prefix('v').and_then(|rest| rest.split_once(':'));
    version.is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Carrier {
    pub(crate) fn is_socket(&self) -> bool {
        self.reader == self.writer
    }

    pub(crate) fn value(&self) -> String {
        let place = |fd: FdRef| format!("{}@{}", fd.fd, fd.inode);
        if self.is_socket() {
            return format!("v1:socket={}", place(self.reader));
        }
        format!("v1:manifest={},status={}", place(self.reader), place(self.writer))
    }

    /// Returns `None` for anything but a value of this version that names two pipes or a socket.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (mut manifest, mut status, mut socket) = (None, None, None);
        for part in value.strip_prefix("v1:")?.split(',') {
            let (name, place) = part.split_once('=')?;
            // Parts that a later version adds are ignored.
            let slot = match name {
                "manifest" => &mut manifest,
                "status" => &mut status,
                "socket" => &mut socket,
                _ => continue,
            };
            let (fd, inode) = place.split_once('@')?;
            *slot = Some(FdRef { fd: fd.parse().ok().filter(|fd| *fd > 2)?, inode: inode.parse().ok()? });
        }
        let (reader, writer) = match socket {
            Some(socket) => (socket, socket),
            None => (manifest?, status?),
        };
        Some(Self { reader, writer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_the_contract() {
        let (reader, writer) = (FdRef { fd: 5, inode: 48211 }, FdRef { fd: 7, inode: 48212 });
        for (carrier, value) in [
            (Carrier { reader, writer }, "v1:manifest=5@48211,status=7@48212"),
            (Carrier { reader, writer: reader }, "v1:socket=5@48211"),
        ] {
            assert_eq!(carrier.value(), value);
            assert_eq!(Carrier::parse(value), Some(carrier));
        }
    }

    #[test]
    fn later_versions_may_add_and_nonsense_is_nothing() {
        assert!(Carrier::parse("v1:color=blue,manifest=5@1,status=7@2").is_some());
        let nonsense = [
            "",
            "yes",
            "v1:",
            "v2:manifest=5@1,status=7@2",
            "v1:manifest=1@1,status=7@2",
            "v1:manifest=5,status=7@2",
            "v1:status=7@2",
            "v1:socket=2@2",
        ];
        for nonsense in nonsense {
            assert_eq!(Carrier::parse(nonsense), None, "{nonsense:?}");
        }
    }
}
