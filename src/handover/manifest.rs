//! The manifest: a small text that describes what is handed over. This file uses no descriptors.
//!
//! ```text
//! ecdysis 1
//! generation 4
//! app shop
//! mounts 28:8:1:2
//! fd 7 48211 tcp 127.0.0.1:8080
//! fd 8 48213 unix /run/app.sock file=2049:1311
//! fd 9 48217 tcp 0.0.0.0:80 unit=http
//! end
//! ```
//!
//! An `fd` line contains the descriptor's number (over a socket: its index among those sent), its inode, the kind, the
//! percent-escaped name, and attributes. A reader ignores lines, kinds and attributes that it does not know, and closes
//! the descriptors of unknown kinds. Later versions may add to all three, but must not change existing ones.

use std::io;
use std::os::fd::RawFd;

use rustix::path::DecInt;

use super::entry::{Entry, FdRef};
use super::escape::{escape, unescape, unescape_text};
use crate::key::{Key, Kind};

/// How a process identifies itself when it hands over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The number of its generation. The first is 1.
    pub(crate) generation: u64,
    /// The name of the application, if the program has set one.
    pub(crate) app: Option<String>,
    /// Identifies the mount and the inode of its root. If both are the same, a path leads to the same file.
    pub(crate) mounts: Option<String>,
}

/// The decoded manifest of a parent.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) origin: Origin,
    pub(crate) entries: Vec<Entry<RawFd>>,
    /// Descriptors of a kind that this version does not know. They must be closed.
    pub(crate) unknown: Vec<FdRef>,
    /// The nonce that the variable contains on systems where pipes and sockets have no inodes.
    pub(crate) nonce: Option<u64>,
}

/// Limits that no valid manifest exceeds.
pub(crate) const MAX_SIZE: usize = 16 << 20;
const MAX_LINE: usize = 4096;
pub(crate) const MAX_ENTRIES: usize = 1 << 16;

const FIRST_LINE: &str = "ecdysis 1";

/// Encodes these entries, each with the number of its descriptor.
pub(crate) fn encode<'a, F: 'a>(
    origin: &Origin,
    nonce: Option<u64>,
    entries: impl Iterator<Item = (RawFd, &'a Entry<F>)>,
) -> String {
    // A service may have thousands of listeners, so this neither formats nor allocates for each.
    let mut text = String::with_capacity(64 * (entries.size_hint().0 + 4));
    let mut put = |before: &str, value: &[u8]| {
        text.push_str(before);
        escape(value, &mut text);
    };
    put(FIRST_LINE, b"");
    if let Some(nonce) = nonce {
        put("\nnonce ", DecInt::new(nonce).as_bytes());
    }
    put("\ngeneration ", DecInt::new(origin.generation).as_bytes());
    for (before, value) in [("\napp ", &origin.app), ("\nmounts ", &origin.mounts)] {
        value.iter().for_each(|value| put(before, value.as_bytes()));
    }
    for (fd, Entry { key, inode, file, unit, .. }) in entries {
        put("\nfd ", DecInt::new(fd).as_bytes());
        put(" ", DecInt::new(*inode).as_bytes());
        put(" ", key.kind().word().as_bytes());
        put(" ", key.raw_name());
        if let Some(name) = key.label() {
            put(" name=", name.as_bytes());
        }
        if let Some((device, inode)) = file {
            put(" file=", DecInt::new(*device).as_bytes());
            put(":", DecInt::new(*inode).as_bytes());
        }
        if let Some(unit) = unit {
            put(" unit=", unit.as_bytes());
        }
    }
    put("\nend\n", b"");
    text
}

impl Manifest {
    /// Decodes a complete manifest. It may name a descriptor twice, but only one can be taken.
    pub(crate) fn decode(text: &[u8]) -> io::Result<Self> {
        let text = std::str::from_utf8(text).map_err(|_| malformed(0, "not UTF-8"))?;
        let text = text.strip_suffix("\nend\n").ok_or_else(|| malformed(0, "no end"))?;
        let mut lines = (1..).zip(text.split('\n'));
        if lines.next() != Some((1, FIRST_LINE)) {
            return Err(malformed(1, "unknown manifest version"));
        }
        let mut manifest = Self::default();
        manifest.entries.reserve(text.bytes().filter(|byte| *byte == b'\n').count().min(MAX_ENTRIES));
        for (at, line) in lines {
            if line.len() > MAX_LINE {
                return Err(malformed(at, "too long"));
            }
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let read = match word {
                "generation" => number(rest).map(|generation| manifest.origin.generation = generation),
                "app" => unescape_text(rest).map(|app| manifest.origin.app = Some(app)),
                "mounts" => unescape_text(rest).map(|mounts| manifest.origin.mounts = Some(mounts)),
                "nonce" => number(rest).map(|nonce| manifest.nonce = Some(nonce)),
                "fd" if manifest.entries.len() + manifest.unknown.len() == MAX_ENTRIES => None,
                "fd" => manifest.add(rest),
                "end" if rest.is_empty() => None,
                _ => Some(()),
            };
            read.ok_or_else(|| malformed(at, word))?;
        }
        if manifest.origin.generation == 0 {
            return Err(malformed(0, "no generation"));
        }
        Ok(manifest)
    }

    /// Adds the descriptor of a line. `None` if the line is malformed.
    fn add(&mut self, line: &str) -> Option<()> {
        let mut words = line.split(' ');
        let (fd, inode) = (number(words.next()?)?, number(words.next()?)?);
        let (kind, name) = (words.next()?, unescape(words.next()?)?);
        let Some(kind) = Kind::from_word(kind) else {
            self.unknown.push(FdRef { fd, inode });
            return Some(());
        };
        let mut entry = Entry { key: Key::from_parts(kind, name), fd, inode, file: None, unit: None };
        for attribute in words {
            match attribute.split_once('=') {
                Some(("file", value)) => {
                    let (device, inode) = value.split_once(':')?;
                    entry.file = Some((number(device)?, number(inode)?));
                }
                Some(("name", name)) => entry.key = entry.key.named(unescape_text(name)?),
                Some(("unit", name)) => entry.unit = Some(unescape_text(name)?),
                _ => {}
            }
        }
        self.entries.push(entry);
        Some(())
    }

    /// Returns whether the text is a manifest of any version, as opposed to an answer such as `busy`.
    pub(crate) fn is_meant(text: &[u8]) -> bool {
        text.starts_with(b"ecdysis ")
    }
}

/// Parses digits only; `parse` alone also accepts a plus sign.
fn number<T: std::str::FromStr>(word: &str) -> Option<T> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
}

/// Line 0 is the manifest as a whole.
fn malformed(line: usize, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed manifest, line {line}: {what}"))
}
