extern crate old as ecdysis;
include!("../program.rs");
