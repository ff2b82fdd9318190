//! `underpass shortcut show`, and the shortcut's part of `status` and `down`.

use anyhow::Context as _;
use serde::Serialize;

use super::{
    attach::{self, Attached},
    summary::{Figures, Summary},
};
use crate::{error::Result, status::Item};

/// Arguments of `underpass shortcut show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Print metrics in the text format of Prometheus
    #[arg(long, conflicts_with = "json")]
    metrics: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    attached: bool,
    helper: Option<u32>,
    on: Option<String>,
    #[serde(flatten)]
    summary: Summary,
}

pub(super) fn show(args: &ShowArgs) -> Result<()> {
    let attached = Attached::find()?;
    let report = Report {
        attached: attached.is_some(),
        helper: attached.as_ref().map(Attached::helper).transpose()?.flatten(),
        on: attached.as_ref().map(Attached::on),
        summary: attached.as_ref().map(|attached| Summary::of(&attached.tables)).unwrap_or_default(),
    };
    let mut out = std::io::stdout().lock();
    let printed = match args {
        ShowArgs { json: true, .. } => print_json(&mut out, &report),
        ShowArgs { metrics: true, .. } => print_metrics(&mut out, &report),
        ShowArgs { .. } => print(&mut out, &report),
    };
    Ok(printed.context("cannot print what the shortcut did")?)
}

fn print_json(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    writeln!(out)
}

fn print(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    let Some(on) = &report.on else { return writeln!(out, "the shortcut is not attached") };
    match report.helper {
        Some(pid) => writeln!(out, "attached to {on}, helper process {pid}")?,
        None => writeln!(out, "attached to {on}; its helper died, so nothing new is accelerated")?,
    }
    writeln!(
        out,
        "{:>6} {:>7} {:>11} {:>14} {:>14}  {:<24} control group",
        "port", "now", "accelerated", "bytes", "bytes by TCP", "left alone"
    )?;
    for group in &report.summary.groups {
        let cgroup = group.cgroup.as_ref().map_or("gone".into(), |path| path.display().to_string());
        print_row(out, &group.port.to_string(), &group.figures, &cgroup)?;
    }
    print_row(out, "all", &report.summary.total, "")
}

fn print_row(
    out: &mut impl std::io::Write,
    port: &str,
    figures: &Figures,
    cgroup: &str,
) -> std::io::Result<()> {
    let left: Vec<_> = figures.left_alone.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
    writeln!(
        out,
        "{port:>6} {:>7} {:>11} {:>14} {:>14}  {:<24} {cgroup}",
        figures.accelerated_now,
        figures.accelerated,
        figures.redirected_bytes,
        figures.tcp_bytes,
        left.join(", ")
    )
}

fn print_metrics(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    let helper = u8::from(report.helper.is_some());
    writeln!(out, "# TYPE underpass_shortcut_helper_up gauge\nunderpass_shortcut_helper_up {helper}")?;
    type Column = (&'static str, &'static str, fn(&Figures) -> u64);
    let columns: [Column; 4] = [
        ("accelerated_connections", "gauge", |figures| figures.accelerated_now),
        ("accelerated_connections_total", "counter", |figures| figures.accelerated),
        ("redirected_bytes_total", "counter", |figures| figures.redirected_bytes),
        ("tcp_bytes_total", "counter", |figures| figures.tcp_bytes),
    ];
    let labels = |group: &super::summary::GroupFigures| {
        let cgroup = group.cgroup.as_ref().map_or(String::new(), |path| path.display().to_string());
        format!("cgroup={cgroup:?},port=\"{}\"", group.port)
    };
    for (name, kind, figure) in columns {
        writeln!(out, "# TYPE underpass_shortcut_{name} {kind}")?;
        for group in &report.summary.groups {
            writeln!(out, "underpass_shortcut_{name}{{{}}} {}", labels(group), figure(&group.figures))?;
        }
    }
    writeln!(out, "# TYPE underpass_shortcut_left_alone_total counter")?;
    for group in &report.summary.groups {
        for (reason, count) in &group.figures.left_alone {
            let labels = labels(group);
            writeln!(out, "underpass_shortcut_left_alone_total{{{labels},reason=\"{reason}\"}} {count}")?;
        }
    }
    Ok(())
}

/// The shortcut's line of `underpass status`.
pub(crate) fn status() -> Result<Vec<Item>> {
    let Some(attached) = Attached::find()? else { return Ok(vec![]) };
    let helper = attached.helper()?;
    let Figures { accelerated_now, accelerated, .. } = Summary::of(&attached.tables).total;
    let why = match helper {
        Some(pid) => {
            format!(
                "{accelerated_now} connections accelerated now, {accelerated} so far; helper process {pid}"
            )
        }
        None => "its helper process died: detach and attach again".into(),
    };
    Ok(vec![Item {
        function: "shortcut",
        on: attached.on(),
        path: "sockmap".into(),
        why,
        works: helper.is_some(),
        details: None,
    }])
}

/// The shortcut's part of `underpass down`.
pub(crate) fn down() -> Result<Vec<String>> {
    let Some(attached) = Attached::find()? else { return Ok(vec![]) };
    let on = attached.on();
    Ok(vec![format!("shortcut {on}: {}", attach::detach()?)])
}
