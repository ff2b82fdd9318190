//! The command line's entry: parse, run, and turn a failure into an exit status.

use std::process::ExitCode;

use clap::Parser as _;
use underpass::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done if stderr is closed.
            let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("underpass: {error}\n"));
            error.status()
        }
    }
}
