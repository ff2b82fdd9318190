//! `./dev bench watch`: what watching costs those who are watched, and the watcher.
//! The load runs on loopback and over a veth pair between two private network
//! namespaces; the watchers see the whole host, as they do in earnest.

use std::{
    fmt, fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{Ebpf, programs::RawTracePoint};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use underpass::lab::Namespace;

use crate::{
    load::{Clients, Server, many_ports},
    packet::c_object,
    process::Process,
    report::{Args, Measure, Report, Table, number, percentile, rounds, say},
};

/// Who watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watcher {
    Nobody,
    Underpass,
    /// Programs that return at once, where `underpass watch` has its own: what the kernel
    /// takes for calling them, and so what no watcher at these places can be below.
    Empty,
    /// One event per packet from TC, in the manner of the project's ancestor.
    PerPacket,
    Bpftrace,
    Tcplife,
    Bandwhich,
}

impl fmt::Display for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "unwatched",
            Self::Underpass => "underpass watch",
            Self::Empty => "empty programs",
            Self::PerPacket => "event per packet",
            Self::Bpftrace => "bpftrace",
            Self::Tcplife => "tcplife",
            Self::Bandwhich => "bandwhich",
        })
    }
}

const BULK_LO: &str = "iperf3 on loopback, Gbit/s";
const BULK_VETH: &str = "iperf3 over veth, Gbit/s";
const PING: &str = "64 B there and back, veth, p50 us";
const SHORT: &str = "connections/s, 16 at a time, veth";
const SHORT_LO: &str = "connections/s, 16 at a time, loopback";
const WRK: &str = "wrk against nginx, requests/s";
const WRK_CLOSE: &str = "the same, a connection each";
const CPU: &str = "CPU, ms a second";
const RATE: &str = "connections/s reached";
const REACHED: &str = "connections/s";
const ENDS: &str = "ends told, of 100";
const EVENTS: &str = "ends that found the ring full";
const CHANGES: &str = "state changes not handed over";
/// How many rounds there are of us, nobody and nothing; the peers take part in every fourth.
const ROUNDS: usize = 12;
const PEERS_EVERY: usize = 4;
/// How many clients connect as fast as they can, for the highest rate.
const CROWDS: [usize; 3] = [16, 64, 256];
const OPEN: [usize; 3] = [0, 1000, 10_000];
/// Connections a second at which the watchers' own cost is compared.
const PACE: u32 = 10_000;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const WEB: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(SERVER), 8088);
const IPERF: u16 = 5201;

pub fn run(args: &Args) -> Result<()> {
    // 10,000 connections have one end in this process.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    tracing_mounted()?;
    let mut bench = Bench::new()?;
    let peers = [Watcher::PerPacket, Watcher::Bpftrace, Watcher::Tcplife, Watcher::Bandwhich];
    let there = |watchers: &[Watcher]| -> Vec<_> {
        watchers.iter().copied().filter(|watcher| watcher.is_there()).collect()
    };
    let always = there(&[Watcher::Nobody, Watcher::Underpass, Watcher::Empty]);
    let peers = there(&peers);
    for round in 0..if args.quick { 1 } else { ROUNDS } {
        let others = if round % PEERS_EVERY == 0 { &peers[..] } else { &[] };
        say(format_args!("round {} of {ROUNDS}", round + 1));
        rounds(1, &[&always[..], others].concat(), |watcher| bench.load(*watcher))?;
    }
    say("the highest rate");
    for crowd in CROWDS {
        bench.highest(crowd)?;
    }
    say("open connections");
    bench.open()?;
    bench.report(args)
}

/// The peers' tracepoints take tracefs. Mounted for this thread and what it starts.
fn tracing_mounted() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).context("no mount namespace of its own")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (kind, at) in [("tracefs", "/sys/kernel/tracing"), ("debugfs", "/sys/kernel/debug")] {
        if let Err(why) = mount(Some("none"), at, Some(kind), MsFlags::empty(), none) {
            say(format_args!("{kind} is not to be had at {at} ({why}): peers may not work"));
        }
    }
    Ok(())
}

