//! Stops a build for another system with one clear message, before the compiler makes hundreds of it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let system = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if system != "linux" {
        eprintln!(
            "ecdysis works on Linux only: it is made of execve and inherited descriptors; {system} is not supported"
        );
        std::process::exit(1);
    }
}
