//! What every benchmark shares: samples by subject and measure, their medians, and
//! the page that shows them.
//!
//! A [`Table`] has a row a subject (underpass on a path, a peer) and a column a
//! measure. A benchmark goes through its subjects in rounds, A B C C B A
//! ([`rounds`]), so that whatever else the machine does hits all of them alike,
//! adds every sample, and hands the tables to [`Report::write`].

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::plot;

/// What every benchmark can be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer and shorter rounds, for a first look
    #[arg(long)]
    pub quick: bool,
    /// Measure and print, but leave docs/benchmarks/ as it is
    #[arg(long)]
    dry_run: bool,
}

/// Which way a measure is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// A measure: a column of a table.
#[derive(Debug, Clone)]
pub struct Measure {
    /// What is measured, with its unit.
    pub name: String,
    pub better: Better,
}

impl Measure {
    pub fn higher(name: impl Into<String>) -> Self {
        Self { name: name.into(), better: Better::Higher }
    }

    pub fn lower(name: impl Into<String>) -> Self {
        Self { name: name.into(), better: Better::Lower }
    }
}

/// How a table is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plot {
    /// A panel a measure, a bar a subject.
    Bars,
    /// A panel a measure, a line a subject; rows are named `subject @ x`.
    Lines { x: &'static str },
}

/// Samples by subject (row) and measure (column).
#[derive(Debug, Clone)]
pub struct Table {
    pub title: String,
    /// How it was measured, in a sentence or two.
    pub note: String,
    pub measures: Vec<Measure>,
    /// The row that the ratios in brackets refer to.
    pub base: Option<String>,
    pub plot: Plot,
    rows: Vec<(String, Vec<Vec<f64>>)>,
}

impl Table {
    pub fn new(title: impl Into<String>, note: impl Into<String>, measures: Vec<Measure>) -> Self {
        Self { title: title.into(), note: note.into(), measures, base: None, plot: Plot::Bars, rows: vec![] }
    }

    /// Gives each cell its ratio to the same cell of this row.
    pub fn base(mut self, row: impl Into<String>) -> Self {
        self.base = Some(row.into());
        self
    }

    pub fn plot(mut self, plot: Plot) -> Self {
        self.plot = plot;
        self
    }

    /// Makes sure that the row is there, even if nothing can be measured for it.
    pub fn row(&mut self, row: &str) {
        self.cells(row);
    }

    /// Adds one sample; rows stand in the order in which they first appear.
    ///
    /// # Panics
    /// Where the table has no such measure.
    pub fn add(&mut self, row: &str, measure: &str, value: f64) {
        let column = self.measures.iter().position(|m| m.name == measure);
        let column = column.unwrap_or_else(|| panic!("{} has no measure {measure}", self.title));
        self.cells(row)[column].push(value);
    }

    /// The median of a cell, if it was measured.
    pub fn median(&self, row: &str, measure: &str) -> Option<f64> {
        let column = self.measures.iter().position(|m| m.name == measure)?;
        self.rows.iter().find(|(name, _)| name == row).and_then(|(_, cells)| median(&cells[column]))
    }

    /// The samples of a cell, in the order of the rounds.
    pub fn samples(&self, row: &str, measure: &str) -> impl Iterator<Item = f64> {
        let column = self.measures.iter().position(|m| m.name == measure);
        let cells = self.rows.iter().find(|(name, _)| name == row);
        cells.zip(column).into_iter().flat_map(|((_, cells), column)| cells[column].iter().copied())
    }

    /// The best of these rows by a measure, with its median.
    pub fn best_of<'a>(&self, measure: &Measure, rows: &'a [String]) -> Option<(&'a str, f64)> {
        let medians = rows.iter().filter_map(|row| Some((row.as_str(), self.median(row, &measure.name)?)));
        match measure.better {
            Better::Higher => medians.max_by(|a, b| a.1.total_cmp(&b.1)),
            Better::Lower => medians.min_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }

    /// The rows' names, in order.
    pub fn rows(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().map(|(name, _)| name.as_str())
    }

    fn cells(&mut self, row: &str) -> &mut Vec<Vec<f64>> {
        let at = self.rows.iter().position(|(name, _)| name == row).unwrap_or_else(|| {
            self.rows.push((row.to_owned(), vec![vec![]; self.measures.len()]));
            self.rows.len() - 1
        });
        &mut self.rows[at].1
    }

    /// The table in Markdown: medians, the ratio to the base in brackets, the best of
    /// a column in bold (the base row itself is no candidate: it is a yardstick; nor are
    /// rows of growth, which differ in more than the subject).
    fn markdown(&self) -> String {
        let mut out = format!("## {}\n\n{}\n\n", self.title, self.note);
        let heads: Vec<_> = self.measures.iter().map(|m| m.name.as_str()).collect();
        let _ = writeln!(out, "| | {} |\n|---|{}", heads.join(" | "), "---:|".repeat(heads.len()));
        let rows: Vec<_> =
            self.rows().filter(|row| Some(*row) != self.base.as_deref()).map(str::to_owned).collect();
        let best = self.measures.iter().map(|m| self.best_of(m, &rows).map(|best| best.1));
        let best: Vec<_> = best.map(|best| best.filter(|_| self.plot == Plot::Bars)).collect();
        for row in self.rows() {
            let cells = self.measures.iter().zip(&best).map(|(measure, best)| self.cell(row, measure, *best));
            let _ = writeln!(out, "| {row} | {} |", cells.collect::<Vec<_>>().join(" | "));
        }
        out
    }

    fn cell(&self, row: &str, measure: &Measure, best: Option<f64>) -> String {
        let Some(value) = self.median(row, &measure.name) else { return "-".to_owned() };
        let mut cell = number(value);
        if Some(value) == best && Some(row) != self.base.as_deref() {
            cell = format!("**{cell}**");
        }
        if let Some(base) = self.base.as_deref().and_then(|base| self.median(base, &measure.name))
            && base > 0.0
        {
            let _ = write!(cell, " ({:.2})", value / base);
        }
        cell
    }
}

