//! The house rules that a program can check: layers, circles, lengths, where `unsafe` may be, what the library never does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The modules from top to bottom. A file may use what is in a lower line, and its own line's.
const LAYERS: &[&[&str]] = &[
    &["lib"],
    &["fuzzing"],
    &["tokio_ecdysis"],
    &["start"],
    &["builder"],
    &["ecdysis"],
    &["service"],
    &["upgrade"],
    &["event_loop"],
    &["generation"],
    &["reporter"],
    &["systemd"],
    &["options", "stop_signal"],
    &["program"],
    &["sockets", "shutdown"],
    &["triggers"],
    &["handover"],
    &["manager", "pid_file"],
    &["event"],
    &["exit"],
    &["map_err"],
    &["error"],
    &["key"],
    &["control", "seqpacket"],
    &["listen"],
    &["sys"],
    &["logging", "started"],
    &["foreign"],
];

/// Imports that point up all the same, as `file: module`. Shall become empty.
const UPWARD: &[&str] = &[];

/// Pairs of files that know each other. Shall become empty.
const CIRCLES: &[&str] = &[];

/// Without tests.
const LONGEST_FILE: usize = 350;

/// Files that are longer. Shall become empty.
const LONGER: &[&str] = &[];

/// Lines of the core that are code: no tests, comments or blank lines, nothing of Tokio, systemd, or systems but Linux.
const CORE: usize = 8_299;

/// Never in the library: it neither panics nor prints. (An arithmetic overflow has its own lints.)
const FORBIDDEN: &[&str] = &[
    ".unwrap()",
    ".expect(",
    ".unwrap_err()",
    "panic!(",
    "unreachable!(",
    "todo!(",
    "unimplemented!(",
    "assert!(",
    "assert_eq!(",
    "println!(",
    "print!(",
    "dbg!(",
    "process::exit(",
    "process::abort(",
];

/// Lines that still have some of the following. Shall become 0.
const GERMAN_LINES: usize = 17;

/// German syntax in English words; in comments, messages and pages.
const GERMAN: &[&str] = &[
    "for want of",
    "a riddle",
    "manners",
    "so much more time",
    "without a word",
    "whoever",
    "whatever comes",
    "is to be",
    "are to be",
    "at a time when",
    "stays out",
    "for ever",
    "by mistake or",
    "has heard",
    "is told",
    "was told",
    "be told",
    "is content",
];

struct Source {
    /// `sockets::pass`, `sockets` for its mod.rs.
    module: String,
    /// As it is on disk, without its tests.
    text: String,
    /// The same without comments.
    code: String,
}

impl Source {
    fn all() -> Vec<Source> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut sources = Vec::new();
        let mut directories = vec![root.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|kind| kind == "rs") && !path.ends_with("tests.rs") {
                    let name = path.strip_prefix(&root).unwrap().with_extension("");
                    let module = name.to_str().unwrap().replace('/', "::");
                    let module = module.strip_suffix("::mod").unwrap_or(&module).to_owned();
                    let text = fs::read_to_string(&path).unwrap();
                    let tests = text.find("\n#[cfg(test)]\nmod ").map_or(text.len(), |at| at + 1);
                    let text = text[..tests].to_owned();
                    let code = without_nested_supers(text.lines().map(without_comment));
                    sources.push(Source { module, text, code });
                }
            }
        }
        sources.sort_by(|a, b| a.module.cmp(&b.module));
        sources
    }

    fn is_of(&self, module: &str) -> bool {
        self.module.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }
}

/// In a module within the file, `super` is the file.
fn without_nested_supers<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut nested = false;
    let mut code = String::new();
    for line in lines {
        let declares = line.split(" mod ").last().unwrap().ends_with('{') && !line.starts_with(' ');
        nested = (nested || declares && line.contains("mod ")) && line != "}";
        code += &if nested { line.replace("super::", "self::") } else { line.to_owned() };
        code.push('\n');
    }
    code
}

