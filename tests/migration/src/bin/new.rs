#![allow(clippy::unnecessary_to_owned)] // 1.1.1 takes a String
extern crate new as ecdysis;
include!("../program.rs");
