//! See `ecdysis::fuzzing::frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::frames(data));