/// A comment begins with `//` at the start of a line or after a space; that of an address does not.
fn without_comment(line: &str) -> &str {
    let start = if line.trim_start().starts_with("//") { Some(0) } else { line.find(" // ") };
    &line[..start.unwrap_or(line.len())]
}

/// The paths in `use` declarations and in the code, from the crate's root: `key::Key`.
fn paths(source: &Source, files: &BTreeSet<&str>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let parent = match source.module.rsplit_once("::") {
        Some((parent, _)) => format!("{parent}::"),
        None => String::new(),
    };
    let of_children = if source.module == "lib" { String::new() } else { format!("{}::", source.module) };
    let mut uses = Vec::new();
    for item in source.code.split(';') {
        let declared = item.split("\n").collect::<Vec<_>>().join(" ");
        if let Some((before, path)) = declared.rsplit_once("use ") {
            if before.is_empty() || before.ends_with([' ', '}', ']']) {
                expand(path.trim(), "", &mut uses);
            }
        }
    }
    for word in source.code.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')) {
        if word.starts_with("crate::") || word.starts_with("super::") {
            uses.push(word.to_owned());
        } else if word.split("::").next().is_some_and(|first| files.contains(&*format!("{of_children}{first}")))
            && word.contains("::")
        {
            uses.push(format!("self::{word}"));
        }
    }
    for path in uses.iter().filter(|path| !path.ends_with(':')) {
        if let Some(path) = path.strip_prefix("crate::") {
            found.insert(path.to_owned());
        } else if let Some(path) = path.strip_prefix("super::") {
            found.insert(format!("{parent}{path}"));
        } else if let Some(path) = path.strip_prefix("self::") {
            found.insert(format!("{of_children}{path}"));
        } else if path.split("::").next().is_some_and(|first| files.contains(&*format!("{of_children}{first}"))) {
            found.insert(format!("{of_children}{path}"));
        }
    }
    found
}

/// `a::{b, c::{d, e}}` as `a::b`, `a::c::d`, `a::c::e`.
fn expand(tree: &str, before: &str, found: &mut Vec<String>) {
    let (mut depth, mut start) = (0, 0);
    let mut parts = Vec::new();
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => parts.push(std::mem::replace(&mut start, at + 1)..at),
            _ => {}
        }
    }
    parts.push(start..tree.len());
    for part in parts {
        let part = tree[part].trim();
        match part.split_once('{') {
            Some((path, rest)) => expand(rest.trim_end().trim_end_matches('}'), &format!("{before}{path}"), found),
            None if !part.is_empty() => {
                let name = part.split(" as ").next().unwrap();
                found.push(format!("{before}{name}"));
            }
            None => {}
        }
    }
}

/// Which file uses which.
fn imports(sources: &[Source]) -> BTreeMap<&str, BTreeSet<&str>> {
    let files: BTreeSet<&str> = sources.iter().map(|source| &*source.module).collect();
    // `crate::Key` is `key::Key`.
    let lib = sources.iter().find(|source| source.module == "lib").unwrap();
    let reexported: BTreeMap<String, String> =
        paths(lib, &files).into_iter().filter_map(|path| Some((path.rsplit("::").next()?.to_owned(), path))).collect();
    let file_of = |path: &str| {
        // The face of `sys` calls whichever system it is `system`.
        let path = path.replace("sys::system", "sys::linux");
        let whole = reexported.get(&path).cloned().unwrap_or(path);
        let mut part = &*whole;
        loop {
            if let Some(file) = files.get(part) {
                return Some(*file);
            }
            part = part.rsplit_once("::")?.0;
        }
    };
    sources
        .iter()
        .map(|source| {
            let mut used: BTreeSet<&str> = paths(source, &files).iter().filter_map(|path| file_of(path)).collect();
            used.remove(&*source.module);
            (&*source.module, used)
        })
        .collect()
}

fn layer(module: &str) -> usize {
    let top = module.split("::").next().unwrap();
    let found = LAYERS.iter().position(|layer| layer.contains(&top));
    found.unwrap_or_else(|| panic!("src has a module {top}, which LAYERS in tests/it/tidy.rs does not name"))
}

