//! `mux listen`: a TCP port whose connections or messages go where their bytes say.

use std::{
    fmt,
    net::{SocketAddr, TcpListener, TcpStream},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;
use tokio::{
    io::unix::AsyncFd,
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    time::MissedTickBehavior,
};
use tracing::{info, warn};
use underpass_logic::mux::{frame::Frame, table};

use super::{
    connection::{self, Connections},
    message::{self, Invalid, Messages, Plan, WhenFull},
    route::{self, Lengths, Route},
};
use crate::{
    address::{HostPort, Listen},
    error::{Error, Result},
    live::{self, Told, text},
    relay::{
        engine::Engine,
        report::Counts,
        serve::{Refusals, listen, raise_descriptor_limit, readable},
        settings::{ConnectionArgs, time},
    },
    status::Item,
};

/// How often the summary is logged.
const SUMMARY: Duration = Duration::from_mins(1);

/// Arguments of `underpass mux listen`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen: host:port, or :port for all addresses of both families
    #[arg(value_name = "ADDR")]
    listen: Listen,
    /// What goes where; the first route that matches wins. MATCH is '@20:600' (text at byte
    /// 20), '@0:0x1603' (hex), 'sni:NAME' or 'sni:*.NAME', 'alpn:PROTOCOL', 'http-host:NAME',
    /// 'tls', 'ssh' or 'http'; TARGET is host:port
    #[arg(long = "route", value_name = "MATCH=TARGET", required = true)]
    routes: Vec<String>,
    /// Where goes what no route takes [default: connections are closed, messages dropped]
    #[arg(long, value_name = "HOST:PORT")]
    default: Option<HostPort>,
    /// What is told apart
    #[arg(long, value_enum, default_value_t = Per::Connection)]
    per: Per,
    /// Where a message ends: fixed:N (all have N bytes); u16be@OFF or u32be@OFF (the big-endian
    /// integer at byte OFF is the message's length); u16be@OFF+N (the message has N bytes more
    /// than that says)
    #[arg(long, value_name = "FRAME", required_if_eq("per", "message"))]
    frame: Option<FrameArg>,
    /// The valid lengths of a message in bytes, for instance 290..=294 [default: up to 1 MiB]
    #[arg(long, value_name = "RANGE", requires = "frame")]
    length: Option<Lengths>,
    /// If a backend does not keep up with its messages
    #[arg(long, value_enum, default_value_t = WhenFull::Wait, requires = "frame")]
    when_full: WhenFull,
    /// What happens to a message of a wrong length or without a route
    #[arg(long, value_enum, default_value_t = Invalid::Drop, requires = "frame")]
    invalid: Invalid,
    /// How long a client may take to send what decides; a silent one goes to --default then
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = time)]
    peek_timeout: Duration,
    /// So many connections may be undecided at a time; what comes on top is decided at once
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_undecided: usize,
    #[command(flatten)]
    connections: ConnectionArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Per {
    /// The first bytes of a connection decide where all of it goes
    Connection,
    /// Each message of a connection goes where its tag says
    Message,
}

/// `--frame`.
#[derive(Debug, Clone, Copy)]
struct FrameArg(Frame);

