//! `underpass watch`: every connection of this host, its process and its bytes.
//!
//! Programs in the kernel keep the figures with the sockets (`crates/kernel`);
//! [`programs`] attaches them and reads what they hand out, [`event`] decodes it,
//! [`state`] knows what follows from it, [`output`] tells it.

mod demo;
pub mod event;
mod gateway;
mod names;
pub mod output;
mod place;
mod programs;
mod reverse;
mod screen;
pub mod state;
mod web;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, IsTerminal as _, Write},
    net::IpAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    time::Duration,
};

use anyhow::Context as _;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sched::{CloneFlags, setns};
use ratatui::crossterm::event::{Event as Input, KeyEventKind};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::SignalKind,
};
use underpass_abi::watch::{COMM, Filter};

use self::{
    event::{Event, Missed, Program},
    gateway::Gateway,
    output::Clock,
    programs::Programs,
    reverse::Reverse,
    screen::{Answer, Screen},
    state::State,
    web::Web,
};
use crate::{
    doctor,
    error::{Error, Result},
    hook::Interface,
};

/// Arguments of `underpass watch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// Show, too, what passes through this interface and is not this host's own
    #[arg(long, value_name = "IFACE")]
    interface: Option<String>,
    /// One line per packet of that interface: at most 10,000 a second and CPU, the rest is counted
    #[arg(long, requires = "interface")]
    packets: bool,
    /// How often totals of living connections are read
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Only processes of this name, as the kernel has it: at most 15 bytes
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Only this process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// Only remote addresses of this network: 192.0.2.0/24, 2001:db8::/32, or one address
    #[arg(long, value_name = "CIDR", value_parser = network)]
    remote: Option<Network>,
    /// Only connections with this port on either side
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Ask the resolver for the names of remote addresses that no answer has named
    #[arg(long)]
    reverse: bool,
    /// Leave out connections to the loopback addresses
    #[arg(long)]
    no_loopback: bool,
    #[command(flatten)]
    web: web::Args,
}

/// Addresses with a common beginning.
#[derive(Debug, Clone, Copy)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

fn network(text: &str) -> std::result::Result<Network, String> {
    let (address, prefix) =
        text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().map_err(|_| format!("{address} is no IP address"))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix =
        prefix.map_or(Ok(longest), str::parse).map_err(|_| "a prefix is a number of bits".to_owned())?;
    if prefix > longest {
        return Err(format!("a prefix of {address} has at most {longest} bits"));
    }
    Ok(Network { address, prefix })
}

impl Args {
    fn filter(&self) -> Result<Filter> {
        let mut filter = Filter {
            tgid: self.pid.unwrap_or(0),
            port: self.port.unwrap_or(0),
            no_loopback: u16::from(self.no_loopback),
            ..Filter::default()
        };
        if let Some(name) = &self.process {
            if name.is_empty() {
                return Err(Error::Usage("--process takes a name of at least one byte".to_owned()));
            }
            // The kernel keeps that many bytes, too.
            let kept = &name.as_bytes()[..name.len().min(COMM - 1)];
            filter.comm[..kept.len()].copy_from_slice(kept);
        }
        if let Some(Network { address, prefix }) = self.remote {
            let (bits, prefix) = match address {
                IpAddr::V4(address) => (address.to_ipv6_mapped().to_bits(), prefix + 96),
                IpAddr::V6(address) => (address.to_bits(), prefix),
            };
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            filter.mask = mask.to_be_bytes();
            filter.remote = (bits & mask).to_be_bytes();
        }
        Ok(filter)
    }
}

pub(crate) use demo::scene;

