//! The names under which the service manager's store keeps sockets, and the state that a stop has passed. A socket's
//! name contains its key, and the file of a Unix socket, so that at the next start the call that created the socket
//! finds it again.

use std::os::fd::OwnedFd;

use crate::handover::escape::{escape, unescape};
use crate::key::{Key, Kind};
use crate::listen::FileId;

use crate::handover::entry::Entry;
use crate::handover::receive::with_text;
use crate::logging;

const PREFIX: &str = "ecdysis";

/// The prefix of names of descriptors that a stop has passed.
const PASSED: &str = "ecdysis-passed";

/// The descriptors that earlier stops have passed, not joined yet.
#[derive(Default)]
pub(crate) struct Pieces(Vec<(Piece, String, OwnedFd)>);

/// A descriptor that a stop has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Piece {
    /// The time of the stop, in nanoseconds.
    pub(crate) stop: u128,
    /// The position. The first is the text of the manifest.
    pub(crate) index: usize,
    /// See [`Store::keep_passed`](crate::manager::Store::keep_passed).
    pub(crate) early: usize,
}

impl Piece {
    pub(crate) fn name(self) -> String {
        format!("{PASSED} {} {} {}", self.stop, self.index, self.early)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut words = name.strip_prefix(PASSED)?.strip_prefix(' ')?.split(' ');
        let stop = words.next()?.parse().ok()?;
        let mut number = || words.next()?.parse().ok();
        Some(Self { stop, index: number()?, early: number()? })
    }
}

impl Pieces {
    /// Takes a descriptor if its name says that a stop has passed it.
    pub(crate) fn take(&mut self, name: &str, fd: OwnedFd) -> Result<(), OwnedFd> {
        match Piece::parse(name) {
            Some(piece) => {
                self.0.push((piece, name.to_owned(), fd));
                Ok(())
            }
            None => Err(fd),
        }
    }

    /// Returns the entries of the last stop if they are complete, with the number of those that can be taken before
    /// `ready`; and the names of all.
    pub(crate) fn join(mut self) -> (Option<(Vec<Entry>, usize)>, Vec<String>) {
        self.0.sort_by_key(|(piece, ..)| *piece);
        let names = self.0.iter().map(|(_, name, _)| name.clone()).collect();
        let Some(Piece { stop, early, .. }) = self.0.last().map(|(piece, ..)| *piece) else { return (None, names) };
        // A piece that is missing moves the later ones, and then the manifest names other descriptors.
        let last = self.0.into_iter().filter(|(piece, ..)| piece.stop == stop).map(|(.., fd)| fd).collect();
        match with_text(last).map(|arrived| arrived.into_entries()) {
            Ok(Ok(entries)) => return (Some((entries, early)), names),
            Ok(Err(e)) => {
                logging::warn!("the state that the last stop has passed is incomplete and not used: {e}")
            }
            Err(e) => logging::warn!("the state that the last stop has passed cannot be read: {e}"),
        }
        (None, names)
    }
}

/// Returns a name such as `ecdysis tcp 0.0.0.0%3A80`; `None` for a descriptor without an address, or with one that is
/// too long.
pub(crate) fn name(key: &Key, file: Option<FileId>) -> Option<String> {
    if !key.kind().has_address() {
        return None;
    }
    let mut name = format!("{PREFIX} {} ", key.kind().word());
    escape(key.raw_name(), &mut name);
    // The manager separates names with colons.
    let mut name = name.replace(':', "%3A");
    if let Some((device, inode)) = file {
        name.push_str(&format!(" {device} {inode}"));
    }
    (name.len() <= 255).then_some(name)
}

/// Returns the key and the file; `None` for a name that does not have this form.
pub(crate) fn parse(name: &str) -> Option<(Key, Option<FileId>)> {
    let mut words = name.split(' ');
    if words.next()? != PREFIX {
        return None;
    }
    let kind = Kind::from_word(words.next()?).filter(|kind| kind.has_address())?;
    let key = Key::from_parts(kind, unescape(words.next()?)?);
    let file = match (words.next(), words.next(), words.next()) {
        (None, ..) => None,
        (Some(device), Some(inode), None) => Some((device.parse().ok()?, inode.parse().ok()?)),
        _ => return None,
    };
    Some((key, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::blob;
    use crate::handover::manifest::{encode, Origin};
    use std::sync::Arc;

    /// Returns what a stop stores: a text and a descriptor.
    fn pieces(stop: u128) -> Vec<(String, OwnedFd)> {
        let (file, _) = crate::sys::net::pipe().unwrap();
        let entries = [Entry::new(Key::fd("lock"), file).unwrap()];
        let text = encode(&Origin { generation: 1, ..Origin::default() }, None, (0..).zip(&entries));
        let text = blob::seal(text.as_bytes(), 1 << 20).unwrap();
        let [entry] = entries;
        let fds = [text, Arc::into_inner(entry.fd).unwrap()];
        let name = |index| Piece { stop, index, early: 1 }.name();
        fds.into_iter().enumerate().map(|(index, fd)| (name(index), fd)).collect()
    }

    fn join(pieces: Vec<(String, OwnedFd)>) -> (Option<(Vec<Entry>, usize)>, usize) {
        let mut all = Pieces::default();
        for (name, fd) in pieces {
            all.take(&name, fd).unwrap();
        }
        let (kept, names) = all.join();
        (kept, names.len())
    }

    #[test]
    fn what_a_stop_has_passed_is_whole_or_not_used() {
        // In the order of the store, together with leftovers of an earlier stop.
        let mut all: Vec<_> = pieces(9).into_iter().rev().collect();
        all.extend(pieces(8).into_iter().take(1));
        let (kept, names) = join(all);
        let (entries, early) = kept.unwrap();
        assert_eq!((&entries[0].key, entries.len(), early, names), (&Key::fd("lock"), 1, 1, 3));

        for missing in 0..2 {
            let mut all = pieces(9);
            all.remove(missing);
            assert!(matches!(join(all), (None, 1)), "without piece {missing}");
        }
        let (mut all, others) = (pieces(9), pieces(9));
        all[1].1 = others.into_iter().next_back().unwrap().1;
        assert!(matches!(join(all), (None, 2)), "another file");
        // If a later stop is incomplete, the state of an earlier one is out of date and not used.
        let mut all = pieces(8);
        all.push(pieces(9).remove(1));
        assert!(matches!(join(all), (None, 3)));
        assert!(matches!(join(Vec::new()), (None, 0)));
        for other in ["ecdysis-passed", "ecdysis-passed 1 2", "ecdysis-passed 1 2 x", "ecdysis tcp a"] {
            assert!(Piece::parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn names_come_back_as_keys() {
        for (key, file, expected) in [
            (Key::tcp("[::1]:80".parse().unwrap()), None, "ecdysis tcp [%3A%3A1]%3A80"),
            (Key::unix("/run/a b%:c"), Some((26, 1311)), "ecdysis unix /run/a%20b%25%3Ac 26 1311"),
            (Key::unix("@name"), None, "ecdysis unix @name"),
        ] {
            assert_eq!(name(&key, file).as_deref(), Some(expected));
            assert_eq!(parse(expected), Some((key, file)));
        }
        assert_eq!(name(&Key::fd("lock"), None), None);
        assert_eq!(name(&Key::unix("\n".repeat(100)), None), None, "longer than the manager accepts");
        for other in [
            "",
            "http",
            "stored",
            "ecdysis",
            "ecdysis tcp",
            "ecdysis tcp a 1",
            "ecdysis tcp a 1 2 3",
            "ecdysis fd lock",
        ] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }
}
