//! See `ecdysis::fuzzing::receive`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::receive(data));
