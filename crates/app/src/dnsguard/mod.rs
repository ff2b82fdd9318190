//! `underpass dnsguard`: forged DNS answers dropped before the network stack sees them.
//!
//! `attach` leaves a pinned program behind and no process; what it counts, remembers and
//! samples is in pinned maps, which the next `attach` on the interface takes over.

mod attach;
pub(crate) mod check;
mod demo;
mod doctor;
mod export;
pub mod forgery;
mod memory;
mod rules;
mod show;

use std::path::PathBuf;

use clap::Subcommand;

pub use self::{
    memory::HostMemory,
    rules::{Guarded, Rules},
};
use crate::{error::Result, hook};

/// Arguments of `underpass dnsguard`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Guard an interface, or change how it is guarded, without a gap
    Attach(AttachArgs),
    /// Stop guarding an interface
    Detach {
        /// The interface
        interface: String,
    },
    /// Packets and drops, rule by rule, with the last samples
    Show {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// The same verdicts on a capture, without privileges
    Check(check::Args),
    /// An object with the settings in it, that `ip link set dev IFACE xdp obj FILE` loads
    Export(export::Args),
}

/// Arguments of `underpass dnsguard attach`.
#[derive(Debug, clap::Args)]
struct AttachArgs {
    /// The interface that answers come in on
    interface: String,
    #[command(flatten)]
    rules: RuleArgs,
    /// Where the program sits
    #[arg(long, value_enum, default_value_t)]
    hook: hook::Wanted,
    /// Count and sample, but drop nothing
    #[arg(long)]
    dry_run: bool,
}

/// What says which answers are forged.
#[derive(Debug, clap::Args)]
struct RuleArgs {
    /// Guard these resolvers, or `any`, instead of the well-known public ones
    #[arg(long = "resolver", value_name = "IP", num_args = 1..)]
    resolvers: Vec<Guarded>,
    /// A file that selects, parameterises and adds rules (TOML)
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
}

impl RuleArgs {
    fn rules(&self) -> Result<Rules> {
        Rules::new(&self.resolvers, self.rules.as_deref())
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.verb {
        Verb::Attach(args) => attach::attach(args),
        Verb::Detach { interface } => attach::detach(interface),
        Verb::Show { json } => show::show(*json),
        Verb::Check(args) => check::check(&args.file, &args.rules.rules()?, args.json),
        Verb::Export(args) => export::export(args),
    }
}

/// Opens the object with these rules in it; its programs are not loaded yet.
///
/// # Errors
/// [`crate::error::Error::Unable`] where the privileges do not suffice.
pub fn open(rules: &Rules) -> Result<aya::Ebpf> {
    attach::load(rules, None)
}

pub(crate) use self::{attach::DNSGUARD, demo::scene, doctor::doctor};
