//! `underpass doctor`: what this kernel and these privileges allow, function by
//! function, found by trying it, never from a version number.

mod host;

use std::io::Write as _;

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    dnsguard,
    error::{Error, Result},
    mux, relay, shortcut, watch,
};

/// Arguments of `underpass doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    host: Vec<Check>,
    functions: Vec<Function>,
}

/// What the doctor found out about one function.
#[derive(Debug, Serialize)]
pub struct Function {
    /// The function's word on the command line.
    pub name: &'static str,
    /// Whether the function can do its job here at all.
    pub works: bool,
    /// What it lacks, each with what to do about it.
    pub missing: Vec<String>,
    /// Each thing that was tried.
    pub checks: Vec<Check>,
}

/// One thing that was tried.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was tried.
    pub name: String,
    /// Whether it worked.
    pub ok: bool,
    /// What came of it, for people.
    pub detail: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let functions =
        vec![relay::doctor(), mux::doctor(), dnsguard::doctor(), shortcut::doctor(), watch::doctor()];
    let report = Report { kernel: kernel()?, host: host::checks(), functions };
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report).context("cannot write the report")?;
        writeln!(out).context("cannot write the report")?;
    } else {
        print(&mut out, &report).context("cannot write the report")?;
    }
    let broken: Vec<_> = report.functions.iter().filter(|f| !f.works).map(|f| f.name).collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Error::Unable(format!("cannot work here: {}", broken.join(", "))))
}

fn print(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    writeln!(out, "kernel {}", report.kernel)?;
    print_checks(out, &report.host)?;
    for function in &report.functions {
        writeln!(out, "\n{:<10} {}", function.name, if function.works { "works" } else { "does not work" })?;
        print_checks(out, &function.checks)?;
        for missing in &function.missing {
            writeln!(out, "  missing: {missing}")?;
        }
    }
    Ok(())
}

fn print_checks(out: &mut impl std::io::Write, checks: &[Check]) -> std::io::Result<()> {
    for check in checks {
        writeln!(out, "  {} {:<22} {}", if check.ok { "ok" } else { "--" }, check.name, check.detail)?;
    }
    Ok(())
}

fn kernel() -> Result<String> {
    let name = nix::sys::utsname::uname().context("uname failed")?;
    Ok(name.release().to_string_lossy().into_owned())
}
