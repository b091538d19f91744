//! See `ecdysis::fuzzing::round_trip`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ecdysis::fuzzing::round_trip(data));
