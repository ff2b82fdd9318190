//! `./dev bench watch`: what watching costs those who are watched, and the watcher.
//! The load runs on loopback and over a veth pair between two private network
//! namespaces; the watchers see the whole host, as they do in earnest.

use std::{
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use underpass::lab::Namespace;

use crate::{
    load::{Clients, Server},
    report::{Args, Measure, Report, Table, rounds, say},
};

/// Who watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watcher {
    Nobody,
    Underpass,
    /// One event per packet from TC, in the manner of the project's ancestor.
    PerPacket,
    Bpftrace,
    Tcplife,
}

impl fmt::Display for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "unwatched",
            Self::Underpass => "underpass watch",
            Self::PerPacket => "underpass watch --packets (TC)",
            Self::Bpftrace => "bpftrace, the same tracepoint",
            Self::Tcplife => "tcplife (libbpf-tools)",
        })
    }
}

const BULK_LO: &str = "loopback, Gbit/s";
const BULK_VETH: &str = "veth, Gbit/s";
const PING: &str = "64 B there and back, veth, p50 us";
const SHORT: &str = "connections/s, 16 at a time, veth";
const SHORT_LO: &str = "connections/s, 16 at a time, loopback";
const CPU_SHORT: &str = "watcher's CPU us a connection";
const CPU_BULK: &str = "watcher's CPU ms a second of bulk";
const IDLE: [usize; 3] = [0, 1000, 10_000];

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

pub fn run(args: &Args) -> Result<()> {
    // 10,000 connections have both their ends in this process.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    let mut bench = Bench::new(args)?;
    let watchers: Vec<_> =
        [Watcher::Nobody, Watcher::Underpass, Watcher::PerPacket, Watcher::Bpftrace, Watcher::Tcplife]
            .into_iter()
            .filter(|watcher| watcher.is_there())
            .collect();
    rounds(if args.quick { 2 } else { 7 }, &watchers, |watcher| bench.load(*watcher))?;
    say("open connections");
    bench.open()?;
    bench.report(args)
}

struct Bench {
    client: Namespace,
    server: Namespace,
    time: Duration,
    cost: Table,
    own: Table,
    open: Table,
}

impl Bench {
    fn new(args: &Args) -> Result<Self> {
        let (client, server) = (Namespace::new()?, Namespace::new()?);
        client.join("server", &server, "client")?;
        client.address("server", CLIENT, 24)?;
        server.address("client", SERVER, 24)?;
        for namespace in [&client, &server] {
            namespace.enter(|| {
                fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535")?;
                fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")
            })?;
        }
        let cost = [
            Measure::higher(BULK_LO),
            Measure::higher(BULK_VETH),
            Measure::lower(PING),
            Measure::higher(SHORT),
            Measure::higher(SHORT_LO),
        ];
        let open = IDLE.map(|n| Measure::lower(format!("{n} open, CPU ms a second")));
        let memory = IDLE.map(|n| Measure::lower(format!("{n} open, resident MiB")));
        Ok(Self {
            client,
            server,
            time: Duration::from_millis(if args.quick { 700 } else { 1500 }),
            cost: Table::new(
                "What is watched",
                "One stream as fast as it goes, one exchange after the other, and short connections (connect, \
                 64 bytes each way, close) of which both ends are watched.",
                cost.to_vec(),
            )
            .base(Watcher::Nobody.to_string()),
            own: Table::new(
                "The watcher",
                "User and system time of the watcher's process alone, while the load above runs. Output goes to \
                 /dev/null.",
                vec![Measure::lower(CPU_SHORT), Measure::lower(CPU_BULK)],
            ),
            open: Table::new(
                "Open connections",
                "`underpass watch --json` beside connections that rest; both ends of each are watched.",
                open.into_iter().chain(memory).collect(),
            ),
        })
    }

    fn load(&mut self, watcher: Watcher) -> Result<()> {
        let row = watcher.to_string();
        let running = Running::start(watcher, &self.client)?;
        let at = SocketAddr::from((SERVER, 5001));
        let lo = SocketAddr::from((Ipv4Addr::LOCALHOST, 5002));
        let far = Server::start(&self.server, at, None)?;
        let near = Server::start(&self.client, lo, None)?;
        let over_veth = Clients { namespace: &self.client, to: at, cpu: None };
        let over_lo = Clients { namespace: &self.client, to: lo, cpu: None };

        let before = running.cpu()?;
        self.cost.add(&row, BULK_LO, over_lo.bulk(&near, 1, self.time)?.gbit_per_s);
        self.cost.add(&row, BULK_VETH, over_veth.bulk(&far, 1, self.time)?.gbit_per_s);
        let bulk_cpu = (running.cpu()? - before) / (2.0 * self.time.as_secs_f64());
        let times = over_veth.ping_pong(64, self.time)?;
        self.cost.add(&row, PING, crate::report::percentile(&times, 0.5).context("no exchange")?);
        let before = running.cpu()?;
        let veth = over_veth.short(16, self.time)?;
        let loopback = over_lo.short(16, self.time)?;
        // What is still in the ring belongs to it.
        thread::sleep(Duration::from_millis(300));
        let connections = (veth + loopback) * self.time.as_secs_f64();
        self.cost.add(&row, SHORT, veth);
        self.cost.add(&row, SHORT_LO, loopback);
        if watcher != Watcher::Nobody {
            self.own.add(&row, CPU_SHORT, (running.cpu()? - before) * 1e6 / connections);
            self.own.add(&row, CPU_BULK, bulk_cpu * 1e3);
        }
        Ok(())
    }

