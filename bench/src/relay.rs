//! `./dev bench relay`: underpass on each path beside its peers. Client, relay and
//! server are in three private network namespaces, joined by veth pairs.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use underpass::lab::Namespace;

use crate::{
    load::{Clients, Hog, Server, many_ports},
    peers::{Running, Subject},
    report::{self, Measure, Plot, Report, Table, percentile, rounds, say},
};

/// Arguments of `./dev bench relay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    report: report::Args,
    /// Only these subjects, by name ("underpass auto", haproxy, ...)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
}

const BULK_1: &str = "1 stream, Gbit/s";
const BULK_1_CPU: &str = "1 stream, CPU s/GiB";
const BULK_64: &str = "64 streams, Gbit/s";
const BULK_64_CPU: &str = "64 streams, CPU s/GiB";
const SHORT_1: &str = "connections/s, one at a time";
const SHORT_32: &str = "connections/s, 32 at a time";
const MIXED_P50: &str = "32 interactive, p50 us";
const MIXED_P99: &str = "32 interactive, p99 us";
const MIXED_BULK: &str = "4 bulk, Gbit/s";
const MEMORY: &str = "KiB a connection";
const SCALE_P99: &str = "p99 us";
const SCALE_CPU: &str = "CPUs busy";
const SCALE: [usize; 4] = [10, 100, 1000, 5000];
const IDLE: usize = 1000;
const RATE: u32 = 2000;

/// Where the client and the server run; the relay too, or on the other.
const HOME: usize = 0;
const OTHER: usize = 1;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const RELAY: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const RELAY_OUT: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
const DIRECT_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 1);
const DIRECT_SERVER: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 2);

pub fn run(args: &Args) -> Result<()> {
    let mut bench = Bench::new(args)?;
    let subjects: Vec<_> = Subject::all()
        .into_iter()
        .filter(|s| args.only.is_empty() || args.only.contains(&s.to_string()))
        .collect();
    anyhow::ensure!(!subjects.is_empty(), "--only names nothing that is measured");
    let n = if args.report.quick { 2 } else { 5 };
    say("bulk, short connections, mixed work");
    rounds(n, &subjects, |subject| bench.throughput(subject))?;
    say("latency, relay on the CPU of client and server");
    rounds(n, &subjects, |subject| bench.latency(subject, HOME))?;
    say("latency, relay on another, busy CPU");
    let hog = Hog::start(OTHER);
    rounds(n, &subjects, |subject| bench.latency(subject, OTHER))?;
    drop(hog);
    say("memory, growth");
    rounds(if args.report.quick { 1 } else { 3 }, &subjects, |subject| {
        bench.growth(subject);
        Ok(())
    })?;
    bench.report(&subjects, &args.report)
}

struct Bench {
    client: Namespace,
    relay: Namespace,
    server: Namespace,
    /// How long one measurement takes.
    time: Duration,
    /// Each relay has a port of its own.
    port: u16,
    bulk: Table,
    latency: Table,
    short: Table,
    mixed: Table,
    memory: Table,
    growth: Table,
}

/// One subject at work, with a server behind it and clients before it.
struct Setup<'a> {
    clients: Clients<'a>,
    relay: Option<Running>,
    server: Server,
}

