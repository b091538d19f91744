//! See `ecdysis::fuzzing::command`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::command(data));
