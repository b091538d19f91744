//! `cargo run -- page`: writes what the model says into the guide. `cargo run -- explore`: the large exploration.

use std::process::ExitCode;

use ecdysis_model::{page, scenarios};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("page") => page::write(),
        Some("explore") => {
            for scenario in scenarios::large() {
                println!("{}", scenario.explore());
            }
        }
        _ => {
            eprintln!("usage: page | explore");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
