//! Percent-encoding: any bytes as one printable word without spaces.

/// Appends `bytes` to `out`; everything but printable ASCII, and the percent sign, is escaped.
pub(crate) fn escape(bytes: &[u8], out: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &byte in bytes {
        if byte.is_ascii_graphic() && byte != b'%' {
            out.push(byte as char);
        } else {
            out.push('%');
            out.push(HEX[(byte >> 4) as usize] as char);
            out.push(HEX[(byte & 15) as usize] as char);
        }
    }
}

/// Decodes `word`. `None` if a percent sign is not followed by two hexadecimal digits.
pub(crate) fn unescape(word: &str) -> Option<Vec<u8>> {
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
    Some(bytes)
}
