//! The house rules that a program can check: layers, circles, lengths, the place of `unsafe`, forbidden calls, plain
//! English.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The modules from top to bottom. A file may use modules of lower lines, and of its own line.
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

/// Known imports that point up, as `file: module`. Must become empty.
const UPWARD: &[&str] = &[];

/// Known pairs of files that import each other. Must become empty.
const CIRCLES: &[&str] = &[];

/// The maximum number of lines, without tests.
const LONGEST_FILE: usize = 350;

/// Known files that are longer. Must become empty.
const LONGER: &[&str] = &[];

/// The maximum number of code lines in the core: without tests, comments and blank lines, and without the code for
/// Tokio, systemd and systems other than Linux.
const CORE: usize = 7_969;

/// Code that the library must not contain, because it neither panics nor prints. (Lints check for arithmetic overflow.)
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

/// German syntax in English words, and British spelling: not in comments, messages and pages.
const GERMAN: &[&str] = &[
    "a riddle",
    "afterwards",
    "all the same",
    "anew",
    "anybody",
    "are to be",
    "as you like",
    "at a time when",
    "be told",
    "behaviour",
    "by itself",
    "by mistake or",
    "colour",
    "for ever",
    "for want of",
    "go on",
    "goes on",
    "has heard",
    "is content",
    "is to be",
    "is told",
    "its like",
    "licence",
    "manners",
    "meanwhile",
    "no word for",
    "nobody accepts",
    "nobody can",
    "nobody else",
    "nobody has",
    "nobody is",
    "nobody listens",
    "nobody serves",
    "nobody waits",
    "of its own",
    "of their own",
    "serves on",
    "so much more time",
    "somebody",
    "stays out",
    "was told",
    "whatever comes",
    "whoever",
    "without a word",
];

struct Source {
    /// `sockets::pass`, `sockets` for its mod.rs.
    module: String,
    /// The text on disk, without its tests.
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

/// In a module within the file, `super` is the file itself.
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

/// A comment begins with `//` at the start of a line or after a space, unlike the `//` of a URL.
fn without_comment(line: &str) -> &str {
    let start = if line.trim_start().starts_with("//") { Some(0) } else { line.find(" // ") };
    &line[..start.unwrap_or(line.len())]
}

/// Returns the paths in `use` declarations and in the code, from the crate's root: `key::Key`.
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

/// Returns the files that each file uses.
fn imports(sources: &[Source]) -> BTreeMap<&str, BTreeSet<&str>> {
    let files: BTreeSet<&str> = sources.iter().map(|source| &*source.module).collect();
    // `crate::Key` is `key::Key`.
    let lib = sources.iter().find(|source| source.module == "lib").unwrap();
    let reexported: BTreeMap<String, String> =
        paths(lib, &files).into_iter().filter_map(|path| Some((path.rsplit("::").next()?.to_owned(), path))).collect();
    let file_of = |path: &str| {
        // `sys` imports the current system's module as `system`.
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

/// Returns every file that this one uses, directly or indirectly.
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
        // The imports that are part of a circle.
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

/// Whether the line, in lower case, contains these words. `Reply::Nobody` is not a word.
fn has_words(line: &str, words: &str) -> bool {
    let ends = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
    let after = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(words)
        .any(|(at, _)| ends(line[..at].chars().next_back()) && after(line[at + words.len()..].chars().next()))
}

/// Comments, messages and pages of the whole repository.
#[test]
fn comments_and_messages_are_in_plain_english() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    while let Some(path) = entries.pop() {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with(".git") {
            entries.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if (name.ends_with(".rs") && name != "tidy.rs") || name.ends_with(".md") || name.ends_with(".py") {
            for (at, line) in fs::read_to_string(&path).unwrap().to_lowercase().lines().enumerate() {
                let bad = GERMAN.iter().filter(|words| has_words(line, words));
                found.extend(bad.map(|words| format!("{}:{}: {words}", path.display(), at + 1)));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