#[test]
fn no_import_points_up() {
    let sources = Source::all();
    let mut up = BTreeSet::new();
    for (file, used) in imports(&sources) {
        for other in used {
            if layer(file) > layer(other) {
                up.insert(format!("{file}: {other}"));
            }
        }
    }
    assert_eq!(up, UPWARD.iter().map(|entry| (*entry).to_owned()).collect(), "found (left), known (right)");
}

/// Every file that this one uses, or that those use.
fn reached<'a>(from: &'a str, imports: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> BTreeSet<&'a str> {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(file) = next.pop() {
        next.extend(imports[file].iter().copied().filter(|used| seen.insert(*used)));
    }
    seen
}

#[test]
fn no_files_form_a_circle() {
    let sources = Source::all();
    let imports = imports(&sources);
    let reached: BTreeMap<_, _> = imports.keys().map(|file| (*file, reached(file, &imports))).collect();
    let mut circles = BTreeSet::new();
    for (file, used) in &imports {
        // Of a circle, the imports that are in it.
        circles.extend(used.iter().filter(|used| reached[**used].contains(file)).map(|used| format!("{file}: {used}")));
    }
    assert_eq!(circles, CIRCLES.iter().map(|entry| (*entry).to_owned()).collect(), "found (left), known (right)");
}

#[test]
fn no_file_is_long() {
    let long = |source: &Source| source.text.lines().count() > LONGEST_FILE;
    let longer: BTreeSet<_> = Source::all().into_iter().filter(long).map(|source| source.module).collect();
    assert_eq!(longer, LONGER.iter().map(|entry| (*entry).to_owned()).collect(), "found (left), known (right)");
}

#[test]
fn the_core_is_small() {
    let core = |source: &&Source| {
        !["tokio_ecdysis", "systemd", "fuzzing", "sys::unix"].iter().any(|other| source.is_of(other))
    };
    let count = |source: &Source| source.code.lines().filter(|line| !line.trim().is_empty()).count();
    let lines: usize = Source::all().iter().filter(core).map(count).sum();
    println!("{lines} lines");
    assert!(lines <= CORE, "{lines} lines of code in the core");
}

#[test]
fn unsafe_code_is_in_sys_alone() {
    for source in Source::all().iter().filter(|source| !source.is_of("sys")) {
        let word = source.code.split(|c: char| !(c.is_alphanumeric() || c == '_')).find(|word| *word == "unsafe");
        assert_eq!(word, None, "in {}", source.module);
    }
}

#[test]
fn the_library_neither_panics_nor_prints() {
    let mut found = Vec::new();
    for source in Source::all().iter().filter(|source| !source.is_of("fuzzing")) {
        for (at, line) in source.code.lines().enumerate() {
            let begins = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let bad =
                FORBIDDEN.iter().find(|bad| line.find(**bad).is_some_and(|at| bad.starts_with('.') || begins(at)));
            found.extend(bad.map(|bad| format!("{}:{}: {bad}", source.module, at + 1)));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn each_file_says_in_its_first_line_what_it_holds() {
    for source in Source::all() {
        let first: String =
            source.text.lines().map_while(|line| line.strip_prefix("//! ")).collect::<Vec<_>>().join(" ");
        let sentence = first.contains(". ") || first.ends_with(['.', ':']);
        assert!(sentence, "{} begins with {:?}", source.module, source.text.lines().next());
    }
}

#[test]
fn comments_and_messages_are_in_plain_english() {
    let mut found = Vec::new();
    for source in Source::all() {
        for (at, line) in source.text.lines().enumerate() {
            let lower = line.to_lowercase();
            found.extend(
                GERMAN
                    .iter()
                    .filter(|bad| lower.contains(*bad))
                    .map(|bad| format!("{}:{}: {bad}", source.module, at + 1)),
            );
        }
    }
    assert!(found.len() <= GERMAN_LINES, "{} {found:#?}", found.len());
}
