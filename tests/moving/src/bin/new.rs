extern crate new as ecdysis;
include!("../program.rs");
