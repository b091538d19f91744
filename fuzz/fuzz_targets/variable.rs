//! See `ecdysis::fuzzing::variable`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::variable(data));
