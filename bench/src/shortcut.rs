//! `./dev bench shortcut`: local connections with and without the shortcut, and over
//! Unix sockets where the programs can.

use std::{
    fs,
    net::Ipv4Addr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use underpass::{
    lab::Namespace,
    shortcut::{
        Scope, Shortcut,
        cgroup::Temporary,
        measure::{Style, exchanges, loopback, stream},
    },
};
use underpass_abi::shortcut::HABIT_BLOCKS;

use crate::{
    load::pin,
    process::Process,
    report::{Args, Measure, Report, Table, number, percentile, rounds, say},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Tcp,
    Shortcut,
    Unix,
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "loopback TCP",
            Self::Shortcut => "shortcut",
            Self::Unix => "Unix socket",
        })
    }
}

const SUBJECTS: [Subject; 3] = [Subject::Tcp, Subject::Shortcut, Subject::Unix];
const SIZES: [usize; 5] = [64, 1 << 10, 16 << 10, 64 << 10, 1 << 20];
/// What is measured of exchanges: title, note, how the ends read, and the CPU of both.
const EXCHANGES: [(&str, &str, Style, Option<usize>); 4] = [
    (
        "Exchanges on one CPU, ends that poll",
        "One message there and back at a time; both ends wait in poll(2), as event loops do. They share a CPU, as \
         on a busy machine: no CPU that sleeps has to be woken for either, which here takes longer than all the rest.",
        Style::Polls,
        Some(0),
    ),
    (
        "Exchanges on one CPU, ends that wait in recv",
        "The same with sockets that block, which take `--accept-risk blocking-recv`.",
        Style::Waits,
        Some(0),
    ),
    (
        "Exchanges, ends that poll",
        "Each end is where the scheduler puts it: nearly always on a CPU of its own, which sleeps between messages.",
        Style::Polls,
        None,
    ),
    ("Exchanges, ends that wait in recv", "The same with sockets that block.", Style::Waits, None),
];
/// Exchanges before the times count: enough to be accelerated.
const WARM: usize = 400;
const REDIS: u16 = 6390;
/// The one that shares a CPU with its client.
const REDIS_ON_ONE: u16 = 6391;
const NGINX: u16 = 8090;
const POSTGRES: u16 = 5490;

struct Bench {
    cgroup: Temporary,
    namespace: Namespace,
    folder: PathBuf,
    quick: bool,
    exchanges: [Table; EXCHANGES.len()],
    streams: Table,
    programs: Table,
}

pub fn run(args: &Args) -> Result<()> {
    let mut bench = Bench::new(args.quick)?;
    let n = if args.quick { 3 } else { 7 };
    say("exchanges and streams");
    rounds(n, &SUBJECTS, |subject| bench.pairs(*subject))?;
    say("redis, nginx, PostgreSQL");
    let servers = bench.servers()?;
    rounds(n, &SUBJECTS, |subject| bench.programs(*subject))?;
    drop(servers);
    bench.report(args)
}

fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

