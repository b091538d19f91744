//! The names under which the service manager's store keeps our sockets. They hold the key and the file of a Unix socket,
//! so that the next start finds each socket by the call that made it.

use crate::handover::escape::{escape, unescape};
use crate::key::{Key, Kind};
use crate::listen::FileId;

const PREFIX: &str = "ecdysis";

/// `ecdysis tcp 0.0.0.0%3A80`; `None` for a descriptor without an address, or with one that is too long for a name.
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

/// The key and the file; `None` for a name that is not of this form.
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
