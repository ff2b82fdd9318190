//! `./dev matrix`: underpass and its tests on real kernels, in virtual machines.
//!
//! - `suite`: what is run, function by function, and from which kernel on;
//! - `kernels`: finds, fetches and keeps the kernels;
//! - `image`: builds the tests as static binaries and packs them for a guest;
//! - `peers`: this system's programs that tests start, packed as well;
//! - `machine`: boots a guest and reads its reports;
//! - `guest`: the same binary as the guest's first process: runs the steps;
//! - `verifier`: what the verifier spent on each program that a step loads;
//! - `budget`: the file that remembers it;
//! - `programs`: those that there are, and which of them a kernel has to take;
//! - `table`: what is shown in the end.

mod budget;
mod guest;
mod image;
mod kernels;
mod machine;
mod peers;
mod plan;
mod programs;
mod suite;
mod table;
mod verifier;

use std::{
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Result, ensure};
use clap::Parser;

use crate::{
    image::Target,
    kernels::{Kernel, Series},
    table::Row,
};

/// Runs underpass and its tests on real kernels in virtual machines.
#[derive(Debug, Parser)]
#[command(name = "./dev matrix", bin_name = "./dev matrix")]
struct Args {
    /// The functions to test (default: all)
    functions: Vec<String>,
    /// A kernel to boot, such as 6.12 or 6.12-arm64 (default: all of them)
    #[arg(long = "kernel", value_name = "SERIES", value_delimiter = ',')]
    kernels: Vec<Series>,
    /// Leave out what is slow in a virtual machine, as `./dev test` does
    #[arg(long)]
    quick: bool,
    /// So many guests side by side, each with 1 GiB of memory
    #[arg(long, value_name = "N", default_value = "2")]
    guests: NonZeroUsize,
    /// Look for newer kernels, instead of taking what was fetched before
    #[arg(long)]
    refresh: bool,
    /// Take what the verifier spends now for what it may spend
    #[arg(long)]
    update_budget: bool,
    /// Print what the guests print as well
    #[arg(long)]
    verbose: bool,
    /// Where kernels, images and logs are kept
    #[arg(long, default_value = "target/kernels", hide = true)]
    cache: PathBuf,
}

fn main() -> Result<ExitCode> {
    if std::process::id() == 1 {
        guest::main();
    }
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, word, command @ ..] = &arguments[..]
        && word == guest::EXEC
    {
        return guest::exec(command);
    }
    run(&Args::parse())
}

fn run(args: &Args) -> Result<ExitCode> {
    for function in &args.functions {
        ensure!(
            suite::FUNCTIONS.contains(&function.as_str()),
            "no function {function:?} in the matrix; there are {}",
            suite::FUNCTIONS.join(", ")
        );
    }
    std::fs::create_dir_all(&args.cache)?;
    let cache = args.cache.canonicalize()?;
    let series = if args.kernels.is_empty() { kernels::ALL.to_vec() } else { args.kernels.clone() };
    let mut store = kernels::Store::open(&cache, args.refresh)?;
    let mut images = image::Images::default();
    let mut guests = Vec::new();
    for series in series {
        let found = store.get(series).and_then(|kernel| Ok((kernel, Target::find(series.arch)?)));
        if let Ok((_, target)) = &found {
            images.build(*target, &cache)?;
        }
        guests.push((series, found));
    }
    let steps = suite::steps(&args.functions, args.quick);
    let loads_all = suite::loads_all(&args.functions);
    let boot = |(series, found): (Series, Result<(Kernel, Target)>)| -> Result<Row> {
        let row = match found {
            Ok((kernel, target)) => {
                eprintln!("== booting {series}: {}", kernel.release);
                let run = machine::boot(&kernel, images.get(target), &steps, &cache, args.verbose)?;
                Row { series, release: Some(kernel.release), run: Ok(run), loads_all }
            }
            Err(error) => Row { series, release: None, run: Err(error), loads_all },
        };
        eprint!("{}", table::row(&row));
        Ok(row)
    };
    let rows = side_by_side(args.guests.get(), guests, boot)?;
    let budget = budget::check(&rows, args.update_budget)?;
    table::print(&rows, &budget)?;
    let ok = budget.risen.is_empty() && rows.iter().all(Row::is_ok);
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Does the work for each item, so many at a time; gives what came of each, in the same order.
fn side_by_side<T: Send, R: Send>(
    count: usize,
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let items = Mutex::new(items.into_iter().enumerate());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                while let Some((at, item)) = next() {
                    let result = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}
