//! The guest's first process: prepares what tests expect of a Linux system, runs the
//! steps, reports, and switches the machine off.

use std::{
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, alarm},
};

use crate::{
    plan::{Load, MARKER, PLAN, Plan, Report},
    verifier,
};

/// The word that makes this binary [`exec`] a step.
pub const EXEC: &str = "__exec";

/// Does what the plan says and ends the machine.
pub fn main() -> ! {
    if let Err(error) = run() {
        report(&Report::Failed { error: format!("{error:#}") });
    }
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Err(error) => panic!("the machine does not switch off: {error}"),
        Ok(never) => match never {},
    }
}

fn run() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        fs::create_dir_all(at).with_context(|| at.to_owned())?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} at {at}"))?;
    }
    // Of the initial file system, which is in memory: what was built may lie below them.
    for (at, mode) in [("/tmp", 0o1777), ("/run", 0o755)] {
        fs::create_dir_all(at).with_context(|| at.to_owned())?;
        fs::set_permissions(at, Permissions::from_mode(mode)).with_context(|| at.to_owned())?;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    report(&Report::Started { release });
    let plan: Plan = serde_json::from_str(&fs::read_to_string(PLAN)?)?;
    for module in &plan.modules {
        let file = File::open(module).with_context(|| module.clone())?;
        finit_module(file, c"", ModuleInitFlags::empty()).with_context(|| format!("cannot load {module}"))?;
    }
    loopback_up()?;
    // What service managers and distributions allow; the kernel's own limit of 64 KiB
    // is met by nobody but a first process.
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 << 20, 8 << 20)?;
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288)?;
    look_at_the_clock_on_alarm()?;
    for (step, command) in plan.steps.iter().enumerate() {
        report(&Report::Begun { step });
        let begun = Instant::now();
        let until = begun + Duration::from_secs(command.seconds.into());
        alarm::set(command.seconds + 1);
        let mut loads = Vec::new();
        let status = run_step(&command.argv, until, |load| loads.push(load))?;
        alarm::cancel();
        // Now: in between they would cut the lines that the step prints.
        for load in loads {
            report(&Report::Loaded(load));
        }
        report(&Report::Ended { step, status, milliseconds: begun.elapsed().as_millis() as u64 });
    }
    report(&Report::Done);
    Ok(())
}

fn run_step(argv: &[String], until: Instant, loaded: impl FnMut(Load)) -> Result<i32> {
    let child = Command::new("/proc/self/exe").arg(EXEC).args(argv).spawn()?;
    let pid = Pid::from_raw(child.id() as i32);
    let WaitStatus::Stopped(..) = waitpid(pid, Some(WaitPidFlag::WUNTRACED))? else {
        bail!("the step did not start");
    };
    verifier::follow(pid, until, loaded)
}

/// Waits until somebody follows this process, and becomes the command.
///
/// # Errors
/// Where there is no such command.
pub fn exec(command: &[String]) -> Result<ExitCode> {
    let [program, arguments @ ..] = command else { bail!("no command") };
    raise(Signal::SIGSTOP)?;
    verifier::stop_at_loads()?;
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs([("HOME", "/"), ("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("RUST_BACKTRACE", "0")])
        // Else it would ask cargo where the snapshots are.
        .envs(Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|root| ("INSTA_WORKSPACE_ROOT", root)))
        .exec();
    Err(error).with_context(|| format!("cannot start {program}"))
}

fn report(report: &Report) {
    let line = serde_json::to_string(report).expect("a report is text");
    let mut out = std::io::stdout().lock();
    // A line of its own, whatever was printed before.
    let _ = writeln!(out, "\n{MARKER}{line}").and_then(|()| out.flush());
}

/// The alarm interrupts a wait, which then looks at the clock.
fn look_at_the_clock_on_alarm() -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    Ok(())
}

fn loopback_up() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: (libc::IFF_UP | libc::IFF_RUNNING) as i16 },
    };
    request.ifr_name[0] = b'l' as _;
    request.ifr_name[1] = b'o' as _;
    // SAFETY: SIOCSIFFLAGS reads an ifreq with a name and flags.
    let result = unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS as _, &raw const request)
    };
    nix::errno::Errno::result(result).context("cannot set lo up")?;
    Ok(())
}
