//! `underpass demo`: every function at work in private network namespaces, with
//! numbers. Each function's scene is in its own module; this runs and prints them.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    dnsguard,
    error::{Error, Result},
    mux, relay, shortcut, watch,
};

/// Arguments of `underpass demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Only these scenes
    #[arg(long, value_name = "SCENE", value_delimiter = ',')]
    only: Vec<Name>,
}

/// The scenes, by the word of the function that each shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// Bytes moved on each path, through a SOCKS5 proxy
    Relay,
    /// Exchanges between two local ends, by TCP and by the shortcut
    Shortcut,
    /// One UDP port whose datagrams go to three services by a tag
    Mux,
    /// Processes that talk, each named with its bytes
    Watch,
    /// Forged DNS answers, without the guard and with it
    Dnsguard,
}

/// What a scene showed.
#[derive(Debug, Serialize)]
pub struct Scene {
    /// The function's word.
    pub name: &'static str,
    /// Whether all that was shown proved true.
    pub ok: bool,
    /// What was shown, one sentence a line.
    #[serde(skip)]
    pub story: Vec<String>,
    /// The table for people: the first row is its head.
    #[serde(skip)]
    pub table: Vec<Vec<String>>,
    /// The same for programs.
    #[serde(flatten)]
    pub figures: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    scenes: Vec<Scene>,
}

/// Says on stderr what a scene is doing, if a person is looking.
#[derive(Debug)]
pub struct Progress {
    scene: &'static str,
    shown: bool,
}

impl Progress {
    /// Replaces the line that tells what is going on.
    pub fn say(&self, what: impl std::fmt::Display) {
        if self.shown {
            // Progress is a courtesy: the demo goes on without it.
            let _ = write!(std::io::stderr(), "\r\x1b[K{}: {what}", self.scene);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.say("");
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut report = Report { ok: true, scenes: vec![] };
    let chosen = <Name as clap::ValueEnum>::value_variants();
    for name in chosen.iter().filter(|name| args.only.is_empty() || args.only.contains(name)) {
        let scene = play(*name, args.json)?;
        if !args.json {
            print(&scene).context("cannot print the scene")?;
        }
        report.ok &= scene.ok;
        report.scenes.push(scene);
    }
    if args.json {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, &report).context("cannot print the report")?;
        writeln!(out).context("cannot print the report")?;
    }
    if report.ok { Ok(()) } else { Err(Error::Failed(anyhow::anyhow!("not every scene proved true"))) }
}

fn play(name: Name, quiet: bool) -> Result<Scene> {
    let progress = |scene| Progress { scene, shown: !quiet && std::io::stderr().is_terminal() };
    match name {
        Name::Relay => relay::scene(&progress("relay")),
        Name::Shortcut => shortcut::scene(&progress("shortcut")),
        Name::Mux => mux::scene(&progress("mux")),
        Name::Watch => watch::scene(&progress("watch")),
        Name::Dnsguard => dnsguard::scene(&progress("dnsguard")),
    }
    .map_err(|error| Error::Failed(error.context(format!("the scene {name:?} broke off"))))
}

fn print(scene: &Scene) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", scene.name)?;
    for line in &scene.story {
        writeln!(out, "  {line}")?;
    }
    let columns = scene.table.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            scene.table.iter().filter_map(|row| row.get(i)).map(|c| c.chars().count()).max().unwrap_or(0)
        })
        .collect();
    for row in &scene.table {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "  {}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    writeln!(out)
}
