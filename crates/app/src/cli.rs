//! The command line. Each function keeps its own arguments in its module; this is
//! the list of them.

use clap::{Parser, Subcommand};

use crate::{demo, dnsguard, doctor, error::Result, mux, relay, shortcut, status, watch};

/// Moves, filters and watches this host's traffic inside the kernel.
#[derive(Debug, Parser)]
#[command(name = "underpass", version, about, max_term_width = 100)]
#[command(
    after_help = "Exit status: 0 done; 1 it failed while running; 2 the command line or the config is \
                        wrong; 3 this kernel or these privileges cannot do it."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Forward a TCP port to a target, directly or through a proxy, or pair clients with each other
    Relay(relay::Args),
    /// Every connection of this host, its process and its bytes
    Watch(watch::Args),
    /// Drop forged DNS answers before the network stack sees them
    Dnsguard(dnsguard::Args),
    /// One port, many services: what the payload says decides where it goes
    #[command(subcommand)]
    Mux(mux::Command),
    /// Let chosen local processes talk socket to socket
    Shortcut(shortcut::Args),
    /// What this kernel and these privileges allow, function by function, and why not
    Doctor(doctor::Args),
    /// Every function at work in private network namespaces, with numbers
    Demo(demo::Args),
    /// Everything attached or running, and its path
    Status(status::Args),
    /// Remove everything that is pinned
    Down,
}

impl Cli {
    /// Does what the command line asks for.
    ///
    /// # Errors
    /// Whatever the command reports; [`crate::error::Error::status`] is its exit status.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Relay(args) => relay::run(args),
            Command::Watch(args) => watch::run(&args),
            Command::Dnsguard(args) => dnsguard::run(&args),
            Command::Mux(command) => mux::run(command),
            Command::Shortcut(args) => shortcut::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Status(args) => status::status(&args),
            Command::Down => status::down(),
        }
    }
}
