//! `underpass mux`: one port, many services; what the payload says decides.
//!
//! - `route`: the vocabulary of `--route MATCH=TARGET`;
//! - `listen`: the TCP forms' arguments, their port and its end;
//! - `connection`: TCP by connection: the first bytes decide, the relay carries;
//! - `message`: TCP by message: each message goes where its tag says.

mod connection;
mod listen;
mod message;
pub mod route;

use crate::error::Result;

/// The verbs and nouns of `underpass mux`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Listen on a TCP port: each connection, or each message, goes where its bytes say
    Listen(listen::Args),
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Listen(args) => listen::run(&args),
    }
}