impl FromStr for FrameArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape =
            || format!("'{text}' is no frame; known are fixed:N, u16be@OFF, u32be@OFF and u16be@OFF+N");
        if let Some(length) = text.strip_prefix("fixed:") {
            let length = length.parse().map_err(|_| shape())?;
            return if length == 0 {
                Err("a message has at least one byte".into())
            } else {
                Ok(Self(Frame::Fixed(length)))
            };
        }
        let (kind, place) = text.split_once('@').ok_or_else(shape)?;
        let width = match kind {
            "u16be" => 2,
            "u32be" => 4,
            _ => return Err(shape()),
        };
        let (offset, plus) = place.split_once('+').unwrap_or((place, "0"));
        let number =
            |text: &str| text.parse::<u16>().map_err(|_| format!("'{text}' is no number from 0 to 65535"));
        Ok(Self(Frame::Length { width, offset: number(offset)?, plus: number(plus)? }))
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let routes = route::parse(&args.routes, |target| target.parse::<HostPort>().map_err(|e| e.to_string()))?;
    match args.per {
        Per::Connection => {
            if args.frame.is_some() {
                return Err(Error::Usage(
                    "--frame goes with --per message: a connection has no frames".into(),
                ));
            }
            route::check_within(&routes, connection::PEEK, "what is looked at of a connection")?;
            let runtime = Builder::new_current_thread().enable_all().build().context("no runtime")?;
            runtime.block_on(connections(args, routes))
        }
        Per::Message => {
            let plan = plan(args, &routes)?;
            let runtime = Builder::new_multi_thread().enable_all().build().context("no runtime")?;
            runtime.block_on(messages(args, plan))
        }
    }
}

async fn connections(args: &Args, routes: Vec<Route<HostPort>>) -> Result<()> {
    crate::logging::start();
    let limits = connection::Limits {
        most: raise_descriptor_limit(),
        undecided: args.max_undecided,
        peek: args.peek_timeout,
        connect: args.connections.connect_timeout,
        idle: args.connections.idle_timeout,
    };
    let listener = listen(&args.listen).await?;
    let engine = Engine::start(args.connections.path.choice()?)?;
    let kernel = engine.kernel.clone();
    let connections =
        Connections::new(routes, args.default.clone(), engine, limits, args.connections.log_connections);
    announce(&listener, "connection", &kernel)?;
    serve(args, listener, &connections).await?;
    connections.engine.stop();
    drain(&connections.counts, Duration::from_secs(1)).await;
    connections.log();
    Ok(())
}

async fn messages(args: &Args, plan: Plan) -> Result<()> {
    crate::logging::start();
    let most = raise_descriptor_limit();
    let listener = listen(&args.listen).await?;
    announce(&listener, "message", "not used: messages are sorted in this process")?;
    let messages = Messages::new(plan, most, args.connections.log_connections);
    serve(args, listener, &messages).await?;
    messages.log();
    Ok(())
}

fn announce(listener: &TcpListener, per: &str, kernel: &str) -> Result<()> {
    let address = listener.local_addr().context("no local address")?;
    info!(listen = %address, per, kernel, "ready");
    Ok(())
}

/// What takes the clients that are accepted.
pub(super) trait Taker {
    fn counts(&self) -> &Counts;
    fn most(&self) -> usize;
    fn take(self: &Arc<Self>, client: TcpStream, peer: SocketAddr);
    fn log(&self);
    /// What `underpass status` shows.
    fn describe(&self) -> Value;
}

/// The `mux listen` that run.
pub(super) fn status() -> Result<Vec<Item>> {
    Ok(live::items("mux", |pid, told| Told {
        on: text(told, "listen"),
        why: format!("pid {pid}, {} open, by {}", told["counts"]["open"], text(told, "per")),
    })?)
}

