//! The environment variable that tells a child where its handover is.
//!
//! `v1:manifest=5@48211,status=7@48212`: two pipes by descriptor number and inode. The inode is the proof that the
//! variable means this process: in a grandchild that merely inherited the variable it names nothing.

use std::os::fd::RawFd;

/// The variable's name: part of the contract between versions.
pub(crate) const VARIABLE: &str = "ECDYSIS_HANDOVER";

/// One descriptor, by number and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) fd: RawFd,
    pub(crate) inode: u64,
}

/// The two pipes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pipes {
    pub(crate) manifest: Named,
    pub(crate) status: Named,
}

impl Pipes {
    pub(crate) fn value(&self) -> String {
        let Self { manifest, status } = self;
        format!("v1:manifest={}@{},status={}@{}", manifest.fd, manifest.inode, status.fd, status.inode)
    }

    /// `None` for what is not a value of ours, or names no two pipes.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let (mut manifest, mut status) = (None, None);
        for part in value.strip_prefix("v1:")?.split(',') {
            let (name, place) = part.split_once('=')?;
            // What a later version adds is skipped.
            let slot = match name {
                "manifest" => &mut manifest,
                "status" => &mut status,
                _ => continue,
            };
            let (fd, inode) = place.split_once('@')?;
            *slot = Some(Named { fd: fd.parse().ok().filter(|fd| *fd > 2)?, inode: inode.parse().ok()? });
        }
        Some(Self { manifest: manifest?, status: status? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_the_contract() {
        let pipes = Pipes { manifest: Named { fd: 5, inode: 48211 }, status: Named { fd: 7, inode: 48212 } };
        assert_eq!(pipes.value(), "v1:manifest=5@48211,status=7@48212");
        assert_eq!(Pipes::parse(&pipes.value()), Some(pipes));
    }

    #[test]
    fn later_versions_may_add_and_nonsense_is_nothing() {
        assert!(Pipes::parse("v1:color=blue,manifest=5@1,status=7@2").is_some());
        for nonsense in
            ["", "yes", "v1:", "v2:manifest=5@1,status=7@2", "v1:manifest=1@1,status=7@2", "v1:manifest=5,status=7@2"]
        {
            assert_eq!(Pipes::parse(nonsense), None, "{nonsense:?}");
        }
    }
}
