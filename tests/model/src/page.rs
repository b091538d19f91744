//! The generated part of a page of the guide.

use std::fs;
use std::path::PathBuf;

use crate::table::table;

const BEGIN: &str = "<!-- from here on written by `cargo run -- page` in tests/model -->\n";
const END: &str = "<!-- to here -->\n";

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../src/guide/who-serves.md")
}

fn split(page: &str) -> (&str, &str, &str) {
    let begin = page.find(BEGIN).expect("the page has the start mark") + BEGIN.len();
    let end = page.find(END).expect("the page has the end mark");
    (&page[..begin], &page[begin..end], &page[end..])
}

pub fn write() {
    let page = fs::read_to_string(path()).expect("the page can be read");
    let (before, _, after) = split(&page);
    fs::write(path(), format!("{before}\n{}\n{after}", table())).expect("the page can be written");
}

/// Returns the generated part as it is in the page, and as it should be.
pub fn committed_and_current() -> (String, String) {
    let page = fs::read_to_string(path()).expect("the page can be read");
    (split(&page).1.trim().to_owned(), table().trim().to_owned())
}
