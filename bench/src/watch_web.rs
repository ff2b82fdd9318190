//! `./dev bench watch-web`: what the page of watch costs, and how fluid it is, while every
//! one of thousands of connections moves something in every interval.

use std::{
    fmt,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use underpass::lab::Namespace;

use crate::{
    report::{Args, Measure, Report, Table, number, rounds},
    watch::Running,
};

/// Both ends of each are watched: 10,000 rows.
const PAIRS: usize = 5000;
const SERVER_CPU: &str = "server CPU, % of a core";
const MEMORY: &str = "server, resident MiB";
const WIRE: &str = "to each page, KiB/s";
const FIRST: &str = "to each page at first, KiB";
const PAGE_CPU: &str = "page's thread, % of a core";
const FRAMES: &str = "frames/s";
const FRAME: &str = "99th frame, ms";

/// Who looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// The lines alone.
    Nobody,
    /// The page is served, and nobody has it open.
    Served,
    /// One page is open in Chromium.
    Open,
}

impl fmt::Display for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "watch --json",
            Self::Served => "watch --web, no page open",
            Self::Open => "watch --web, a page open",
        })
    }
}

pub fn run(args: &Args) -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let namespace = Namespace::new()?;
    // Every address is this host's: so there are remotes all over the world.
    let route = ["route", "add", "local", "0.0.0.0/1", "dev", "lo"];
    let routed = namespace.enter(|| Command::new("ip").args(route).status())?;
    ensure!(routed.success(), "ip route has failed");
    let load = Load::start(&namespace)?;
    let measures = [SERVER_CPU, MEMORY, WIRE, FIRST, PAGE_CPU].map(Measure::lower);
    let mut table = Table::new(
        format!("{} connections that change", 2 * PAIRS),
        format!(
            "{PAIRS} TCP connections to as many addresses all over the world, of each of which both ends are watched. Each \
             sends 100 bytes a second. The watch, the load and Chromium (headless, drawing in software, 1440x900) \
             share this machine."
        ),
        measures.into_iter().chain([Measure::higher(FRAMES), Measure::lower(FRAME)]).collect(),
    );
    let time = Duration::from_secs(if args.quick { 5 } else { 15 });
    rounds(if args.quick { 1 } else { 3 }, &[Look::Nobody, Look::Served, Look::Open], |look| {
        measure(*look, &namespace, time, &mut table)
    })?;
    drop(load);
    let of = |measure| table.median(&Look::Open.to_string(), measure).map(number).unwrap_or_default();
    let findings = vec![
        format!("Server: {} % of a core with a page open; the goal is under 5 %.", of(SERVER_CPU)),
        format!("Page: {} frames a second; the goal is 50.", of(FRAMES)),
    ];
    let introduction = "What `underpass watch --web` costs beside `watch --json` under the same load, and how fluid the \
                        page is: frames are counted in the page itself, its CPU time is that of its main thread as \
                        Chromium tells it, and the bytes are those of the stream of events as a client reads them."
        .to_owned();
    let title = "What the page of watch costs";
    Report { name: "watch-web", title, introduction, findings, tables: vec![table] }.publish(args)
}

fn measure(look: Look, namespace: &Namespace, time: Duration, table: &mut Table) -> Result<()> {
    let row = look.to_string();
    let mut command = Command::new(crate::peers::sibling("underpass")?);
    command.args(["watch", "--json"]);
    if look != Look::Nobody {
        command.args(["--web", "--home", "52.5,13.4"]);
    }
    let running = Running::begin(command, &row, namespace)?;
    let page = (look == Look::Open).then(|| Page::open(namespace, time)).transpose()?;
    // Whatever the beginning costs is over by then.
    if page.is_none() {
        thread::sleep(Duration::from_secs(3));
    }
    let before = running.run_time()?;
    let began = Instant::now();
    let told = match page {
        Some(page) => Some(page.measure()?),
        None => {
            thread::sleep(time);
            None
        }
    };
    let spent = running.run_time()? - before;
    table.add(&row, SERVER_CPU, 100.0 * spent / began.elapsed().as_secs_f64());
    table.add(&row, MEMORY, running.resident_mib()?);
    if let Some(told) = told {
        for (measure, name) in
            [(WIRE, "wire"), (FIRST, "first"), (PAGE_CPU, "cpu"), (FRAMES, "frames"), (FRAME, "frame")]
        {
            table.add(&row, measure, told[name].as_f64().with_context(|| format!("no {name} in {told}"))?);
        }
    }
    running.end()?;
    Ok(())
}

/// Chromium with the page open, driven by ui/test/bench.mjs.
struct Page {
    node: std::process::Child,
    _folder: tempfile::TempDir,
}

impl Page {
    fn open(namespace: &Namespace, time: Duration) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/app/ui/test/bench.mjs");
        let mut node = Command::new("node");
        node.arg(script).arg(time.as_millis().to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        // The browser's files go with it.
        let folder = tempfile::tempdir()?;
        node.env("TMPDIR", folder.path());
        let mut node = namespace.spawn(&mut node).context("cannot start node")?;
        // It says a word when the page has been live for a while.
        let mut word = [0; 6];
        node.stdout.as_mut().context("no stdout")?.read_exact(&mut word).context("the page did not open")?;
        Ok(Self { node, _folder: folder })
    }

    fn measure(mut self) -> Result<serde_json::Value> {
        self.node.stdin.take().context("no stdin")?.write_all(b"go\n")?;
        let mut told = String::new();
        self.node.stdout.take().context("no stdout")?.read_to_string(&mut told)?;
        ensure!(self.node.wait()?.success(), "the page could not be measured: {told}");
        serde_json::from_str(&told).with_context(|| format!("not JSON: {told}"))
    }
}

/// Connections that all send something once a second, until dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(namespace: &Namespace) -> Result<Self> {
        let listener = namespace.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 443)))?;
        let mut pairs = vec![];
        for n in 0..PAIRS as u32 {
            // Spread over 1.0.0.0 to 126.255.255.255, always the same ones.
            let address = Ipv4Addr::from_bits(0x0100_0000 + n.wrapping_mul(2_654_435_761) % 0x7e00_0000);
            let to = SocketAddr::from((address, 443));
            let near = namespace.enter(|| TcpStream::connect(to)).with_context(|| format!("to {to}"))?;
            let (far, _) = listener.accept()?;
            pairs.push((near, far));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || talk(pairs, &stop)
        });
        Ok(Self { stop, threads: vec![thread] })
    }
}

/// A twentieth of them in each twentieth of a second.
fn talk(mut pairs: Vec<(TcpStream, TcpStream)>, stop: &AtomicBool) {
    let mut buffer = [b'x'; 100];
    let part = pairs.len().div_ceil(20);
    while !stop.load(Ordering::Relaxed) {
        for pairs in pairs.chunks_mut(part) {
            let next = Instant::now() + Duration::from_millis(50);
            for (near, far) in pairs {
                // A pair that fails shows as rows that rest.
                let _ = near.write_all(&buffer).and_then(|()| far.read_exact(&mut buffer));
            }
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
