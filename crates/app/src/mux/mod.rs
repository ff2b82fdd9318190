//! `underpass mux`: one port, many services; what the payload says decides.
//!
//! - `route`: the vocabulary of `--route MATCH=TARGET`;
//! - `listen`: the TCP forms' arguments, their port and its end;
//! - `connection`: TCP by connection: the first bytes decide, the relay carries;
//! - `message`: TCP by message: each message goes where its tag says;
//! - `datagram`: what the UDP form's arguments say, and the table made of it;
//! - `attach`: putting that into the kernel, changing and removing it;
//! - `show`: what is there, and what it has counted;
//! - `demo`, `doctor`: what those commands show of it.

pub mod attach;
mod connection;
pub mod datagram;
mod demo;
mod doctor;
mod listen;
mod message;
pub mod route;
mod show;

pub(crate) use self::{
    attach::{MUX, status},
    demo::scene,
    doctor::doctor,
};
use crate::error::Result;

/// The verbs and nouns of `underpass mux`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Listen on a TCP port: each connection, or each message, goes where its bytes say
    Listen(listen::Args),
    /// Rewrite UDP ports on an interface by what the payload says, or change how; no process stays
    Attach(attach::Args),
    /// Stop rewriting UDP ports on an interface
    Detach {
        /// The interface
        #[arg(value_name = "IFACE")]
        interface: String,
    },
    /// What is attached, with its counters
    Show {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Listen(args) => listen::run(&args),
        Command::Attach(args) => attach::attach(&args),
        Command::Detach { interface } => attach::detach(&interface),
        Command::Show { json } => show::show(json),
    }
}