pub(crate) fn run(args: &Args) -> Result<()> {
    let filter = args.filter()?;
    if args.interval < Duration::from_millis(10) {
        return Err(Error::Usage("--interval takes at least 10ms".to_owned()));
    }
    if let Some(name) = &args.interface {
        Interface::find(name)?;
    }
    let web = args.web.prepare()?;
    let programs = Programs::attach(&filter).map_err(|error| Error::Unable(format!("{error:#}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let gateway = args.interface.as_ref().map(|name| Gateway::attach(name, args.packets, filter));
    let gateway = gateway.transpose().map_err(|error| Error::Unable(format!("{error:#}")))?;
    runtime.block_on(Watch::begin(programs, gateway, web, args)?.go())?;
    Ok(())
}

/// What this kernel and these privileges allow: everything is loaded, attached and
/// taken away again.
pub(crate) fn doctor() -> doctor::Function {
    let mut checks = vec![];
    let mut missing = vec![];
    match Programs::attach(&Filter::default()) {
        Ok(mut programs) => {
            let detail = "loaded and attached: state changes, iterators".to_owned();
            checks.push(doctor::Check { name: "programs".to_owned(), ok: true, detail });
            let read = programs.tcp(false).and_then(|_| programs.seed_files());
            let detail = read.as_ref().map_or_else(|error| format!("{error:#}"), |()| "readable".to_owned());
            checks.push(doctor::Check {
                name: "sockets and open files".to_owned(),
                ok: read.is_ok(),
                detail,
            });
            missing.append(&mut programs.missing);
        }
        Err(error) => {
            let detail = format!("{error:#}");
            missing
                .push(format!("{detail}; watch takes Linux 5.12 or newer with BTF, CAP_BPF and CAP_PERFMON"));
            checks.push(doctor::Check { name: "programs".to_owned(), ok: false, detail });
        }
    }
    doctor::Function { name: "watch", works: checks.iter().all(|check| check.ok), missing, checks }
}

/// The one task: drains the ring, asks for totals, tells.
struct Watch<'a> {
    terminal: Option<Terminal>,
    programs: Programs,
    gateway: Option<Gateway>,
    reverse: Option<Reverse>,
    web: Option<Web>,
    state: State,
    args: &'a Args,
    clock: Clock,
    missed: Missed,
}

/// How often the ring is looked into where nothing fills it.
const DRAIN: Duration = Duration::from_millis(200);

impl<'a> Watch<'a> {
    fn begin(
        programs: Programs,
        gateway: Option<Gateway>,
        web: Option<web::Ready>,
        args: &'a Args,
    ) -> Result<Self> {
        let missed = programs.missed()?;
        let mut watch = Self {
            terminal: None,
            programs,
            gateway,
            reverse: args.reverse.then(Reverse::start),
            web: None,
            state: State::default(),
            args,
            clock: Clock::now(),
            missed,
        };
        for missing in &watch.programs.missing {
            tell(format_args!("missing: {missing}"));
        }
        watch.seed()?;
        go_first();
        drop_capabilities()?;
        // Its thread has no more rights than this one, and gives up its precedence.
        if let Some(web) = web {
            let missing = watch.programs.missing.clone();
            watch.web = Some(web.start(watch.clock, args.interval, missing, args.interface.clone())?);
        }
        Ok(watch)
    }

    /// Takes stock of what is open already.
    fn seed(&mut self) -> Result<()> {
        self.programs.seed_files()?;
        for namespace in namespaces() {
            // On a thread of its own, which ends in that namespace. A namespace may be
            // gone by now, or out of reach without CAP_SYS_ADMIN; the open files above
            // have told of all sockets but the kernel's own.
            std::thread::scope(|scope| {
                let programs = &self.programs;
                let seeded = scope.spawn(move || {
                    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                    programs.seed_tcp()
                });
                drop(seeded.join());
            });
        }
        let open = self.programs.tcp(false)?.into_iter().chain(self.programs.flows(false)?);
        let open: Vec<_> = open.collect();
        let now = output::boot_time();
        let pids: HashSet<_> = open.iter().map(|report| report.owner.tgid).filter(|pid| *pid != 0).collect();
        for pid in pids {
            if let Some(program) = program(pid) {
                self.state.apply(Event::Process(program), now);
            }
        }
        for report in open {
            self.state.apply(Event::Alive(report), now);
        }
        Ok(())
    }

    async fn go(mut self) -> anyhow::Result<()> {
        let ring = self.programs.events.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned, and nobody closes or replaces it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
        let mut drain = tokio::time::interval(DRAIN.min(self.args.interval));
        let mut interval = tokio::time::interval(self.args.interval);
        let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
        let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
        for timer in [&mut drain, &mut interval] {
            timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        if !self.args.json && io::stdout().is_terminal() && io::stdin().is_terminal() {
            let page = self.web.iter().map(|web| format!("the page is at {}", web.url));
            let missing = self.programs.missing.iter().map(|missing| format!("missing: {missing}"));
            self.terminal = Some(Terminal::open(page.chain(missing).collect()));
        } else {
            if let Some(web) = &self.web {
                tell(format_args!("the page is at {}", web.url));
            }
            tell(format_args!("watching"));
        }
        loop {
            let goes_on = tokio::select! {
                guard = ring.readable() => {
                    guard?.clear_ready();
                    self.drain()?
                }
                _ = drain.tick() => self.drain()?,
                _ = interval.tick() => self.look()?,
                input = next(&mut self.terminal) => self.input(input)?,
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
            };
            if !goes_on {
                break;
            }
        }
        // The terminal is given back before anything else is written.
        self.terminal = None;
        if !self.look()? {
            return Ok(());
        }
        let (totals, lost) = (self.state.totals(), self.state.lost());
        tell(format_args!(
            "{} connections seen, {} of them ended; lost: {}",
            totals.connections,
            totals.ended,
            output::lost_text(lost)
        ));
        Ok(())
    }

    /// Takes in what the ring holds. `false` once nobody reads the output any more.
    fn drain(&mut self) -> anyhow::Result<bool> {
        let now = output::boot_time();
        while let Some(record) = self.programs.events.next() {
            match Event::decode(&record) {
                Some(event) => self.state.apply(event, now),
                None => self.state.undecoded(),
            }
        }
        self.print()
    }

    /// Takes in the totals of what is alive.
    fn look(&mut self) -> anyhow::Result<bool> {
        self.drain()?;
        let missed = self.programs.missed()?;
        // What was missed may have been the end of a connection: then look at all.
        let everything = missed != self.missed;
        self.missed = missed;
        let now = output::boot_time();
        let (passages, packets) = self.look_at_gateway(now)?;
        self.state.apply(Event::Lost(Missed { passages, packets, ..missed }), now);
        for report in self.programs.tcp(everything)?.into_iter().chain(self.programs.flows(everything)?) {
            self.state.apply(Event::Alive(report), now);
        }
        if everything {
            self.state.apply(Event::Swept, now);
        }
        self.state.apply(Event::FlowsRead, now);
        for flow in self.state.take_forgotten() {
            if !self.gateway.as_mut().is_some_and(|gateway| gateway.forget(&flow)) {
                self.programs.forget(&flow);
            }
        }
        if let Some(reverse) = &mut self.reverse {
            let unnamed = self.state.open().filter(|(_, open)| open.view.remote_name.is_none());
            reverse.ask(unnamed.map(|(_, open)| open.view.report.remote));
            for (address, name) in reverse.answers() {
                self.state.apply(Event::Name { address, name, lives: reverse::LIVES }, now);
            }
        }
        self.state.tick(now);
        self.draw()?;
        let goes_on = self.print()?;
        if let Some(web) = &self.web {
            web.look(&self.state)?;
        }
        Ok(goes_on)
    }

    /// Takes in what has passed, and says how many flows and packets were missed.
    fn look_at_gateway(&mut self, now: u64) -> anyhow::Result<(u64, u64)> {
        let Some(gateway) = &mut self.gateway else { return Ok((0, 0)) };
        let (flows, evicted) = gateway.flows()?;
        for report in flows {
            self.state.apply(Event::Alive(report), now);
        }
        Ok((evicted, gateway.untold()?))
    }

    /// Takes what came from the keyboard. `false` to end.
    fn input(&mut self, input: Option<Input>) -> anyhow::Result<bool> {
        let Some(terminal) = &mut self.terminal else { return Ok(true) };
        let leaves = match input {
            None => true,
            Some(Input::Key(key)) if key.kind == KeyEventKind::Press => {
                terminal.screen.press(key) == Answer::Leave
            }
            Some(_) => false,
        };
        if !leaves {
            self.draw()?;
        }
        Ok(!leaves)
    }

    fn draw(&mut self) -> anyhow::Result<()> {
        if let Some(Terminal { terminal, screen, .. }) = &mut self.terminal {
            terminal.draw(|frame| screen.draw(frame, &self.state)).context("cannot draw")?;
        }
        Ok(())
    }

    fn print(&mut self) -> anyhow::Result<bool> {
        let lines = self.state.take_lines();
        if let Some(web) = &self.web {
            web.told(&lines);
        }
        let packets = self.gateway.as_mut().map(Gateway::packets).unwrap_or_default();
        if self.terminal.is_some() || (lines.is_empty() && packets.is_empty()) {
            return Ok(true);
        }
        let mut out = Out::new();
        let written = lines
            .iter()
            .try_for_each(|line| {
                match self.args.json {
                    true => output::json(&mut out.bytes, line, self.clock),
                    false => output::text(&mut out.bytes, line, self.clock)?,
                }
                out.flush_if_full()
            })
            .and_then(|()| {
                packets.iter().try_for_each(|note| {
                    output::packet(&mut out.bytes, note, self.args.json, self.clock)?;
                    out.flush_if_full()
                })
            })
            .and_then(|()| out.flush());
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            written => written.map(|()| true).context("cannot write"),
        }
    }
}

/// Whole lines on their way to standard output.
struct Out {
    bytes: Vec<u8>,
    to: io::StdoutLock<'static>,
}

impl Out {
    /// How many bytes go out at a time.
    const FULL: usize = 64 << 10;

    fn new() -> Self {
        Self { bytes: Vec::with_capacity(Self::FULL), to: io::stdout().lock() }
    }

    fn flush_if_full(&mut self) -> io::Result<()> {
        if self.bytes.len() < Self::FULL - 4096 { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.write_all(&self.bytes)?;
        self.bytes.clear();
        // What looks for the end of the last line finds it here.
        self.to.flush()
    }
}

/// The terminal in full-screen mode, until it is dropped.
struct Terminal {
    terminal: ratatui::DefaultTerminal,
    screen: Screen,
    input: tokio::sync::mpsc::Receiver<Input>,
}

impl Terminal {
    fn open(notes: Vec<String>) -> Self {
        let (sender, input) = tokio::sync::mpsc::channel(16);
        // Reading blocks; the thread ends with the process, or with the receiver.
        std::thread::spawn(move || {
            while let Ok(event) = ratatui::crossterm::event::read() {
                if sender.blocking_send(event).is_err() {
                    break;
                }
            }
        });
        Self { terminal: ratatui::init(), screen: Screen::new(notes), input }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// The next input, never where there is no full screen.
async fn next(terminal: &mut Option<Terminal>) -> Option<Input> {
    match terminal {
        Some(terminal) => terminal.input.recv().await,
        None => std::future::pending().await,
    }
}

/// A note for people beside the lines.
fn tell(what: std::fmt::Arguments<'_>) {
    // Nothing is left to be done if stderr is closed.
    let _ = writeln!(io::stderr(), "underpass watch: {what}");
}

/// Lets this thread run before others, where it may (CAP_SYS_NICE): among hundreds of
/// busy threads it would come too late to empty the ring, though it needs little.
fn go_first() {
    // Without the right to it losses are likelier, and counted as ever.
    let _ = nice(-20);
}

/// Sets the calling thread's priority, -20 to 19 (setpriority(2), of a thread on Linux).
fn nice(value: i32) -> io::Result<()> {
    // SAFETY: a system call with integers.
    let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives up every capability but CAP_BPF, which older kernels ask for at each use of
/// a map.
fn drop_capabilities() -> Result<()> {
    let keep = CapsHashSet::from_iter([Capability::CAP_BPF]);
    let has = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let keep: CapsHashSet = has.intersection(&keep).copied().collect();
    caps::clear(None, CapSet::Inheritable).context("cannot give up capabilities")?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &keep).context("cannot give up capabilities")?;
    }
    Ok(())
}

/// The network namespaces that any process is in, each once.
fn namespaces() -> Vec<File> {
    let mut seen = HashSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(|entry| File::open(entry.path().join("ns/net")).ok())
        .filter(|namespace| namespace.metadata().is_ok_and(|metadata| seen.insert(metadata.ino())))
        .collect()
}

/// What a living process runs, from procfs.
fn program(pid: u32) -> Option<Program> {
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let cgroup_path = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("");
    let exe = fs::read_link(format!("/proc/{pid}/exe"));
    Some(Program {
        pid,
        exe: exe.map(|exe| exe.to_string_lossy().into_owned()).unwrap_or_default(),
        cgroup: 0,
        cgroup_path: if cgroup_path == "/" { String::new() } else { cgroup_path.to_owned() },
    })
}
