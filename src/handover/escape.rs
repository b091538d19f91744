//! Percent-encoding: any bytes as one printable word without spaces.

use std::borrow::Cow;
use std::fmt::Write;

/// Appends `bytes` to `out`. Percent signs, spaces and everything but printable ASCII are escaped.
pub(crate) fn escape(bytes: &[u8], out: &mut String) {
    let is_plain = |byte: &u8| byte.is_ascii_graphic() && *byte != b'%';
    // A fast path: nearly all names need no escape, and there may be thousands of them.
    if let (true, Ok(text)) = (bytes.iter().all(is_plain), std::str::from_utf8(bytes)) {
        return out.push_str(text);
    }
    for byte in bytes {
        if is_plain(byte) {
            out.push(*byte as char);
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

/// Decodes `word`. `None` if a percent sign is not followed by two hexadecimal digits.
pub(crate) fn unescape(word: &str) -> Option<Cow<'_, [u8]>> {
    if !word.contains('%') {
        return Some(word.as_bytes().into());
    }
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || Some((rest.next()? as char).to_digit(16)? as u8);
                (digit()? << 4) | digit()?
            }
            byte => byte,
        });
    }
    Some(bytes.into())
}

/// Returns `text` in the form that [`escape`] appends.
pub(crate) fn escaped(text: &str) -> String {
    let mut word = String::new();
    escape(text.as_bytes(), &mut word);
    word
}

/// Decodes `word`, which must be UTF-8.
pub(crate) fn unescape_text(word: &str) -> Option<String> {
    String::from_utf8(unescape(word)?.into_owned()).ok()
}