struct Bench {
    client: Namespace,
    server: Namespace,
    time: Duration,
    cost: Table,
    own: Table,
    open: Table,
    highest: Table,
    /// iperf3 and nginx, while the benchmark runs.
    _servers: [Process; 3],
    _folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Result<Self> {
        let (client, server) = (Namespace::new()?, Namespace::new()?);
        client.join("server", &server, "client")?;
        client.address("server", CLIENT, 24)?;
        server.address("client", SERVER, 24)?;
        for namespace in [&client, &server] {
            many_ports(namespace)?;
        }
        let folder = tempfile::tempdir()?;
        let iperf = format!("exec iperf3 -s -p {IPERF}");
        let servers = [
            Process::server(&client, &iperf, (Ipv4Addr::LOCALHOST, IPERF).into())?,
            Process::server(&server, &iperf, (SERVER, IPERF).into())?,
            Process::server(&server, &nginx(folder.path())?, WEB)?,
        ];
        let cost = [
            Measure::higher(BULK_LO),
            Measure::higher(BULK_VETH),
            Measure::lower(PING),
            Measure::higher(SHORT),
            Measure::higher(SHORT_LO),
            Measure::higher(WRK),
            Measure::higher(WRK_CLOSE),
        ];
        let open = OPEN.map(|n| Measure::lower(format!("{n} open, CPU ms a second")));
        let memory = OPEN.map(|n| Measure::lower(format!("{n} open, resident MiB")));
        Ok(Self {
            client,
            server,
            time: Duration::from_secs(1),
            cost: Table::new(
                "What is watched",
                "iperf3 with one stream; one exchange after the other; short connections (connect, 64 bytes each way, \
                 close) as fast as they go; wrk with 32 connections against nginx and a file of 612 bytes. Of all \
                 connections both ends are watched.",
                cost.to_vec(),
            )
            .base(Watcher::Nobody.to_string()),
            own: Table::new(
                "The watcher",
                format!(
                    "The watcher's own process, user and system time, beside {PACE} short connections a second on \
                     loopback, of which it sees both ends. Its output goes to /dev/null. What its programs cost in \
                     the kernel is in the table above."
                ),
                vec![Measure::lower(CPU), Measure::higher(RATE)],
            ),
            open: Table::new(
                "Open connections",
                "`underpass watch --json` beside connections that rest, most of their time; both ends of each are watched, \
                 so 10,000 connections are 20,000 ends.",
                open.into_iter().chain(memory).collect(),
            ),
            highest: Table::new(
                "The highest rate",
                "So many clients connect on loopback, each again as soon as it is answered and closed: all that this \
                 machine can do. How many of their ends `underpass watch` told, and what it counted as lost.",
                vec![
                    Measure::higher(REACHED),
                    Measure::higher(ENDS),
                    Measure::lower(EVENTS),
                    Measure::lower(CHANGES),
                ],
            ),
            _servers: servers,
            _folder: folder,
        })
    }

    fn load(&mut self, watcher: Watcher) -> Result<()> {
        let row = watcher.to_string();
        let running = Running::start(watcher, &self.client)?;
        let _empty = if watcher == Watcher::Empty { empty_programs()? } else { vec![] };
        let at = SocketAddr::from((SERVER, 5001));
        let lo = SocketAddr::from((Ipv4Addr::LOCALHOST, 5002));
        let _far = Server::start(&self.server, at, None)?;
        let _near = Server::start(&self.client, lo, None)?;
        let over_veth = Clients { namespace: &self.client, to: at, cpu: None };
        let over_lo = Clients { namespace: &self.client, to: lo, cpu: None };

        self.cost.add(&row, BULK_LO, self.iperf(Ipv4Addr::LOCALHOST)?);
        self.cost.add(&row, BULK_VETH, self.iperf(SERVER)?);
        let times = over_veth.ping_pong(64, self.time)?;
        self.cost.add(&row, PING, percentile(&times, 0.5).context("no exchange")?);
        self.cost.add(&row, SHORT, over_veth.short(16, self.time)?);
        self.cost.add(&row, SHORT_LO, over_lo.short(16, self.time)?);
        self.cost.add(&row, WRK, self.wrk("")?);
        self.cost.add(&row, WRK_CLOSE, self.wrk("-H 'Connection: close'")?);

        // What is still in the ring belongs to what was before.
        thread::sleep(Duration::from_millis(300));
        let before = running.run_time()?;
        let rate = over_lo.short_paced(16, PACE, self.time)?;
        thread::sleep(Duration::from_millis(300));
        if !matches!(watcher, Watcher::Nobody | Watcher::Empty) {
            let spent = running.run_time()? - before;
            self.own.add(&row, CPU, spent * 1e3 / self.time.as_secs_f64());
            self.own.add(&row, RATE, rate);
        }
        running.end()?;
        Ok(())
    }