/// Accepts until the process is told to stop, then gives connections their grace.
async fn serve<T: Taker>(args: &Args, listener: TcpListener, taker: &Arc<T>) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut summary = tokio::time::interval_at(tokio::time::Instant::now() + SUMMARY, SUMMARY);
    summary.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let address = listener.local_addr().context("no local address")?;
    let listener = readable(listener).context("cannot watch the listener")?;
    let mut refusals = Refusals::default();
    let status = live::answer("mux", async || {
        let mut told = taker.describe();
        told["listen"] = address.to_string().into();
        told
    });
    let mut status = std::pin::pin!(status);
    let mut listed = true;
    loop {
        tokio::select! {
            // It only ever ends with an error, and the rest works without.
            result = &mut status, if listed => {
                listed = false;
                let why = result.err().unwrap_or_else(|| anyhow::anyhow!("ended"));
                warn!("not listed by `underpass status`: {why:#}");
            }
            result = accept(&listener, taker, &mut refusals) => result.context("cannot accept")?,
            _ = summary.tick(), if !args.connections.log_connections => taker.log(),
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    drop(listener);
    info!(open = taker.counts().open.load(Relaxed), grace = ?args.connections.grace, "stopping");
    drain(taker.counts(), args.connections.grace).await;
    Ok(())
}

async fn accept<T: Taker>(
    listener: &AsyncFd<TcpListener>,
    taker: &Arc<T>,
    refusals: &mut Refusals,
) -> std::io::Result<()> {
    let mut guard = listener.readable().await?;
    loop {
        let (client, peer) = match guard.try_io(|listener| listener.get_ref().accept()) {
            Err(_would_block) => return Ok(()),
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => {
                refusals.failed(listener.get_ref(), taker.counts(), error)?;
                continue;
            }
        };
        let open = taker.counts().open.load(Relaxed);
        if open >= taker.most() {
            let why = format_args!("{open} connections are open, as many as there are descriptors for");
            refusals.refuse(taker.counts(), why);
        } else {
            taker.counts().open.fetch_add(1, Relaxed);
            taker.take(client, peer);
        }
    }
}

async fn drain(counts: &Counts, at_most: Duration) {
    let until = Instant::now() + at_most;
    while counts.open.load(Relaxed) > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn plan(args: &Args, routes: &[Route<HostPort>]) -> Result<Plan> {
    let Some(FrameArg(frame)) = args.frame else {
        return Err(Error::Usage("--per message takes --frame, for instance --frame u16be@0".into()));
    };
    let lengths = match (&args.length, frame) {
        (Some(Lengths(range)), _) => *range.start()..=(*range.end()).min(message::LONGEST),
        (None, Frame::Fixed(length)) => length..=length,
        (None, Frame::Length { .. }) => 0..=message::MAX_MESSAGE,
    };
    if let Frame::Fixed(length) = frame
        && !lengths.contains(&length)
    {
        return Err(Error::Usage(format!(
            "--length {}..={} excludes every message of --frame fixed:{length}",
            lengths.start(),
            lengths.end()
        )));
    }
    route::check_within(routes, *lengths.end() as usize, "a message")?;
    let mut table = Box::new(table::EMPTY);
    route::build(&mut table, routes, |index, _| (index as u16, index as u16))?;
    let mut backends: Vec<HostPort> = routes.iter().map(|route| route.target.clone()).collect();
    let default = args.default.is_some().then_some(backends.len());
    backends.extend(args.default.clone());
    Ok(Plan {
        frame,
        lengths,
        table,
        backends,
        default,
        when_full: args.when_full,
        invalid: args.invalid,
        connect_timeout: args.connections.connect_timeout,
        idle_timeout: args.connections.idle_timeout,
    })
}

/// Counts by route, for the summary.
#[derive(Debug)]
pub(super) struct ByRoute(Vec<(String, AtomicU64)>);

impl ByRoute {
    pub(super) fn new<T>(routes: &[Route<T>]) -> Self {
        Self(routes.iter().map(|route| (route.matches.to_string(), AtomicU64::new(0))).collect())
    }

    pub(super) fn count(&self, index: usize) {
        if let Some((_, count)) = self.0.get(index) {
            count.fetch_add(1, Relaxed);
        }
    }
}

impl ByRoute {
    /// The same for programs.
    pub(super) fn describe(&self) -> Value {
        self.0.iter().map(|(text, count)| (text.clone(), Value::from(count.load(Relaxed)))).collect()
    }
}

impl fmt::Display for ByRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (text, count)) in self.0.iter().enumerate() {
            write!(f, "{}{text}:{}", if index == 0 { "" } else { " " }, count.load(Relaxed))?;
        }
        Ok(())
    }
}
