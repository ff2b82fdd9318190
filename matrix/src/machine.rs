//! Boots a kernel in a virtual machine and reads what the guest reports.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    image::{self, Image},
    kernels::{Arch, Kernel},
    plan::{Load, MARKER, Plan, Report},
    suite::Step,
};

/// A guard against a guest that hangs; what the steps may take comes on top.
const TO_BOOT: Duration = Duration::from_mins(2);

/// What came of a kernel.
#[derive(Debug)]
pub struct Run {
    /// From the start of the machine to its end.
    pub took: Duration,
    /// In the order in which they ran.
    pub results: Vec<(Step, Outcome)>,
    /// Programs that were loaded, with what the verifier spent.
    pub loads: Vec<Load>,
    /// Major and minor of the kernel.
    pub version: (u32, u32),
    /// This system's programs are in it.
    pub has_peers: bool,
    /// Why there is nothing more, if the guest did not come to its end.
    pub broken: Option<String>,
    /// Everything that the guest printed.
    pub log: PathBuf,
}

/// What came of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with 0, and if it runs tests there were some.
    Passed {
        /// How many tests passed.
        tests: u32,
        /// How many of them say that this kernel lacks what they need.
        skipped: u32,
        /// In the guest.
        took: Duration,
    },
    /// It did not.
    Failed(String),
    /// The kernel is older than what this needs.
    TooOld,
    /// The guest is another machine than this system, whose programs it would need.
    NoPeers,
    /// It was not started.
    NotRun,
}

/// Runs the steps in a machine with this kernel.
///
/// # Errors
/// Where no machine can be started.
pub fn boot(kernel: &Kernel, image: &Image, steps: &[Step], cache: &Path, verbose: bool) -> Result<Run> {
    let version = kernel.version()?;
    let name = kernel.series.to_string();
    let mut results: Vec<(Step, Outcome)> = Vec::new();
    let mut plan = Plan { modules: Vec::new(), steps: Vec::new() };
    let mut places = Vec::new();
    for step in steps {
        let outcome = match () {
            () if step.since > version => Outcome::TooOld,
            () if !step.is_possible(image.has_peers) => Outcome::NoPeers,
            () => Outcome::NotRun,
        };
        if outcome == Outcome::NotRun {
            let what = || format!("{} {} was not built", step.function, step.part);
            let command = step.command(image).with_context(what)?;
            plan.steps.push(command);
            places.push(results.len());
        }
        results.push((step.clone(), outcome));
    }
    let modules = kernel.modules();
    for module in &modules {
        let file = module.file_name().context("a module has a name")?;
        plan.modules.push(format!("/modules/{}", file.display()));
    }
    let initrd = cache.join(format!("{name}.initrd"));
    image::pack(&modules, &serde_json::to_string(&plan)?, &image.archive, &initrd)?;
    let patience = TO_BOOT + Duration::from_secs(plan.steps.iter().map(|step| u64::from(step.seconds)).sum());

    let log = cache.join(format!("{name}.log"));
    let mut guest = Guest { steps, places, results, loads: Vec::new(), end: End::Silent, step: None };
    let begun = Instant::now();
    for attempt in ["", " again"] {
        let file = File::create(&log)?;
        run(qemu(kernel, &initrd), &mut guest, file, patience, verbose)?;
        // The machine, not what is tested: it may be tried once more.
        if !matches!(guest.end, End::Silent) {
            break;
        }
        eprintln!("== {name}: the guest did not start{attempt}");
    }
    fs::remove_file(&initrd)?;
    let broken = match guest.end {
        End::Done => None,
        End::Silent => Some("it did not start".to_owned()),
        End::Started => Some("it ended early: a panic, or too slow".to_owned()),
        End::Failed(error) => Some(error),
    };
    Ok(Run {
        took: begun.elapsed(),
        results: guest.results,
        loads: guest.loads,
        version,
        has_peers: image.has_peers,
        broken,
        log,
    })
}

/// What a guest has said so far.
struct Guest<'a> {
    steps: &'a [Step],
    /// From a step's number in the plan to that in the results.
    places: Vec<usize>,
    results: Vec<(Step, Outcome)>,
    loads: Vec<Load>,
    end: End,
    step: Option<Output>,
}

enum End {
    Silent,
    Started,
    Done,
    Failed(String),
}

/// What a step's output says about its tests.
#[derive(Default)]
struct Output {
    passed: u32,
    skipped: u32,
    failed: Vec<String>,
}