impl Bench {
    fn new(quick: bool) -> Result<Self> {
        let cgroup = Temporary::new("bench")?;
        cgroup.enter().context("cannot enter the benchmark's control group")?;
        let folder = std::env::temp_dir().join(format!("underpass-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let base = Subject::Tcp.to_string();
        let table = |title: &str, note: &str, measures| Table::new(title, note, measures).base(base.clone());
        let times = || {
            SIZES
                .iter()
                .flat_map(|s| ["p50", "p99"].map(|p| Measure::lower(format!("{}, {p} us", size(*s)))))
                .collect()
        };
        let streams = SIZES.iter().map(|s| Measure::higher(format!("{}, Gbit/s", size(*s)))).collect();
        let programs = PROGRAMS.iter().map(|(name, _)| Measure::higher(*name)).collect();
        Ok(Self {
            cgroup,
            namespace: Namespace::new()?,
            folder,
            quick,
            exchanges: EXCHANGES.map(|(title, note, ..)| table(title, note, times())),
            streams: table(
                "Streams",
                "One way, by writes of one size. The shortcut leaves streams to TCP: 1.0x is what it should be.",
                streams,
            ),
            programs: table(
                "Programs",
                "Requests or transactions a second, by redis-benchmark, wrk and pgbench.",
                programs,
            ),
        })
    }

    /// The shortcut for what follows, if the subject is it.
    fn shortcut(&self, subject: Subject) -> Result<Option<Shortcut>> {
        if subject != Subject::Shortcut {
            return Ok(None);
        }
        let scope = Scope { accepted: HABIT_BLOCKS, ..Scope::default() };
        Ok(Some(Shortcut::start(self.cgroup.path(), &scope)?))
    }

    fn ends(&self, subject: Subject) -> Result<(OwnedFd, OwnedFd)> {
        if subject == Subject::Unix {
            let (client, server) = UnixStream::pair()?;
            return Ok((client.into(), server.into()));
        }
        loopback(&self.namespace)
    }

    fn pairs(&mut self, subject: Subject) -> Result<()> {
        let shortcut = self.shortcut(subject)?;
        let row = subject.to_string();
        for bytes in SIZES {
            let count = if bytes > 1 << 16 { 400 } else { 4000 } / if self.quick { 2 } else { 1 };
            for (nth, (_, _, style, cpu)) in EXCHANGES.into_iter().enumerate() {
                let ends = self.ends(subject)?;
                // The threads of the ends are where the one is that starts them.
                let run = || {
                    pin(cpu).map_err(Into::into).and_then(|()| exchanges(ends, style, bytes, (WARM, count)))
                };
                let times = thread::scope(|scope| scope.spawn(run).join());
                let times = times.map_err(|_| anyhow!("an end has panicked"))??;
                let times: Vec<_> = times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
                for (name, p) in [("p50", 0.5), ("p99", 0.99)] {
                    let value = percentile(&times, p).context("no times")?;
                    self.exchanges[nth].add(&row, &format!("{}, {name} us", size(bytes)), value);
                }
            }
            let total = if bytes < 1024 { 8 << 20 } else { 256 << 20 };
            let rate = stream(self.ends(subject)?, Style::Waits, bytes, total)?;
            self.streams.add(&row, &format!("{}, Gbit/s", size(bytes)), rate * 8.0 / 1e9);
        }
        if let Some(shortcut) = shortcut {
            let figures = shortcut.summary().total;
            // Now and then large messages have not earned it before they are over.
            ensure!(figures.accelerated >= SIZES.len() as u64, "too little was accelerated: {figures:?}");
        }
        Ok(())
    }

    fn programs(&mut self, subject: Subject) -> Result<()> {
        let shortcut = self.shortcut(subject)?;
        for (name, command) in PROGRAMS {
            let Some(command) = command(&self.folder, subject == Subject::Unix) else { continue };
            let rate = self.rate(&command, if self.quick { 1 } else { 3 })?;
            self.programs.add(&subject.to_string(), name, rate);
        }
        if let Some(shortcut) = shortcut {
            ensure!(shortcut.summary().total.accelerated > 0, "nothing was accelerated");
        }
        Ok(())
    }

    /// Runs a load generator and finds the rate in what it prints.
    fn rate(&self, load: &Load, seconds: usize) -> Result<f64> {
        let Load { command, before, after } = load;
        let command = command.replace("SECONDS", &seconds.to_string());
        let mut shell = Command::new("sh");
        let output = self
            .namespace
            .enter(|| shell.args(["-c", &command]).stderr(Stdio::piped()).output())
            .with_context(|| format!("cannot run {command}"))?;
        let printed = String::from_utf8_lossy(&output.stdout).replace('\r', "\n");
        let rate = printed.lines().rev().find_map(|line| {
            let from = line.find(before)? + before.len();
            let rest = &line[from..];
            let to = if after.is_empty() { rest.len() } else { rest.find(after)? };
            rest[..to].trim().parse().ok()
        });
        rate.with_context(|| {
            format!("no rate from {command}: {printed} {}", String::from_utf8_lossy(&output.stderr))
        })
    }

    fn servers(&self) -> Result<Vec<Process>> {
        let folder = self.folder.display();
        fs::write(self.folder.join("small"), vec![b's'; 612])?;
        fs::write(self.folder.join("large"), vec![b'l'; 1 << 20])?;
        let config = format!(
            "daemon off; error_log stderr; pid {folder}/pid; worker_processes 1; events {{}}\n\
             http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n\
             fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
             keepalive_requests 100000000; sendfile on; server {{ listen 127.0.0.1:{NGINX}; root {folder}; }} }}"
        );
        fs::write(self.folder.join("nginx.conf"), config)?;
        let redis = |cpus: &str, port: u16| {
            format!(
                "exec taskset -c {cpus} redis-server --port {port} --bind 127.0.0.1 --unixsocket {folder}/redis-{port} \
                 --save '' --loglevel warning"
            )
        };
        let all = format!("0-{}", thread::available_parallelism()?.get() - 1);
        let (one, redis) = (redis("0", REDIS_ON_ONE), redis(&all, REDIS));
        let nginx = format!("exec nginx -c {folder}/nginx.conf -e stderr");
        // It refuses to run as root.
        let postgres = format!(
            "set -e; bin=$(ls -d /usr/lib/postgresql/*/bin | tail -1); chmod 755 {folder}; install -d -o postgres {folder}/pg\n\
             as='setpriv --reuid=postgres --regid=postgres --init-groups'; cd {folder}/pg\n\
             $as $bin/initdb --no-sync -A trust -D {folder}/pg/data >&2\n\
             exec $as $bin/postgres -D {folder}/pg/data -p {POSTGRES} -h 127.0.0.1 -k {folder}/pg -c fsync=off"
        );
        let servers = [(redis, REDIS), (one, REDIS_ON_ONE), (nginx, NGINX), (postgres, POSTGRES)];
        let servers = servers.iter().map(|(command, port)| self.server(command, *port));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let setup = Load {
            command: format!(
                "pgbench -h 127.0.0.1 -p {POSTGRES} -U postgres -i -q -s 5 postgres 2>&1; echo ok 1"
            ),
            before: "ok ",
            after: "",
        };
        self.rate(&setup, 1)?;
        Ok(servers)
    }

