//! See `ecdysis::fuzzing::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::manifest(data));
