//! Fails the build on systems that are not Unix with one clear message.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_CFG_UNIX").is_none() {
        let system = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
        eprintln!("ecdysis needs a Unix: it passes descriptors on through execve; {system} is not supported");
        std::process::exit(1);
    }
}
