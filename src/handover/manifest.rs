//! The manifest: a small text that describes what is handed over. This file uses no descriptors.
//!
//! ```text
//! ecdysis 1
//! generation 4
//! app shop
//! mounts 4026531841:2049:2
//! fd 7 48211 tcp 127.0.0.1:8080
//! fd 8 48213 unix /run/app.sock file=2049:1311
//! fd 9 48217 tcp 0.0.0.0:80 unit=http
//! end
//! ```
//!
//! An `fd` line contains the descriptor's number (over a socket: its index among those sent), its inode, the kind, the
//! percent-escaped name, and attributes. A reader ignores lines, kinds and attributes that it does not know, and closes
//! the descriptors of unknown kinds. Later versions may add to all three, but must not change existing ones.

use std::fmt;
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
    /// Identifies its mount namespace and root. If both are the same, a path leads to the same file.
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
const LAST_LINE: &str = "end";

/// Encodes these entries, each with the number of its descriptor.
pub(crate) fn encode<'a, F: 'a>(origin: &Origin, entries: impl Iterator<Item = (RawFd, &'a Entry<F>)>) -> String {
    // A service may have thousands of listeners, so this neither formats nor allocates for each.
    let mut text = String::with_capacity(64 * (entries.size_hint().0 + 4));
    let number = |word: &str, number: u64, text: &mut String| {
        text.push_str(word);
        text.push_str(DecInt::new(number).as_str());
    };
    text.push_str(FIRST_LINE);
    number("\ngeneration ", origin.generation, &mut text);
    text.push('\n');
    for (word, value) in [("app", &origin.app), ("mounts", &origin.mounts)] {
        if let Some(value) = value {
            text.push_str(word);
            text.push(' ');
            escape(value.as_bytes(), &mut text);
            text.push('\n');
        }
    }
    for (fd, Entry { key, inode, file, unit, .. }) in entries {
        number("fd ", fd as u64, &mut text);
        number(" ", *inode, &mut text);
        text.push(' ');
        text.push_str(key.kind().word());
        text.push(' ');
        escape(key.raw_name(), &mut text);
        if let Some(name) = key.label() {
            text.push_str(" name=");
            escape(name.as_bytes(), &mut text);
        }
        if let Some((device, inode)) = file {
            number(" file=", *device, &mut text);
            number(":", *inode, &mut text);
        }
        if let Some(unit) = unit {
            text.push_str(" unit=");
            escape(unit.as_bytes(), &mut text);
        }
        text.push('\n');
    }
    text.push_str(LAST_LINE);
    text.push('\n');
    text
}

/// Inserts the nonce, if there is one, into the text of a manifest.
pub(crate) fn with_nonce(mut text: String, nonce: Option<u64>) -> String {
    if let Some(nonce) = nonce {
        text.insert_str(FIRST_LINE.len() + 1, &format!("nonce {nonce}\n"));
    }
    text
}

impl Manifest {
    #[cfg(any(test, fuzzing))]
    pub(crate) fn encode(&self) -> String {
        with_nonce(encode(&self.origin, self.entries.iter().map(|entry| (entry.fd, entry))), self.nonce)
    }

    /// Decodes a complete manifest.
    pub(crate) fn decode(text: &[u8]) -> Result<Self, Malformed> {
        let text = std::str::from_utf8(text).map_err(|_| Malformed::new(0, "not UTF-8"))?;
        let mut lines = text.split('\n').enumerate().map(|(at, line)| (at + 1, line));
        let mut manifest = Self::default();
        manifest.entries.reserve(text.bytes().filter(|byte| *byte == b'\n').count());
        if lines.next() != Some((1, FIRST_LINE)) {
            return Err(Malformed::new(1, "not a manifest of a version known here"));
        }
        for (at, line) in lines.by_ref() {
            if line.len() > MAX_LINE {
                return Err(Malformed::new(at, "too long"));
            }
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "generation" => {
                    manifest.origin.generation = number(rest).ok_or(Malformed::new(at, "generation"))?;
                }
                "app" => manifest.origin.app = Some(unescape_text(rest).ok_or(Malformed::new(at, "application"))?),
                "mounts" => manifest.origin.mounts = Some(unescape_text(rest).ok_or(Malformed::new(at, "mounts"))?),
                "nonce" => manifest.nonce = Some(number(rest).ok_or(Malformed::new(at, "nonce"))?),
                "fd" => {
                    let (fd, entry) = fd_line(rest).ok_or(Malformed::new(at, "descriptor"))?;
                    match entry {
                        Some(entry) => manifest.entries.push(entry),
                        None => manifest.unknown.push(fd),
                    }
                    if manifest.entries.len() + manifest.unknown.len() > MAX_ENTRIES {
                        return Err(Malformed::new(at, "too many descriptors"));
                    }
                }
                LAST_LINE if rest.is_empty() => {
                    let known = manifest.entries.iter().map(|entry| entry.fd);
                    let mut numbers: Vec<_> = known.chain(manifest.unknown.iter().map(|fd| fd.fd)).collect();
                    numbers.sort_unstable();
                    if numbers.windows(2).any(|pair| pair[0] == pair[1]) {
                        return Err(Malformed::new(0, "descriptor named twice"));
                    }
                    return match (lines.next(), lines.next()) {
                        (Some((_, "")), None) if manifest.origin.generation > 0 => Ok(manifest),
                        _ => Err(Malformed::new(at, "end")),
                    };
                }
                _ => {}
            }
        }
        Err(Malformed::new(0, "no end"))
    }

    /// Returns whether the text is a manifest of any version, as opposed to an answer such as `busy`.
    pub(crate) fn is_meant(text: &[u8]) -> bool {
        text.starts_with(b"ecdysis ")
    }
}

/// Returns the descriptor, and the entry if its kind is known. `None` if the line is malformed.
fn fd_line(line: &str) -> Option<(FdRef, Option<Entry<RawFd>>)> {
    let mut words = line.split(' ');
    let (fd, inode) = (number(words.next()?)?, number(words.next()?)?);
    let (kind, name) = (words.next()?, unescape(words.next()?)?);
    let Some(kind) = Kind::from_word(kind) else { return Some((FdRef { fd, inode }, None)) };
    let mut entry = Entry { key: Key::from_parts(kind, name), fd, inode, file: None, unit: None };
    for attribute in words {
        if let Some(value) = attribute.strip_prefix("file=") {
            let (device, inode) = value.split_once(':')?;
            entry.file = Some((number(device)?, number(inode)?));
        }
        if let Some(name) = attribute.strip_prefix("name=") {
            entry.key = entry.key.named(unescape_text(name)?);
        }
        if let Some(name) = attribute.strip_prefix("unit=") {
            entry.unit = Some(unescape_text(name)?);
        }
    }
    Some((entry.fd_ref(), Some(entry)))
}

/// Parses digits only; `parse` alone also accepts a plus sign.
fn number<T: std::str::FromStr>(word: &str) -> Option<T> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
}

/// Why a manifest could not be decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// The line number, or 0 for the manifest as a whole.
    line: usize,
    what: &'static str,
}

impl Malformed {
    pub(crate) fn new(line: usize, what: &'static str) -> Self {
        Self { line, what }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed manifest, line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Malformed {}

impl From<Malformed> for std::io::Error {
    fn from(malformed: Malformed) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, malformed)
    }
}
