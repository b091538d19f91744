//! Tells the program which target it is built for.

fn main() {
    println!("cargo:rustc-env=TARGET={}", std::env::var("TARGET").unwrap_or_default());
}