    /// As many short connections as can be: is each end told?
    fn highest(&mut self, crowd: usize) -> Result<()> {
        let row = format!("{crowd} clients");
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 5003));
        let _server = Server::start(&self.client, at, None)?;
        let running = Running::start(Watcher::Underpass, &self.client)?;
        let clients = Clients { namespace: &self.client, to: at, cpu: None };
        let (rate, made) = clients.short_counted(crowd, 3 * self.time)?;
        // A connection is over once the client has acknowledged the server's end.
        thread::sleep(Duration::from_millis(500));
        let notes = running.end()?;
        let told = Summary::read(&notes).with_context(|| format!("no summary: {notes}"))?;
        self.highest.add(&row, REACHED, rate);
        self.highest.add(&row, ENDS, 100.0 * told.ended as f64 / (2 * made) as f64);
        self.highest.add(&row, EVENTS, told.events as f64);
        self.highest.add(&row, CHANGES, told.changes as f64);
        Ok(())
    }

    /// One stream for a while; what was received, in Gbit/s.
    fn iperf(&self, to: Ipv4Addr) -> Result<f64> {
        let seconds = self.time.as_secs_f64().ceil();
        let text = self.output(&format!("iperf3 -c {to} -p {IPERF} -t {seconds} -O 0.3 -J"))?;
        let json: serde_json::Value = serde_json::from_str(&text).context("iperf3 gave no JSON")?;
        let rate = json["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.with_context(|| format!("iperf3: {text}"))? / 1e9)
    }

    /// Requests a second.
    fn wrk(&self, options: &str) -> Result<f64> {
        let seconds = self.time.as_secs_f64().ceil();
        let text = self.output(&format!("wrk -t1 -c32 -d{seconds} {options} http://{WEB}/small"))?;
        let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok());
        rate.with_context(|| format!("wrk: {text}"))
    }

    /// What a command in the client's namespace prints.
    fn output(&self, command: &str) -> Result<String> {
        let mut shell = Command::new("sh");
        let output = self.client.enter(|| shell.args(["-c", command]).output())?;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn open(&mut self) -> Result<()> {
        let running = Running::start(Watcher::Underpass, &self.client)?;
        let mut held = vec![];
        for n in OPEN {
            while held.len() < n {
                held.push(self.client.enter(rest).context("cannot open one more connection")?);
            }
            thread::sleep(Duration::from_secs(2));
            let before = running.run_time()?;
            thread::sleep(Duration::from_secs(4));
            let spent = running.run_time()? - before;
            let row = Watcher::Underpass.to_string();
            self.open.add(&row, &format!("{n} open, CPU ms a second"), spent * 1e3 / 4.0);
            self.open.add(&row, &format!("{n} open, resident MiB"), running.resident_mib()?);
        }
        Ok(())
    }

    fn report(self, args: &Args) -> Result<()> {
        let mut findings = vec![];
        let (nobody, us) = (Watcher::Nobody.to_string(), Watcher::Underpass.to_string());
        let empty = Watcher::Empty.to_string();
        for measure in &self.cost.measures {
            let change = |row: &str| {
                let pairs =
                    self.cost.samples(&nobody, &measure.name).zip(self.cost.samples(row, &measure.name));
                let changes: Vec<_> = pairs.map(|(without, with)| (with / without - 1.0) * 100.0).collect();
                let [low, half, high] = [0.25, 0.5, 0.75].map(|p| percentile(&changes, p));
                Some(format!("{:+.1} % (quartiles {:+.1} and {:+.1} %)", half?, low?, high?))
            };
            let Some(ours) = change(&us) else { continue };
            let bound =
                change(&empty).map(|bound| format!("; with empty programs {bound}")).unwrap_or_default();
            findings
                .push(format!("{}: watched {ours}{bound}, the medians of neighbouring pairs.", measure.name));
        }
        let cpu = |watcher: &str| self.own.median(watcher, CPU);
        let peers = self.own.rows().filter(|row| *row != us);
        let best = peers.filter_map(|row| Some((row, cpu(row)?))).min_by(|a, b| a.1.total_cmp(&b.1));
        if let (Some(ours), Some((best, theirs))) = (cpu(&us), best) {
            findings.push(format!(
                "CPU of the watcher at {PACE} connections a second: {} ms a second; of the peers {best} takes least, {} ms.",
                number(ours),
                number(theirs)
            ));
        }
        let memory = |n: usize| self.open.median(&us, &format!("{n} open, resident MiB"));
        if let (Some(none), Some(many)) = (memory(0), memory(10_000)) {
            findings.push(format!(
                "Memory: {} bytes for each end of an open connection, besides {} MiB.",
                number((many - none) * 1024.0 * 1024.0 / 20_000.0),
                number(none)
            ));
        }
        let highest = &self.highest;
        let of =
            |measure| CROWDS.iter().filter_map(move |n| highest.median(&format!("{n} clients"), measure));
        findings.push(format!(
            "At the highest rate, up to {} connections a second, {} ends found the ring full and {} state changes were \
             not handed over.",
            number(of(REACHED).fold(0.0, f64::max)),
            of(EVENTS).sum::<f64>(),
            of(CHANGES).sum::<f64>()
        ));
        let report = Report {
            name: "watch",
            title: "What watching costs",
            introduction: INTRODUCTION.to_owned(),
            findings,
            tables: vec![self.cost, self.own, self.highest, self.open],
        };
        report.publish(args)
    }
}

