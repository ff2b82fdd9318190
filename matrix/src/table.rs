//! What is shown: kernel by kernel, and in the end function by function.

use std::{collections::BTreeSet, fmt::Write as _, io::Write as _};

use anyhow::Result;

use crate::{
    budget::{self, Budget},
    kernels::Series,
    machine::{Outcome, Run},
    programs,
};

/// What came of a kernel.
#[derive(Debug)]
pub struct Row {
    /// What was asked for.
    pub series: Series,
    /// What was found.
    pub release: Option<String>,
    /// What came of it; an error if there is no such kernel to be had.
    pub run: Result<Run>,
    /// What ran loads every program that there is, where the kernel takes it.
    pub loads_all: bool,
}

impl Row {
    /// A kernel that cannot be had is reported, and is no failure of underpass.
    pub fn is_ok(&self) -> bool {
        let Ok(run) = &self.run else { return true };
        run.broken.is_none()
            && self.not_loaded().is_empty()
            && run.results.iter().all(|(_, outcome)| !matches!(outcome, Outcome::Failed(_) | Outcome::NotRun))
    }

    /// Programs that this kernel should have taken.
    fn not_loaded(&self) -> Vec<&'static str> {
        let Some(run) = self.run.as_ref().ok().filter(|_| self.loads_all) else { return vec![] };
        programs::loaded(&run.loads, run.version, run.has_peers).1
    }
}

/// One kernel, as soon as it is done.
pub fn row(row: &Row) -> String {
    let mut text = String::new();
    match &row.run {
        Err(error) => writeln!(text, "== {}: not run: {error:#}", row.series),
        Ok(run) => writeln!(
            text,
            "== {}: {} in {:.0} s",
            row.series,
            if row.is_ok() { "passed" } else { "FAILED" },
            run.took.as_secs_f32()
        ),
    }
    .expect("memory");
    text
}

/// The whole table, failures, what the verifier refused and what it spent.
///
/// # Errors
/// Where nobody reads it.
pub fn print(rows: &[Row], budget: &Budget) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "\n{:<24}", "kernel")?;
    rows.iter().try_for_each(|row| write!(out, "{:<16}", row.series))?;
    write!(out, "\n{:<24}", "")?;
    let release =
        |row: &Row| row.release.as_deref().and_then(|r| r.split("-cloud").next()).map(str::to_owned);
    rows.iter().try_for_each(|row| write!(out, "{:<16}", release(row).unwrap_or_default()))?;
    writeln!(out)?;
    let steps = rows.iter().filter_map(|row| row.run.as_ref().ok()).map(|run| &run.results).next();
    for (at, (step, _)) in steps.into_iter().flatten().enumerate() {
        write!(out, "{:<24}", format!("{} {}", step.function, step.part))?;
        for row in rows {
            let cell = row.run.as_ref().map_or("not run".to_owned(), |run| cell(&run.results[at].1));
            write!(out, "{cell:<16}")?;
        }
        writeln!(out)?;
    }
    write!(out, "{:<24}", "programs loaded")?;
    for row in rows {
        let loaded = |run: &Run| match row.not_loaded()[..] {
            [] => programs::loaded(&run.loads, run.version, run.has_peers).0.to_string(),
            _ => "FAILED".to_owned(),
        };
        write!(out, "{:<16}", row.run.as_ref().map_or("not run".to_owned(), loaded))?;
    }
    writeln!(out)?;
    write!(out, "{:<24}", "in all")?;
    for row in rows {
        let cell = row.run.as_ref().map_or(String::new(), |run| format!("{:.0}s", run.took.as_secs_f32()));
        write!(out, "{cell:<16}")?;
    }
    writeln!(out)?;
    for row in rows {
        write!(out, "{}", notes(row))?;
    }
    print_spent(&mut out, rows)?;
    if !budget.new.is_empty() {
        writeln!(out, "no verifier budget yet (./dev matrix --update-budget): {}", budget.new.join(", "))?;
    }
    for risen in &budget.risen {
        writeln!(out, "verifier budget: {risen}")?;
    }
    Ok(())
}

/// The verifier's figures, program by program.
fn print_spent(out: &mut impl std::io::Write, rows: &[Row]) -> Result<()> {
    let spent = budget::spent(rows);
    let programs: BTreeSet<&String> = spent.keys().map(|(program, _)| program).collect();
    if !programs.is_empty() {
        writeln!(out, "\ninstructions that the verifier processed, states that it kept")?;
    }
    for program in programs {
        write!(out, "{program:<24}")?;
        for row in rows {
            let spent = spent.get(&(program.clone(), row.series.to_string()));
            let cell = spent.map_or("-".to_owned(), |it| format!("{} {}", it.instructions, it.states));
            write!(out, "{cell:<16}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn cell(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Passed { tests: 0, took, .. } => format!("ok {:.1}s", took.as_secs_f32()),
        Outcome::Passed { tests, skipped: 0, took } => format!("{tests} ok {:.1}s", took.as_secs_f32()),
        Outcome::Passed { tests, skipped, took } => {
            format!("{} ok {skipped} - {:.1}s", tests.saturating_sub(*skipped), took.as_secs_f32())
        }
        Outcome::Failed(_) => "FAILED".to_owned(),
        Outcome::TooOld => "too old".to_owned(),
        Outcome::NoPeers => "no peers".to_owned(),
        Outcome::NotRun => "not run".to_owned(),
    }
}

fn notes(row: &Row) -> String {
    let mut text = String::new();
    let series = row.series;
    let run = match &row.run {
        Ok(run) => run,
        Err(error) => return format!("{series}: not run: {error:#}\n"),
    };
    let mut note = |line: String| writeln!(text, "{series}: {line}").expect("memory");
    for (step, outcome) in &run.results {
        if let Outcome::Failed(why) = outcome {
            note(format!("FAILED {} {}: {why}", step.function, step.part));
        }
    }
    if let Some(broken) = &run.broken {
        note(format!("FAILED the guest: {broken}"));
    }
    let refused = run.loads.iter().filter(|load| load.error != 0 && programs::is_ours(load));
    let refused: BTreeSet<_> = refused.map(|load| (&load.program, load.error)).collect();
    for (program, error) in refused {
        note(format!("the verifier refused {program}: {}", std::io::Error::from_raw_os_error(error)));
    }
    for program in row.not_loaded() {
        note(format!("FAILED to load {program}: nothing did, though this kernel should take it"));
    }
    if !row.is_ok() {
        note(format!("what it printed is in {}", run.log.display()));
    }
    text
}