impl Bench {
    fn new(args: &Args) -> Result<Self> {
        // 5,000 connections have both their ends in this process; relays inherit the limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
        let namespaces = [Namespace::new()?, Namespace::new()?, Namespace::new()?];
        for namespace in &namespaces {
            many_ports(namespace)?;
        }
        let [client, relay, server] = namespaces;
        for (a, b, name, at_a, at_b) in [
            (&client, &relay, "relay", CLIENT, RELAY),
            (&relay, &server, "server", RELAY_OUT, SERVER),
            (&client, &server, "direct", DIRECT_CLIENT, DIRECT_SERVER),
        ] {
            a.join(name, b, name)?;
            a.address(name, at_a, 24)?;
            b.address(name, at_b, 24)?;
        }
        let time = Duration::from_millis(if args.report.quick { 500 } else { 1000 });
        let base = Subject::Direct.to_string();
        let table = |title: &str, note: &str, measures: &[Measure]| {
            Table::new(title, note, measures.to_vec()).base(base.clone())
        };
        let pings = |size| {
            ["same CPU", "busy CPU"]
                .map(|place| ["p50", "p99"].map(|p| Measure::lower(format!("{size}, {place}, {p} us"))))
        };
        Ok(Self {
            client,
            relay,
            server,
            time,
            port: 20000,
            bulk: table(
                "Bulk",
                "The client sends as much as it can over one connection and over 64. CPU is what the whole \
                 system spends: client, relay, server and kernel.",
                &[
                    Measure::higher(BULK_1),
                    Measure::lower(BULK_1_CPU),
                    Measure::higher(BULK_64),
                    Measure::lower(BULK_64_CPU),
                ],
            ),
            latency: table(
                "Ping-pong",
                "One connection carries 64 bytes (or 16 KiB) there and back, again and again. Client and \
                 server share a CPU; the relay is on the same one, or on another that a busy loop keeps \
                 occupied, as other work would.",
                &[pings("64 B"), pings("16 KiB")].concat().concat(),
            ),
            short: table(
                "Short connections",
                "Connect, send 64 bytes, receive 64 bytes, closed by the server; one client, or 32 at once.",
                &[Measure::higher(SHORT_1), Measure::higher(SHORT_32)],
            ),
            mixed: table(
                "Mixed work",
                "32 connections exchange 64 bytes with a pause of 2 ms after each, while 4 others carry bulk.",
                &[Measure::lower(MIXED_P50), Measure::lower(MIXED_P99), Measure::higher(MIXED_BULK)],
            ),
            memory: Table::new(
                "Memory of an idle connection",
                "What the relay's processes grow by, divided by 1,000 connections that were used once \
                 (proportional set size; the kernel's socket buffers are not in it).",
                vec![Measure::lower(MEMORY)],
            ),
            growth: Table::new(
                "Growth",
                "64-byte exchanges at 2,000 a second in all, going round 10, 100, 1,000 and 5,000 open \
                 connections; the time from when each was due to its answer, and the CPUs that the whole system \
                 kept busy. Where a subject is missing, it could not hold that many.",
                vec![Measure::lower(SCALE_P99), Measure::lower(SCALE_CPU)],
            )
            .plot(Plot::Lines { x: "connections" }),
        })
    }