/// Opens a connection to nginx, uses it once and lets it rest.
fn rest() -> Result<TcpStream> {
    let mut stream = TcpStream::connect(WEB)?;
    stream.write_all(b"GET /small HTTP/1.1\r\nHost: here\r\n\r\n")?;
    ensure!(stream.read(&mut [0; 4096])? > 0, "nginx has closed the connection");
    Ok(stream)
}

/// What `underpass watch` says in the end.
struct Summary {
    ended: u64,
    events: u64,
    changes: u64,
}

impl Summary {
    fn read(notes: &str) -> Option<Self> {
        let before = |word: &str| notes.split(word).next()?.rsplit([' ', ',']).next()?.parse().ok();
        Some(Self {
            ended: before(" of them ended")?,
            events: before(" events,")?,
            changes: before(" state changes,")?,
        })
    }
}

/// The command that starts nginx with a file of 612 bytes, its own welcome page's size.
fn nginx(folder: &Path) -> Result<String> {
    fs::write(folder.join("small"), vec![b's'; 612])?;
    let config = folder.join("nginx.conf");
    let folder = folder.display();
    let text = format!(
        "daemon off; error_log stderr crit; pid {folder}/pid; worker_processes 1; user root; worker_rlimit_nofile 16384;\n\
         events {{ worker_connections 12000; }}\n\
         http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n\
         fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
         keepalive_requests 100000000; sendfile on; server {{ listen {WEB} backlog=4096; root {folder}; }} }}"
    );
    fs::write(&config, text)?;
    Ok(format!("exec nginx -c {} -e stderr", config.display()))
}

const INTRODUCTION: &str = "\
The same load runs unwatched and beside each watcher in turn, round after round, within one run. `underpass watch --json` \
tells each connection with its process, bytes and names. `bpftrace` prints one line per state change from the same \
tracepoint, with process and addresses but without bytes. `tcplife` (libbpf-tools) prints one line per connection, with \
process and bytes. `bandwhich --raw` sniffs packets and looks processes up in procfs. The event per packet stands for the \
project's ancestor: `underpass watch --interface --packets`, a TC classifier on the veth's end, at most 10,000 packets a \
second and CPU. The empty programs return at once, where the programs of `underpass watch` look at what TCP does: what \
the kernel takes for calling them. What is not in the tables was not installed.";

/// The script for bpftrace: who, what state, where to.
const SCRIPT: &str = r#"tracepoint:sock:inet_sock_set_state /args->protocol == 6/ {
    printf("%d %s %d %d %s %d %s %d\n", pid, comm, args->oldstate, args->newstate,
        ntop(args->saddr), args->sport, ntop(args->daddr), args->dport);
}"#;

/// What `underpass watch` attaches to what TCP does: two programs to a change of state, one
/// to each call.
const PLACES: [&str; 4] =
    ["inet_sock_set_state", "inet_sock_set_state", "sock_send_length", "sock_recv_length"];

/// A program at each of these places that does nothing, until dropped.
fn empty_programs() -> Result<Vec<Ebpf>> {
    let text = c_object("empty.c", include_str!("empty.c"))?;
    PLACES
        .map(|place| {
            let mut object = Ebpf::load(&text)?;
            let program = object.program_mut("empty").context("empty.c has no program")?;
            let program: &mut RawTracePoint = program.try_into()?;
            program.load()?;
            program.attach(place).with_context(|| format!("cannot attach to {place}"))?;
            Ok(object)
        })
        .into_iter()
        .collect()
}

