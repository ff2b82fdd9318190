//! The relay's scene of `underpass demo`: a client, a gateway with the relay, and a
//! server, each in a network namespace; the server is reached through a SOCKS5 proxy.
//! Every byte that arrives is compared with what was sent.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fast_socks5::server::Socks5ServerProtocol;
use serde_json::json;

use super::probe::pattern;
use crate::{
    demo::{Progress, Scene},
    lab::Namespace,
};

const BULK: u64 = 384 << 20;
const EXCHANGES: usize = 3000;
const EXCHANGE: usize = 64;
/// What is sent over and over; no power of two, so that shifted blocks differ.
const BLOCK: usize = (1 << 20) - 7;
const PATIENCE: Duration = Duration::from_secs(20);
const PROXY_PORT: u16 = 1080;
const CLIENT: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 77, 1, 2), Ipv4Addr::new(10, 77, 1, 1));
const SERVER: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 77, 2, 2), Ipv4Addr::new(10, 77, 2, 1));

/// What a client asks of the embedded server, in the first byte.
const SEND: u8 = 0;
const ECHO: u8 = 1;

/// One row of the table.
struct Row {
    path: &'static str,
    gbit_per_s: f64,
    cpu_s_per_gib: f64,
    p50: Duration,
    p99: Duration,
}

pub(crate) fn scene(progress: &Progress) -> Result<Scene> {
    let (client, gateway, server) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
    client.join("gateway", &gateway, "client")?;
    server.join("gateway", &gateway, "server")?;
    client.address("gateway", CLIENT.0, 24)?;
    gateway.address("client", CLIENT.1, 24)?;
    server.address("gateway", SERVER.0, 24)?;
    gateway.address("server", SERVER.1, 24)?;
    let listener = server.enter(|| TcpListener::bind((SERVER.0, PROXY_PORT)))?;
    let block = pattern(BLOCK);
    serve(listener, block.clone())?;

    let mut rows = vec![];
    for path in ["copy", "splice", "kernel", "auto"] {
        progress.say(format_args!("{} MiB and {EXCHANGES} exchanges by {path}", BULK >> 20));
        let relay = match Relay::start(&gateway, path) {
            Ok(relay) => relay,
            // Said in the table; doctor tells more.
            Err(error) if path == "kernel" => {
                rows.push((path, Err(format!("{error:#}"))));
                continue;
            }
            Err(error) => return Err(error),
        };
        let row =
            client.enter(|| measure(path, relay.address, &block)).with_context(|| format!("by {path}"))?;
        rows.push((path, Ok(row)));
    }
    Ok(scene_of(&rows))
}

