//! The properties of the decoders for arbitrary bytes, for the fuzz targets and, with their corpus, for the tests.

use std::os::fd::AsFd;

use crate::handover::entry::Entry;
use crate::handover::lines::{FromChild, FromParent, Lines, Read};
use crate::handover::manifest::{self, Manifest, Origin};
use crate::handover::scm::{length, Receiver};
use crate::handover::variable::Carrier;
use crate::key::{Key, Kind};

fn encode(manifest: &Manifest) -> String {
    manifest::encode(&manifest.origin, manifest.nonce, manifest.entries.iter().map(|entry| (entry.fd, entry)))
}

/// Any bytes are either a manifest or an error. A decoded manifest is encoded again in the same form.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::decode(data) else { return };
    assert!(manifest.entries.len() + manifest.unknown.len() <= data.len());
    let known = Manifest { unknown: Vec::new(), ..manifest };
    let text = encode(&known);
    // Escapes make a line longer, so a line that just fitted may not fit again.
    if text.lines().all(|line| line.len() <= 4096) {
        assert_eq!(Manifest::decode(text.as_bytes()).ok(), Some(known));
    }
}

/// Any bytes are split into a finite number of lines, each of which is a known message or garbage.
pub fn frames(data: &[u8]) {
    let Ok(nothing) = std::fs::File::open("/dev/null") else { return };
    let mut lines = Lines::with(data.to_vec());
    let mut taken = 0;
    while let Ok(Read::Line(line)) = lines.next(nothing.as_fd()) {
        taken += line.len() + 1;
        assert!(taken <= data.len());
        let _ = FromParent::parse(&line);
        if let Some(status) = FromChild::parse(&line) {
            // A long reason is cut, and a number loses leading zeros. Encoding the result again changes nothing.
            let again = status.line();
            let status = FromChild::parse(again.trim_end_matches('\n'));
            assert_eq!(status.map(|status| status.line()), Some(again));
        }
    }
}

/// Any value of the variable names two pipes, a socket or nothing.
pub fn variable(data: &[u8]) {
    let Some(carrier) = std::str::from_utf8(data).ok().and_then(Carrier::parse) else { return };
    assert!(carrier.reader.fd.min(carrier.writer.fd) > 2);
    assert_eq!(Carrier::parse(&carrier.value()), Some(carrier));
}

/// Any bytes over a takeover socket are either a complete text or an error within the limits.
pub fn receive(data: &[u8]) {
    use std::io::Write;
    let Ok((mut sender, receiver)) = std::os::unix::net::UnixStream::pair() else { return };
    let mut arrived = Receiver::new(2_000, 3);
    // Use few pieces, because each needs three system calls, which would take nearly all of the fuzzer's time.
    let piece = 1 + data.len() / 32 + usize::from(data.first().copied().unwrap_or(0)) * 16;
    for piece in data.chunks(piece) {
        if sender.write_all(piece).is_err() {
            return;
        }
        match arrived.step(&receiver) {
            Ok(true) => {
                let (text, rest, descriptors) = arrived.into_parts();
                assert!(text.ends_with(b"\nend\n") && descriptors.is_empty());
                assert!(data.starts_with(&[text.as_slice(), rest.as_slice()].concat()));
                return manifest(&text);
            }
            Ok(false) => {}
            Err(_) => return,
        }
    }
    drop(sender);
    assert!(arrived.step(&receiver).is_err(), "the peer has closed");
}

/// Any first line of a control connection is handled.
pub fn command(data: &[u8]) {
    let _ = crate::triggers::control::command(data);
}