    /// Starts a subject, if it can work here.
    fn set_up(
        &mut self,
        subject: &Subject,
        cpu: Option<usize>,
        relay_cpu: Option<usize>,
    ) -> Result<Option<Setup<'_>>> {
        self.port += 1;
        let direct = *subject == Subject::Direct;
        let at = SocketAddr::from((if direct { DIRECT_SERVER } else { SERVER }, self.port));
        let server = Server::start(&self.server, at, cpu)?;
        let mut to = at;
        let mut relay = None;
        if !direct {
            to = SocketAddr::from((RELAY, self.port));
            relay = subject.start(&self.relay, to, at, relay_cpu)?;
            if relay.is_none() {
                return Ok(None);
            }
        }
        let clients = Clients { namespace: &self.client, to, cpu };
        clients.wait()?;
        Ok(Some(Setup { clients, relay, server }))
    }

    fn throughput(&mut self, subject: &Subject) -> Result<()> {
        let time = self.time;
        let row = subject.to_string();
        let Some(setup) = self.set_up(subject, None, None)? else { return Ok(()) };
        let one = setup.clients.bulk(&setup.server, 1, time).context("bulk")?;
        let many = setup.clients.bulk(&setup.server, 64, time).context("bulk over 64 streams")?;
        let shorts = [1, 32].map(|parallel| setup.clients.short(parallel, time));
        let (times, beside) = setup.clients.mixed(&setup.server, 32, 4, time).context("mixed work")?;
        drop(setup);
        self.bulk.add(&row, BULK_1, one.gbit_per_s);
        self.bulk.add(&row, BULK_1_CPU, one.cpu_s_per_gib);
        self.bulk.add(&row, BULK_64, many.gbit_per_s);
        self.bulk.add(&row, BULK_64_CPU, many.cpu_s_per_gib);
        for (measure, rate) in [SHORT_1, SHORT_32].into_iter().zip(shorts) {
            self.short.add(&row, measure, rate?);
        }
        self.mixed.add(&row, MIXED_P50, percentile(&times, 0.5).context("no exchange")?);
        self.mixed.add(&row, MIXED_P99, percentile(&times, 0.99).context("no exchange")?);
        self.mixed.add(&row, MIXED_BULK, beside);
        Ok(())
    }

    fn latency(&mut self, subject: &Subject, relay_cpu: usize) -> Result<()> {
        let time = self.time;
        let row = subject.to_string();
        let place = if relay_cpu == HOME { "same CPU" } else { "busy CPU" };
        let Some(setup) = self.set_up(subject, Some(HOME), Some(relay_cpu))? else { return Ok(()) };
        let small = setup.clients.ping_pong(64, time).context("ping-pong of 64 bytes")?;
        let large = setup.clients.ping_pong(16 * 1024, time).context("ping-pong of 16 KiB")?;
        drop(setup);
        for (size, times) in [("64 B", small), ("16 KiB", large)] {
            for (name, p) in [("p50", 0.5), ("p99", 0.99)] {
                let value = percentile(&times, p).context("no exchange")?;
                self.latency.add(&row, &format!("{size}, {place}, {name} us"), value);
            }
        }
        Ok(())
    }

    fn growth(&mut self, subject: &Subject) {
        for n in SCALE {
            if *subject == Subject::Socat && n > IDLE {
                continue; // a process a connection: the machine would measure itself
            }
            if let Err(error) = self.held(subject, n) {
                say(format_args!("{subject} does not hold {n} connections: {error:#}"));
            }
        }
    }

    fn held(&mut self, subject: &Subject, n: usize) -> Result<()> {
        let time = self.time;
        let Some(setup) = self.set_up(subject, None, None)? else { return Ok(()) };
        let before = setup.relay.as_ref().map(Running::memory_kib).transpose()?;
        let mut idle = setup.clients.idle(n)?;
        let after = setup.relay.as_ref().map(Running::memory_kib).transpose()?;
        let (times, cpus) = setup.clients.paced(&mut idle, RATE, time)?;
        drop((idle, setup));
        if let (Some(before), Some(after), IDLE) = (before, after, n) {
            self.memory.add(&subject.to_string(), MEMORY, (after - before) / n as f64);
        }
        let row = format!("{subject} @ {n}");
        self.growth.add(&row, SCALE_P99, percentile(&times, 0.99).context("no exchange")?);
        self.growth.add(&row, SCALE_CPU, cpus);
        Ok(())
    }

    fn report(self, subjects: &[Subject], args: &report::Args) -> Result<()> {
        let mut tables = vec![self.bulk, self.latency, self.short, self.mixed, self.memory];
        for table in &mut tables {
            let with_direct = table.base.is_some();
            for subject in subjects.iter().filter(|s| with_direct || **s != Subject::Direct) {
                table.row(&subject.to_string());
            }
        }
        tables.push(self.growth);
        let report = Report {
            name: "relay",
            title: "The relay beside its peers",
            introduction: INTRODUCTION.to_owned(),
            findings: findings(&tables, subjects),
            tables,
        };
        report.publish(args)
    }
}

const INTRODUCTION: &str = "\
Client, relay and server are in three network namespaces joined by veth pairs; `direct` is a fourth link between \
client and server, a yardstick that no relay reaches. Every subject is measured in turn, round after round, within \
one run. `haproxy` runs in TCP mode with `option splice-auto`, `nginx` as a stream proxy with 64 KiB buffers and a \
worker per CPU, `socat` with 64 KiB buffers and a process per connection, all from Debian's packages; `realm` is there \
if the variable UNDERPASS_REALM names its binary. Best of each column in bold.";

/// Cell by cell, the best path of underpass against the best peer: who wins, and by how much.
fn findings(tables: &[Table], subjects: &[Subject]) -> Vec<String> {
    let (ours, others): (Vec<_>, Vec<_>) = subjects
        .iter()
        .filter(|s| **s != Subject::Direct)
        .map(Subject::to_string)
        .partition(|name| name.starts_with("underpass"));
    let mut findings = vec![];
    for table in tables.iter().filter(|table| table.plot == Plot::Bars) {
        for measure in &table.measures {
            let (Some(us), Some(them)) = (table.best_of(measure, &ours), table.best_of(measure, &others))
            else {
                continue;
            };
            findings.push(format!(
                "{}, {}: {} {}, {} {}: {:.2}x.",
                table.title,
                measure.name,
                us.0,
                crate::report::number(us.1),
                them.0,
                crate::report::number(them.1),
                us.1 / them.1
            ));
        }
    }
    findings
}
