#![allow(clippy::needless_question_mark)] // here the errors are of another type
extern crate old as ecdysis;
include!("../program.rs");
