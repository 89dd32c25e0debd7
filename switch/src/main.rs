//! The `ringway` program: see [`ringway::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ringway::cli::main()
}
