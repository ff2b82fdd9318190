//! `underpass status` and `underpass down`: everything that is attached or runs, and
//! the end of all that is pinned. Each function tells its own; this is the list of them.

use std::io::Write as _;

use anyhow::Context as _;
use serde::Serialize;

use crate::{dnsguard, error::Result, mux, relay, shortcut};

/// Arguments of `underpass status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// One thing that is attached or runs.
#[derive(Debug, Serialize)]
pub(crate) struct Item {
    /// The function's word on the command line.
    pub function: &'static str,
    /// What it works on: an interface, an address, a cgroup.
    pub on: String,
    /// The path it took: a hook, a data path.
    pub path: String,
    /// Why that path, or what is wrong with it.
    pub why: String,
    /// Whether it is at work: a pin may be left of what is gone.
    pub works: bool,
    /// What more there is to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<serde_json::Value>,
}

#[derive(Debug, Serialize)]
struct Report {
    items: Vec<Item>,
}

pub(crate) fn status(args: &Args) -> Result<()> {
    let mut items = vec![];
    items.extend(relay::status()?);
    items.extend(dnsguard::DNSGUARD.status()?);
    items.extend(shortcut::status()?);
    items.extend(mux::status()?);
    let mut out = std::io::stdout().lock();
    let printed = if args.json { print_json(&mut out, items) } else { print(&mut out, &items) };
    Ok(printed.context("cannot print the status")?)
}

/// Removes everything pinned and says what that was.
pub(crate) fn down() -> Result<()> {
    let mut removed = vec![];
    removed.extend(dnsguard::DNSGUARD.down()?);
    removed.extend(shortcut::down()?);
    removed.extend(mux::MUX.down()?);
    let mut out = std::io::stdout().lock();
    for line in &removed {
        writeln!(out, "{line}").context("cannot print what was removed")?;
    }
    if removed.is_empty() {
        writeln!(out, "nothing was pinned").context("cannot print what was removed")?;
    }
    Ok(())
}

fn print(out: &mut impl std::io::Write, items: &[Item]) -> std::io::Result<()> {
    if items.is_empty() {
        return writeln!(out, "nothing is attached, nothing runs");
    }
    for item in items {
        let state = if item.works { "" } else { " (not at work)" };
        writeln!(out, "{:<9} {:<16} {}{state}: {}", item.function, item.on, item.path, item.why)?;
    }
    Ok(())
}

fn print_json(out: &mut impl std::io::Write, items: Vec<Item>) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &Report { items })?;
    writeln!(out)
}