fn scene_of(rows: &[(&'static str, Result<Row, String>)]) -> Scene {
    let head = ["path", "Gbit/s", "CPU s/GiB", "p50", "p99", "verified"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let mut paths = vec![];
    for (path, row) in rows {
        match row {
            Ok(row) => {
                table.push(vec![
                    (*path).to_owned(),
                    format!("{:.1}", row.gbit_per_s),
                    format!("{:.2}", row.cpu_s_per_gib),
                    format!("{} us", row.p50.as_micros()),
                    format!("{} us", row.p99.as_micros()),
                    "yes".to_owned(),
                ]);
                paths.push(json!({
                    "path": row.path, "gbit_per_s": row.gbit_per_s, "cpu_s_per_gib": row.cpu_s_per_gib,
                    "p50_us": row.p50.as_micros() as u64, "p99_us": row.p99.as_micros() as u64, "verified": true,
                }));
            }
            Err(why) => {
                table.push(vec![
                    (*path).to_owned(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    why.clone(),
                ]);
                paths.push(json!({ "path": path, "verified": false, "why": why }));
            }
        }
    }
    let mut figures = serde_json::Map::new();
    figures.insert("paths".into(), paths.into());
    Scene {
        name: "relay",
        // A row is there only after every byte was compared.
        ok: rows.iter().any(|(_, row)| row.is_ok()),
        story: vec![
            "client -> gateway (underpass relay) -> SOCKS5 proxy and server, in three network namespaces"
                .into(),
            format!(
                "{} MiB to the client, then {EXCHANGES} exchanges of {EXCHANGE} bytes; every byte compared",
                BULK >> 20
            ),
        ],
        table,
        figures,
    }
}

/// A relay in the gateway; it is stopped when this is dropped.
struct Relay {
    child: Child,
    address: SocketAddr,
}

impl Relay {
    fn start(gateway: &Namespace, path: &str) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.args(["relay", "--listen", &format!("{}:0", CLIENT.1), "--path", path]);
        // The name is resolved by the proxy: this host does not know it.
        command.args(["--to", "server.demo:9", "--via", &format!("socks5://{}:{PROXY_PORT}", SERVER.0)]);
        command.env("NO_COLOR", "1").env_remove("RUST_LOG").stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = gateway.spawn(&mut command).context("cannot start the relay")?;
        let log = child.stderr.take().context("the relay's log")?;
        let mut relay = Self { child, address: (CLIENT.1, 0).into() };
        let mut lines = BufReader::new(log).lines();
        for line in &mut lines {
            let line = line?;
            if let Some((_, rest)) = line.split_once("ready listen=") {
                let address = rest.split(' ').next().unwrap_or_default();
                relay.address = address.parse().with_context(|| format!("no address in: {line}"))?;
                // Keep reading, or the relay would block once the pipe is full.
                thread::spawn(move || lines.for_each(drop));
                return Ok(relay);
            }
            if let Some(why) = line.strip_prefix("underpass: ") {
                bail!("{why}");
            }
        }
        bail!("the relay ended before it was ready")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It holds nothing that outlives it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(path: &'static str, relay: SocketAddr, block: &[u8]) -> Result<Row> {
    let (busy, begun) = (busy_seconds()?, Instant::now());
    let mut bulk = ask(relay, SEND, BULK)?;
    let (mut got, mut left) = (vec![0; BLOCK], BULK);
    while left > 0 {
        let len = left.min(BLOCK as u64) as usize;
        bulk.read_exact(&mut got[..len])?;
        ensure!(got[..len] == block[..len], "other bytes arrived than were sent");
        left -= len as u64;
    }
    ensure!(bulk.read(&mut got)? == 0, "more bytes arrived than were sent");
    let took = begun.elapsed().as_secs_f64();
    let busy = busy_seconds()? - busy;
    let (p50, p99) = exchanges(relay, block)?;
    Ok(Row {
        path,
        gbit_per_s: BULK as f64 * 8.0 / 1e9 / took,
        cpu_s_per_gib: busy / (BULK as f64 / f64::from(1 << 30)),
        p50,
        p99,
    })
}

/// The middle and the 99th percentile of a round trip.
fn exchanges(relay: SocketAddr, block: &[u8]) -> Result<(Duration, Duration)> {
    let mut stream = ask(relay, ECHO, 0)?;
    let (mut times, mut got) = (Vec::with_capacity(EXCHANGES), [0; EXCHANGE]);
    for sent in block.chunks_exact(EXCHANGE).cycle().take(EXCHANGES) {
        let begun = Instant::now();
        stream.write_all(sent)?;
        stream.read_exact(&mut got)?;
        times.push(begun.elapsed());
        ensure!(got == sent, "an exchange brought other bytes");
    }
    times.sort_unstable();
    Ok((times[EXCHANGES / 2], times[EXCHANGES * 99 / 100]))
}

fn ask(relay: SocketAddr, what: u8, len: u64) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&relay, PATIENCE).context("cannot connect to the relay")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[&[what], &len.to_be_bytes()[..]].concat())?;
    Ok(stream)
}

/// Serves SOCKS5 on its own thread: whatever a client asks for, it gets the embedded
/// server, each connection on a thread.
fn serve(listener: TcpListener, block: Vec<u8>) -> Result<()> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::spawn(move || {
        runtime.block_on(async {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            while let Ok((stream, _)) = listener.accept().await {
                let block = block.clone();
                tokio::spawn(async move {
                    // A client that breaks off shows in the figures of the one who waits for it.
                    let Ok(stream) = socks(stream).await else { return };
                    thread::spawn(move || answer(stream, &block));
                });
            }
        });
    });
    Ok(())
}

async fn socks(stream: tokio::net::TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    let (asked, _command, _target) =
        Socks5ServerProtocol::accept_no_auth(stream).await?.read_command().await?;
    let stream = asked.reply_success((IpAddr::from(SERVER.0), PROXY_PORT).into()).await?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn answer(mut stream: TcpStream, block: &[u8]) -> std::io::Result<()> {
    let (mut what, mut len) = ([0], [0; 8]);
    stream.read_exact(&mut what)?;
    stream.read_exact(&mut len)?;
    if what == [SEND] {
        let mut left = u64::from_be_bytes(len);
        while left > 0 {
            let count = left.min(block.len() as u64) as usize;
            stream.write_all(&block[..count])?;
            left -= count as u64;
        }
        return Ok(());
    }
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..count])?;
    }
}

/// How long the machine's CPUs have been busy, all processes together.
fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_ascii_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    ensure!(ticks.len() > 7, "an odd first line in /proc/stat: {line}");
    // user, nice, system, idle, iowait, irq, softirq, steal: in 1/100 s
    Ok([0, 1, 2, 5, 6].iter().map(|i| ticks[*i]).sum::<u64>() as f64 / 100.0)
}