    fn server(&self, command: &str, port: u16) -> Result<Process> {
        Process::server(&self.namespace, command, (Ipv4Addr::LOCALHOST, port).into())
    }

    fn report(&self, args: &Args) -> Result<()> {
        let mut tables = self.exchanges.to_vec();
        tables.extend([self.streams.clone(), self.programs.clone()]);
        let report = Report {
            name: "shortcut",
            title: "The shortcut beside loopback TCP and Unix sockets",
            introduction: INTRODUCTION.to_owned(),
            findings: tables.iter().flat_map(findings).collect(),
            tables,
        };
        report.publish(args)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What is left is in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A command that prints a rate between two words.
struct Load {
    command: String,
    before: &'static str,
    after: &'static str,
}

type Program = (&'static str, fn(&Path, bool) -> Option<Load>);

const PROGRAMS: [Program; 8] = [
    ("redis, 1 client, one CPU", |folder, unix| Some(redis(folder, unix, REDIS_ON_ONE, "-c 1 -n 60000"))),
    ("redis, 1 client", |folder, unix| Some(redis(folder, unix, REDIS, "-c 1 -n 20000"))),
    ("redis, 50 clients", |folder, unix| Some(redis(folder, unix, REDIS, "-c 50 -n 60000"))),
    ("redis, 50 clients, pipelined 16", |folder, unix| {
        Some(redis(folder, unix, REDIS, "-c 50 -n 500000 -P 16"))
    }),
    ("nginx, 612 B", |_, unix| wrk(unix, "small")),
    ("nginx, 1 MiB", |_, unix| wrk(unix, "large")),
    ("PostgreSQL, 1 client", |folder, unix| Some(pgbench(folder, unix, 1))),
    ("PostgreSQL, 8 clients", |folder, unix| Some(pgbench(folder, unix, 8))),
];

fn redis(folder: &Path, unix: bool, port: u16, load: &str) -> Load {
    let to = if unix { format!("-s {}/redis-{port}", folder.display()) } else { format!("-p {port}") };
    let on = if port == REDIS_ON_ONE { "taskset -c 0 " } else { "" };
    Load {
        command: format!("{on}redis-benchmark {to} -t get -q {load}"),
        before: "GET: ",
        after: " requests",
    }
}

fn wrk(unix: bool, file: &str) -> Option<Load> {
    // It knows no Unix sockets.
    let command = format!("wrk -t1 -c16 -dSECONDSs http://127.0.0.1:{NGINX}/{file}");
    (!unix).then_some(Load { command, before: "Requests/sec:", after: "" })
}

fn pgbench(folder: &Path, unix: bool, clients: u32) -> Load {
    let host = if unix { format!("{}/pg", folder.display()) } else { "127.0.0.1".into() };
    let command = format!(
        "pgbench -h {host} -p {POSTGRES} -U postgres -n -S -M prepared -c {clients} -T SECONDS postgres 2>/dev/null"
    );
    Load { command, before: "tps = ", after: " (" }
}

const INTRODUCTION: &str = "\
Both ends are on this machine: loopback TCP, the same with the shortcut attached to their control group, and Unix \
sockets where the program can use them. Every subject is measured in turn, round after round, within one run. Ratios \
in brackets are to loopback TCP; best of each column in bold.";

/// The shortcut against loopback TCP and Unix sockets, measure by measure.
fn findings(table: &Table) -> Vec<String> {
    let median = |subject: Subject, measure: &Measure| table.median(&subject.to_string(), &measure.name);
    let one = |measure: &Measure| {
        let (tcp, ours) = (median(Subject::Tcp, measure)?, median(Subject::Shortcut, measure)?);
        let unix = median(Subject::Unix, measure)
            .map_or(String::new(), |unix| format!(", {:.2}x a Unix socket", ours / unix));
        let (title, name) = (&table.title, &measure.name);
        Some(format!("{title}, {name}: {}, {:.2}x loopback TCP{unix}.", number(ours), ours / tcp))
    };
    table.measures.iter().filter_map(one).collect()
}