fn starts(program: &str) -> bool {
    Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Where `./dev setup bench` puts it: beside the folder of the binaries.
fn bandwhich() -> Result<PathBuf> {
    let binaries = std::env::current_exe()?;
    let folder = binaries.ancestors().nth(2).context("no folder of the binaries")?;
    let path = folder.join("peers/bin/bandwhich");
    path.canonicalize().context("bandwhich is not there; run ./dev setup bench")
}

impl Watcher {
    fn is_there(self) -> bool {
        let found = match self {
            Self::Nobody | Self::Underpass | Self::PerPacket => true,
            Self::Empty => starts("clang"),
            Self::Bpftrace => starts("bpftrace"),
            Self::Tcplife => starts("tcplife"),
            Self::Bandwhich => bandwhich().is_ok(),
        };
        if !found {
            say(format_args!("{self} is not installed and not measured"));
        }
        found
    }

    fn command(self) -> Result<Option<Command>> {
        let mut command = match self {
            Self::Nobody | Self::Empty => return Ok(None),
            Self::Underpass | Self::PerPacket => Command::new(crate::peers::sibling("underpass")?),
            Self::Bpftrace => Command::new("bpftrace"),
            Self::Tcplife => Command::new("tcplife"),
            Self::Bandwhich => Command::new(bandwhich()?),
        };
        match self {
            Self::Underpass => drop(command.args(["watch", "--json"])),
            Self::PerPacket => drop(command.args(["watch", "--json", "--interface", "server", "--packets"])),
            Self::Bpftrace => drop(command.args(["-e", SCRIPT])),
            Self::Bandwhich => drop(command.args(["--raw", "--no-resolve"])),
            Self::Nobody | Self::Empty | Self::Tcplife => {}
        }
        Ok(Some(command))
    }
}

/// Long enough to load and attach; most do not say when they have.
const SETTLE: Duration = Duration::from_secs(3);

/// A watcher at work, or nobody.
pub struct Running {
    watcher: Option<(Process, thread::JoinHandle<String>)>,
}

impl Running {
    fn start(watcher: Watcher, namespace: &Namespace) -> Result<Self> {
        match watcher.command()? {
            Some(command) => Self::begin(command, &watcher.to_string(), namespace),
            // As long as a watcher is waited for: what rests has more ports free.
            None => {
                thread::sleep(SETTLE);
                Ok(Self { watcher: None })
            }
        }
    }

    /// Starts a command that watches.
    pub fn begin(mut command: Command, watcher: &str, namespace: &Namespace) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut program =
            Process::start(namespace, &mut command).with_context(|| format!("cannot start {watcher}"))?;
        let mut errors = program.child.stderr.take().context("no stderr")?;
        let notes = thread::spawn(move || {
            let mut notes = vec![];
            // What it was cut short of shows in the notes.
            let _ = errors.read_to_end(&mut notes);
            String::from_utf8_lossy(&notes).into_owned()
        });
        thread::sleep(SETTLE);
        if let Some(status) = program.child.try_wait()? {
            bail!("{watcher} has ended ({status}): {}", notes.join().unwrap_or_default().trim());
        }
        Ok(Self { watcher: Some((program, notes)) })
    }

    /// The seconds that its threads have run, in user and system mode.
    pub fn run_time(&self) -> Result<f64> {
        let Some((program, _)) = &self.watcher else { return Ok(0.0) };
        let threads =
            fs::read_dir(format!("/proc/{}/task", program.child.id())).context("the watcher has ended")?;
        let mut nanoseconds = 0.0;
        for thread in threads {
            // The first field; a thread may end meanwhile.
            let stat = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            nanoseconds += stat.split(' ').next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        }
        Ok(nanoseconds / 1e9)
    }

    /// What it holds in memory.
    pub fn resident_mib(&self) -> Result<f64> {
        let Some((program, _)) = &self.watcher else { return Ok(0.0) };
        let status = fs::read_to_string(format!("/proc/{}/status", program.child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        Ok(kib.and_then(|kib| kib.parse::<f64>().ok()).context("no resident size")? / 1024.0)
    }

    /// Ends it as a user would; what it wrote to stderr.
    pub fn end(self) -> Result<String> {
        let Some((mut program, notes)) = self.watcher else { return Ok(String::new()) };
        kill(Pid::from_raw(program.child.id().cast_signed()), Signal::SIGINT)?;
        // Who does not listen is killed with the process.
        for _ in 0..100 {
            if program.child.try_wait()?.is_some() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        drop(program);
        notes.join().map_err(|_| anyhow::anyhow!("the reader of stderr has panicked"))
    }
}