impl Guest<'_> {
    fn report(&mut self, report: Report) {
        match report {
            Report::Started { .. } => self.end = End::Started,
            Report::Begun { .. } => self.step = Some(Output::default()),
            Report::Loaded(load) => self.loads.push(load),
            Report::Ended { step, status, milliseconds } => {
                let place = self.places[step];
                let output = self.step.take().unwrap_or_default();
                let took = Duration::from_millis(milliseconds);
                self.results[place].1 = output.outcome(status, took, &self.steps[place]);
            }
            Report::Failed { error } => self.end = End::Failed(error),
            Report::Done => self.end = End::Done,
        }
    }

    fn line(&mut self, line: &str) {
        let Some(output) = &mut self.step else { return };
        if let Some(counts) = line.strip_prefix("test result: ") {
            let passed = counts.split_whitespace().nth(1).and_then(|count| count.parse().ok());
            output.passed += passed.unwrap_or(0);
        } else if line.starts_with("skipped: ") {
            output.skipped += 1;
        } else if let Some(test) =
            line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED"))
        {
            output.failed.push(test.to_owned());
        }
    }
}

impl Output {
    fn outcome(self, status: i32, took: Duration, step: &Step) -> Outcome {
        match status {
            _ if step.is_success(status) && step.is_tests() && self.passed == 0 => {
                Outcome::Failed("no test ran".to_owned())
            }
            _ if step.is_success(status) => {
                Outcome::Passed { tests: self.passed, skipped: self.skipped, took }
            }
            137 => Outcome::Failed("killed: too slow, or out of memory".to_owned()),
            _ if self.failed.is_empty() => Outcome::Failed(format!("exit status {status}")),
            _ => Outcome::Failed(self.failed.join(", ")),
        }
    }
}

fn run(
    mut command: Command,
    guest: &mut Guest<'_>,
    mut log: File,
    patience: Duration,
    verbose: bool,
) -> Result<()> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let program = command.get_program().display().to_string();
    let mut machine =
        Machine(child.with_context(|| format!("cannot start {program}; run ./dev setup matrix"))?);
    let mut console = BufReader::new(machine.0.stdout.take().context("a pipe")?);
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut line = Vec::new();
        // Until the machine has ended, or nobody listens any more.
        while console.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    let begun = Instant::now();
    let until = begun + patience;
    while let Ok(line) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
        writeln!(log, "{:7.2} {line}", begun.elapsed().as_secs_f32())?;
        if verbose {
            eprintln!("   {line}");
        }
        match line.split_once(MARKER) {
            Some((_, report)) => match serde_json::from_str(report) {
                Ok(report) => guest.report(report),
                Err(error) => bail!("a report that is none: {report}: {error}"),
            },
            None => guest.line(&line),
        }
    }
    Ok(())
}

/// Ends with this.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Emulated: correctness is what counts here, and it works where no virtual machines are allowed.
fn qemu(kernel: &Kernel, initrd: &Path) -> Command {
    let (program, machine, console) = match kernel.series.arch {
        Arch::Amd64 => ("qemu-system-x86_64", ["-machine", "q35", "-cpu", "max"], "ttyS0"),
        Arch::Arm64 => ("qemu-system-aarch64", ["-machine", "virt", "-cpu", "cortex-a72"], "ttyAMA0"),
    };
    let mut command = Command::new(program);
    command.args(machine).args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(initrd);
    command.arg("-append").arg(format!("console={console} quiet loglevel=3 panic=-1"));
    // SAFETY: one system call, in the child, which has nothing of this process to break.
    unsafe {
        // Whoever kills this process means the machine as well.
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_passes_that_ran_no_test() {
        let steps = crate::suite::steps(&["lab".to_owned()], false);
        let outcome = |output: Output, status| output.outcome(status, Duration::ZERO, &steps[0]);
        assert_eq!(outcome(Output::default(), 0), Outcome::Failed("no test ran".to_owned()));
        let some = Output { passed: 2, skipped: 1, failed: vec![] };
        assert_eq!(outcome(some, 0), Outcome::Passed { tests: 2, skipped: 1, took: Duration::ZERO });
        let bad = Output { passed: 2, skipped: 0, failed: vec!["lab::a".to_owned()] };
        assert_eq!(outcome(bad, 101), Outcome::Failed("lab::a".to_owned()));
    }
}