/// Any manifest, whatever its names are, is decoded to the same entries, and its end is found.
pub fn round_trip(data: &[u8]) {
    let mut manifest = Manifest {
        origin: Origin {
            generation: 1 + data.len() as u64,
            app: data.first().map(|_| String::from_utf8_lossy(&data[..data.len().min(24)]).into_owned()),
            mounts: data.get(1).map(|byte| byte.to_string()),
        },
        ..Manifest::default()
    };
    for (number, chunk) in data.chunks(24).enumerate() {
        let kind = Kind::ALL[usize::from(chunk[0]) % Kind::ALL.len()].0;
        let inode = chunk.iter().fold(0_u64, |all, byte| all.wrapping_mul(251).wrapping_add(u64::from(*byte)));
        manifest.entries.push(Entry {
            key: match chunk.len() % 5 {
                0 => Key::from_parts(kind, &chunk[1..]).named(String::from_utf8_lossy(chunk)),
                _ => Key::from_parts(kind, &chunk[1..]),
            },
            fd: number as i32,
            inode,
            file: (chunk.len() % 2 == 0).then_some((inode, u64::MAX - inode)),
            unit: (chunk.len() % 3 == 0).then(|| String::from_utf8_lossy(chunk).into_owned()),
        });
    }
    let mut text = encode(&manifest).into_bytes();
    let expected = text.len();
    assert_eq!(Manifest::decode(&text).ok(), Some(manifest));
    text.extend_from_slice(b"commit\n");
    text.extend_from_slice(data);
    assert_eq!(length(&text, 0), Some(expected));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// Replays the corpus without a fuzzer.
    #[test]
    fn the_corpus_holds() {
        type Target = (&'static str, fn(&[u8]));
        let targets: [Target; 6] = [
            ("manifest", manifest),
            ("frames", frames),
            ("variable", variable),
            ("command", command),
            ("round_trip", round_trip),
            ("receive", receive),
        ];
        for (name, target) in targets {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let mut files = 0;
            for file in fs::read_dir(&corpus).unwrap_or_else(|e| panic!("{}: {e}", corpus.display())) {
                target(&fs::read(file.unwrap().path()).unwrap());
                files += 1;
            }
            assert!(files > 0, "nothing in {}", corpus.display());
        }
    }

    /// A manifest of a released version stays valid, so that a new version can read it.
    #[test]
    fn golden_manifests_are_read_for_ever() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for file in fs::read_dir(golden).unwrap() {
            let path = file.unwrap().path();
            let text = fs::read(&path).unwrap();
            let read = Manifest::decode(&text);
            assert_eq!(length(&text, 0), Some(text.len()), "{}", path.display());
            assert!(read.is_ok(), "{}: {read:?}", path.display());
        }
    }

    /// This version sends exactly the bytes of its golden file.
    #[test]
    fn the_manifest_of_this_version_is_golden() {
        let entry = |fd, inode, key, file| Entry { key, fd, inode, file, unit: None };
        let unit = Some("web server".to_owned());
        let manifest = Manifest {
            nonce: None,
            origin: Origin { generation: 4, app: Some("web shop".into()), mounts: Some("28:8:1:2".into()) },
            entries: vec![
                entry(7, 48211, Key::tcp("127.0.0.1:8080".parse().unwrap()), None),
                entry(8, 48212, Key::tcp("[::1]:8080".parse().unwrap()), None),
                entry(9, 48213, Key::udp("0.0.0.0:0".parse().unwrap()), None),
                entry(10, 48214, Key::unix("/run/my app.sock"), Some((2049, 1311))),
                entry(11, 48215, Key::unix("@abstract"), None),
                entry(12, 48216, Key::from_parts(Kind::Fd, *b"100% \xFF\n"), None),
                entry(13, u64::MAX, Key::drain(3), None),
                Entry { unit, ..entry(14, 48217, Key::tcp("0.0.0.0:80".parse().unwrap()), None) },
                entry(15, 48218, Key::unix_seqpacket("/run/records"), Some((2049, 1312))),
                entry(16, 48219, Key::unix_datagram("/run/log"), Some((2049, 1313))),
                entry(17, 48220, Key::from_parts(Kind::DatagramPair, *b"chain"), None),
                entry(18, 48221, Key::stream("upstream"), None),
                entry(19, 48222, Key::bytes("count"), None),
                entry(20, 48223, Key::tcp("127.0.0.1:0".parse().unwrap()).named("admin port"), None),
                entry(21, 48224, Key::late(), None),
                entry(22, 48225, Key::drain_status(3), None),
            ],
            unknown: Vec::new(),
        };
        assert_eq!(encode(&manifest), include_str!("../tests/golden/2.0.0.manifest"));
        assert_eq!(Manifest::decode(encode(&manifest).as_bytes()).ok(), Some(manifest));
    }

    /// Lines, kinds and attributes of a later version are ignored, and the descriptors of unknown kinds are reported.
    #[test]
    fn a_later_version_may_say_more() {
        let later = Manifest::decode(include_bytes!("../tests/golden/later.manifest")).unwrap();
        assert_eq!((later.origin.generation, later.entries.len(), later.unknown.len()), (7, 2, 1));
    }
}