    fn open(&mut self) -> Result<()> {
        let running = Running::start(Watcher::Underpass, &self.client)?;
        let at = SocketAddr::from((SERVER, 5003));
        let _server = Server::start(&self.server, at, None)?;
        let clients = Clients { namespace: &self.client, to: at, cpu: None };
        let mut held = vec![];
        for n in IDLE {
            held.extend(clients.idle(n - held.len())?);
            thread::sleep(Duration::from_secs(2));
            let before = running.cpu()?;
            thread::sleep(Duration::from_secs(4));
            let row = Watcher::Underpass.to_string();
            self.open.add(&row, &format!("{n} open, CPU ms a second"), (running.cpu()? - before) * 1e3 / 4.0);
            self.open.add(&row, &format!("{n} open, resident MiB"), running.resident_mib()?);
        }
        Ok(())
    }

    fn report(self, args: &Args) -> Result<()> {
        let mut findings = vec![];
        let (nobody, us) = (Watcher::Nobody.to_string(), Watcher::Underpass.to_string());
        for measure in &self.cost.measures {
            let (Some(without), Some(with)) =
                (self.cost.median(&nobody, &measure.name), self.cost.median(&us, &measure.name))
            else {
                continue;
            };
            findings.push(format!(
                "{}: {} unwatched, {} watched ({:+.1} %).",
                measure.name,
                crate::report::number(without),
                crate::report::number(with),
                (with / without - 1.0) * 100.0
            ));
        }
        let report = Report {
            name: "watch",
            title: "What watching costs",
            introduction: INTRODUCTION.to_owned(),
            findings,
            tables: vec![self.cost, self.own, self.open],
        };
        report.publish(args)
    }
}

const INTRODUCTION: &str = "\
The same load runs unwatched and beside each watcher in turn, round after round, within one run. `bpftrace` prints one \
line per state change from the tracepoint that `underpass watch` uses, with process and addresses but without counting \
bytes; `--packets` stands for the project's ancestor, an event per packet from a TC classifier (on the veth's end \
only, at most 10,000 a second and CPU); `tcplife` is measured where it is installed.";

/// The script for bpftrace: who, what state, where to.
const SCRIPT: &str = r#"tracepoint:sock:inet_sock_set_state /args->protocol == 6/ {
    printf("%d %s %d %d %s %d %s %d\n", pid, comm, args->oldstate, args->newstate,
        ntop(args->saddr), args->sport, ntop(args->daddr), args->dport);
}"#;

/// A watcher at work, ended when dropped.
struct Running {
    child: Option<Child>,
}

impl Watcher {
    fn is_there(self) -> bool {
        let program = match self {
            Self::Nobody | Self::Underpass | Self::PerPacket => return true,
            Self::Bpftrace => "bpftrace",
            Self::Tcplife => "tcplife",
        };
        let found =
            Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        if !found {
            say(format_args!("{program} is not installed and not measured"));
        }
        found
    }

    fn command(self) -> Result<Option<Command>> {
        let mut command = match self {
            Self::Nobody => return Ok(None),
            Self::Underpass | Self::PerPacket => Command::new(crate::peers::sibling("underpass")?),
            Self::Bpftrace => Command::new("bpftrace"),
            Self::Tcplife => Command::new("tcplife"),
        };
        match self {
            Self::Underpass => drop(command.args(["watch", "--json"])),
            Self::PerPacket => drop(command.args(["watch", "--json", "--interface", "server", "--packets"])),
            Self::Bpftrace => drop(command.args(["-e", SCRIPT])),
            Self::Nobody | Self::Tcplife => {}
        }
        Ok(Some(command))
    }
}

impl Running {
    fn start(watcher: Watcher, namespace: &Namespace) -> Result<Self> {
        let Some(mut command) = watcher.command()? else { return Ok(Self { child: None }) };
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = namespace.spawn(&mut command).with_context(|| format!("cannot start {watcher}"))?;
        // Long enough to load and attach; none of them says on a closed stderr when it has.
        thread::sleep(Duration::from_secs(3));
        Ok(Self { child: Some(child) })
    }

    /// The CPU seconds that it has spent.
    fn cpu(&self) -> Result<f64> {
        let Some(child) = &self.child else { return Ok(0.0) };
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", child.id())).context("the watcher has ended")?;
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect::<Vec<_>>());
        let ticks = |at: usize| fields.as_ref().and_then(|fields| fields.get(at)?.parse::<f64>().ok());
        // utime and stime, fields 14 and 15 of proc(5), in hundredths of a second.
        Ok((ticks(11).context("no CPU time")? + ticks(12).context("no CPU time")?) / 100.0)
    }

    fn resident_mib(&self) -> Result<f64> {
        let Some(child) = &self.child else { return Ok(0.0) };
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        Ok(kib.and_then(|kib| kib.parse::<f64>().ok()).context("no resident size")? / 1024.0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT);
            let _ = child.wait();
        }
    }
}
