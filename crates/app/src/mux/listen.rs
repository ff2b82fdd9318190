//! `mux listen`: a TCP port whose connections or messages go where their bytes say.

use std::{
    fmt,
    future::pending,
    net::{SocketAddr, TcpListener},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, available_parallelism},
    time::Duration,
};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Handle, Runtime};
use tracing::info;
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
        front::{Front, listen, raise_descriptor_limit, readable},
        settings::{ConnectionArgs, time},
    },
    status::Item,
};

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
            runtime()?.block_on(connections(args, routes))
        }
        Per::Message => {
            let plan = plan(args, &routes)?;
            runtime()?.block_on(messages(args, plan))
        }
    }
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build().context("no runtime")?)
}

/// A thread for each CPU, with a runtime of its own. A runtime for all of them wakes
/// another thread at nearly every read, which costs a third of the messages.
fn threads() -> Result<Vec<Handle>> {
    let count = available_parallelism().map_or(1, usize::from);
    let start = |_| {
        let runtime = runtime()?;
        let handle = runtime.handle().clone();
        let thread = thread::Builder::new().name("worker".into());
        thread.spawn(move || runtime.block_on(pending::<()>())).context("cannot start a thread")?;
        Ok(handle)
    };
    (0..count).map(start).collect()
}

async fn connections(args: &Args, routes: Vec<Route<HostPort>>) -> Result<()> {
    crate::logging::start();
    let front = Front::new(args.connections.clone(), raise_descriptor_limit());
    let limits = connection::Limits { undecided: args.max_undecided, peek: args.peek_timeout };
    let listener = Arc::new(listen(&args.listen).await?);
    let engine = Engine::start(args.connections.path.choice()?)?;
    let address = announce(&listener, "connection", &engine.kernel)?;
    let connections = Connections::new(routes, args.default.clone(), Arc::clone(&front), engine, limits);
    let taker = Arc::clone(&connections);
    let accept = connections.engine.open(&front, &listener, move |client| taker.take(client));
    let describe = async || {
        let mut told = connections.describe().await;
        told["listen"] = address.to_string().into();
        told
    };
    front.serve("mux", &listener, accept, describe, || connections.log()).await?;
    connections.engine.close_door();
    drop(listener);
    front.stop(|| connections.engine.stop()).await;
    connections.log();
    Ok(())
}

async fn messages(args: &Args, plan: Plan) -> Result<()> {
    crate::logging::start();
    // A client takes a descriptor, and one for each backend that it speaks to.
    let most = (2 * raise_descriptor_limit() / (1 + plan.backends.len())).max(1);
    let front = Front::new(args.connections.clone(), most);
    let listener = Arc::new(listen(&args.listen).await?);
    let watched = readable(Arc::clone(&listener)).context("cannot watch the listener")?;
    let (threads, next) = (threads()?, AtomicUsize::new(0));
    let address = announce(&listener, "message", "not used: messages are sorted in this process")?;
    let messages = Messages::new(plan, Arc::clone(&front));
    let accept = front.accept_all(&watched, |client| {
        let thread = &threads[next.fetch_add(1, Relaxed) % threads.len()];
        drop(thread.spawn(Arc::clone(&messages).serve(client)));
    });
    let describe = async || {
        let mut told = messages.describe();
        told["listen"] = address.to_string().into();
        told
    };
    front.serve("mux", &listener, accept, describe, || messages.log()).await?;
    drop((watched, listener));
    front.stop(|| ()).await;
    messages.log();
    Ok(())
}

/// Says that it listens, and gives where.
fn announce(listener: &TcpListener, per: &str, kernel: &str) -> Result<SocketAddr> {
    let address = listener.local_addr().context("no local address")?;
    info!(listen = %address, per, kernel, "ready");
    Ok(address)
}

/// The `mux listen` that run.
pub(super) fn status() -> Result<Vec<Item>> {
    Ok(live::items("mux", |pid, told| Told {
        on: text(told, "listen"),
        why: format!("pid {pid}, {} open, by {}", told["counts"]["open"], text(told, "per")),
    })?)
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
        by_route: ByRoute::new(routes, args.default.as_ref()),
        when_full: args.when_full,
        invalid: args.invalid,
        connect_timeout: args.connections.connect_timeout,
        idle_timeout: args.connections.idle_timeout,
    })
}

/// Counts by route, and for the default after them.
#[derive(Debug)]
pub(super) struct ByRoute(Vec<Counted>);

#[derive(Debug)]
struct Counted {
    matches: String,
    to: String,
    count: AtomicU64,
}

impl ByRoute {
    pub(super) fn new(routes: &[Route<HostPort>], default: Option<&HostPort>) -> Self {
        let routes = routes.iter().map(|route| (route.matches.to_string(), &route.target));
        let all = routes.chain(default.map(|to| ("default".to_owned(), to)));
        Self(all.map(|(matches, to)| Counted { matches, to: to.to_string(), count: 0.into() }).collect())
    }

    pub(super) fn count(&self, index: usize, more: u64) {
        self.0[index].count.fetch_add(more, Relaxed);
    }

    /// The same for programs; `what` is counted.
    pub(super) fn describe(&self, what: &str) -> Value {
        let one = |it: &Counted| json!({"match": it.matches, "to": it.to, what: it.count.load(Relaxed)});
        self.0.iter().map(one).collect()
    }
}

impl fmt::Display for ByRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, it) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{}: {}", it.matches, it.count.load(Relaxed))?;
        }
        Ok(())
    }
}