/// A page in docs/benchmarks/.
#[derive(Debug)]
pub struct Report {
    /// The function's word: the page is `docs/benchmarks/<name>.md`.
    pub name: &'static str,
    pub title: &'static str,
    /// What the page says before the tables: what is compared, and with which
    /// versions and settings of the peers.
    pub introduction: String,
    pub tables: Vec<Table>,
    /// What the page says after them: what the figures mean, who wins where.
    pub findings: Vec<String>,
}

impl Report {
    /// Prints the tables and the findings, and writes the page unless it is not wanted.
    ///
    /// # Errors
    /// Where standard output is closed or docs/benchmarks/ cannot be written.
    pub fn publish(&self, args: &Args) -> Result<()> {
        self.print()?;
        if args.dry_run { Ok(()) } else { self.write() }
    }

    fn print(&self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let tables: Vec<_> = self.tables.iter().map(Table::markdown).collect();
        writeln!(out, "{}", tables.join("\n")).context("cannot print the tables")?;
        for finding in &self.findings {
            writeln!(out, "- {finding}").context("cannot print the findings")?;
        }
        Ok(())
    }

    /// Writes the page with its plots.
    fn write(&self) -> Result<()> {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks"));
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut page = format!("# {}\n\n{}\n\n", self.title, self.introduction.trim());
        let _ = write!(page, "```\n{}\n```\n\n{}\n\n", command(), machine());
        for (i, table) in self.tables.iter().enumerate() {
            page.push_str(&table.markdown());
            let drawing = match table.plot {
                Plot::Bars => plot::bars(table),
                Plot::Lines { x } => plot::lines(table, x),
            };
            let file =
                if i == 0 { format!("{}.svg", self.name) } else { format!("{}-{}.svg", self.name, i + 1) };
            let _ = writeln!(page, "\n![{}]({file})\n", table.title);
            save(&folder.join(file), &drawing)?;
        }
        if !self.findings.is_empty() {
            page.push_str("## What it says\n\n");
            for finding in &self.findings {
                let _ = writeln!(page, "- {finding}");
            }
        }
        save(&folder.join(format!("{}.md", self.name)), &page)
    }
}

fn save(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Goes through the subjects `n` times, one after the other in each round, and says
/// on stderr how far it is. Each round goes the other way than the one before, so that no
/// subject always comes after the same.
///
/// # Errors
/// The first that `measure` returns.
pub fn rounds<S>(n: usize, subjects: &[S], mut measure: impl FnMut(&S) -> Result<()>) -> Result<()>
where
    S: std::fmt::Display,
{
    for round in 1..=n {
        for at in 0..subjects.len() {
            let subject = &subjects[if round % 2 == 1 { at } else { subjects.len() - 1 - at }];
            say(format_args!("round {round} of {n}: {subject}"));
            measure(subject).with_context(|| format!("measuring {subject}"))?;
        }
    }
    Ok(())
}

/// Says on stderr what is being done.
pub fn say(what: impl std::fmt::Display) {
    // Progress is a courtesy: the measurement goes on without it.
    let _ = writeln!(std::io::stderr(), "== {what}");
}

/// The median; nothing of nothing.
pub fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 0.5)
}

/// The value below which the share `p` (0 to 1) of the samples lies, by nearest rank.
pub fn percentile(samples: &[f64], p: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Three significant digits, no exponent.
pub fn number(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let decimals = usize::try_from(2 - digits).unwrap_or(0).min(4);
    let rounded = if decimals == 0 && digits > 2 {
        // 14,712 rather than 14712.
        let step = 10f64.powi(digits - 2).max(1.0);
        (value / step).round() * step
    } else {
        value
    };
    let text = format!("{rounded:.decimals$}");
    if rounded.abs() < 10_000.0 { text } else { thousands(&text) }
}

fn thousands(digits: &str) -> String {
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// The command line that made the page.
fn command() -> String {
    let args: Vec<String> = std::env::args().skip(1).collect();
    format!("./dev bench {}", args.join(" "))
}

/// The machine it was measured on.
fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "Linux {}, {cpus} CPUs ({}). Medians; what is in brackets is the ratio to the first row. Trust the \
         ratios: absolute figures differ from machine to machine and from run to run.",
        kernel.trim(),
        model.map_or("unknown", |(_, model)| model.trim()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_nearest_ranks() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
        assert_eq!(percentile(&hundred, 0.0), Some(1.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.331, "0.331"),
            (1.5, "1.50"),
            (14.712, "14.7"),
            (3048.2, "3050"),
            (14712.0, "14,700"),
            (1_234_567.0, "1,230,000"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_table_shows_medians_ratios_and_the_best() {
        let measures = vec![Measure::higher("Gbit/s"), Measure::lower("us")];
        let mut table = Table::new("Bulk", "How.", measures).base("direct");
        for (row, rate, us) in [("direct", 40.0, 10.0), ("ours", 20.0, 15.0), ("theirs", 10.0, 30.0)] {
            table.add(row, "Gbit/s", rate);
            table.add(row, "us", us);
        }
        table.row("absent");
        let text = table.markdown();
        assert!(text.contains("| direct | 40.0 (1.00) | 10.0 (1.00) |"), "{text}");
        assert!(text.contains("| ours | **20.0** (0.50) | **15.0** (1.50) |"), "{text}");
        assert!(text.contains("| absent | - | - |"), "{text}");
    }
}
