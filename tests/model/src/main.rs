//! `cargo run -- page` writes the generated table into the guide. `cargo run -- explore [WORD]` runs the large
//! explorations, or those whose name contains the word.

use std::process::ExitCode;

use ecdysis_model::{page, scenarios};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("page") => page::write(),
        Some("explore") => {
            let word = std::env::args().nth(2).unwrap_or_default();
            for scenario in scenarios::large().into_iter().filter(|scenario| scenario.name.contains(&word)) {
                println!("{}", scenario.explore());
            }
        }
        Some("--help") => println!("page writes the generated table into the guide; explore [WORD] runs explorations"),
        _ => {
            eprintln!("usage: page | explore [WORD]");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
