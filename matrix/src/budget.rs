//! What the verifier may spend on each program, kernel by kernel: kept in a file, so
//! that a rise is seen before a kernel refuses a program as too complex.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{plan::Spent, programs::is_ours, table::Row};

const FILE: &str = "matrix/verifier-budget.txt";
const HEAD: &str = "# What the verifier spent on each program: `./dev matrix --update-budget` writes this.\n\
                    # A rise of either figure by more than 20 % fails `./dev matrix`.\n\
                    # program         kernel      instructions   states\n";

/// By program and kernel.
pub type Figures = BTreeMap<(String, String), Spent>;

/// What came of the comparison.
#[derive(Debug, Default)]
pub struct Budget {
    /// Programs on which the verifier spent over 20 % more, with the figures.
    pub risen: Vec<String>,
    /// What the file does not know yet.
    pub new: Vec<String>,
}

/// Compares what was spent with the file, or takes it over.
///
/// # Errors
/// Where the file cannot be read or written.
pub fn check(rows: &[Row], update: bool) -> Result<Budget> {
    let path = Path::new(FILE);
    let mut known = if path.exists() { parse(&fs::read_to_string(path)?)? } else { Figures::new() };
    let now = spent(rows);
    if update {
        known.extend(now);
        fs::write(path, print(&known)).with_context(|| format!("cannot write {FILE}"))?;
        return Ok(Budget::default());
    }
    Ok(compare(&known, &now))
}

/// The most that was spent on each program: one loads with other constants than another.
pub fn spent(rows: &[Row]) -> Figures {
    let mut figures = Figures::new();
    for row in rows {
        let Ok(run) = &row.run else { continue };
        for load in run.loads.iter().filter(|load| load.error == 0 && is_ours(load)) {
            let Some(spent) = load.spent else { continue };
            let most = figures.entry((load.program.clone(), row.series.to_string())).or_insert(spent);
            most.instructions = most.instructions.max(spent.instructions);
            most.states = most.states.max(spent.states);
        }
    }
    figures
}

fn compare(known: &Figures, now: &Figures) -> Budget {
    let mut budget = Budget::default();
    for ((program, kernel), spent) in now {
        let Some(before) = known.get(&(program.clone(), kernel.clone())) else {
            budget.new.push(format!("{program} on {kernel}"));
            continue;
        };
        for (what, before, now) in [
            ("instructions", before.instructions, spent.instructions),
            ("states", before.states, spent.states),
        ] {
            if now * 10 > before * 12 {
                budget.risen.push(format!("{program} on {kernel}: {now} {what}, {before} before"));
            }
        }
    }
    budget
}

fn parse(text: &str) -> Result<Figures> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| entry(line).with_context(|| format!("{FILE}: {line:?}"))).collect()
}

fn entry(line: &str) -> Option<((String, String), Spent)> {
    let mut words = line.split_whitespace();
    let key = (words.next()?.to_owned(), words.next()?.to_owned());
    Some((key, Spent { instructions: words.next()?.parse().ok()?, states: words.next()?.parse().ok()? }))
}

fn print(figures: &Figures) -> String {
    let mut text = HEAD.to_owned();
    for ((program, kernel), Spent { instructions, states }) in figures {
        writeln!(text, "{program:<17} {kernel:<11} {instructions:>12} {states:>8}").expect("memory");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(instructions: u64, states: u64) -> Figures {
        [(("relay_verdict".to_owned(), "6.12".to_owned()), Spent { instructions, states })].into()
    }

    #[test]
    fn a_rise_over_a_fifth_is_seen() {
        let known = figures(1000, 100);
        assert!(compare(&known, &figures(1200, 120)).risen.is_empty());
        assert_eq!(
            compare(&known, &figures(1201, 10)).risen,
            ["relay_verdict on 6.12: 1201 instructions, 1000 before"]
        );
        assert_eq!(
            compare(&known, &figures(10, 121)).risen,
            ["relay_verdict on 6.12: 121 states, 100 before"]
        );
        assert_eq!(compare(&Figures::new(), &known).new, ["relay_verdict on 6.12"]);
    }

    #[test]
    fn the_file_says_what_was_spent() {
        let known = figures(1000, 100);
        assert_eq!(parse(&print(&known)).unwrap(), known);
    }
}
