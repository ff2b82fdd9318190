//! `mux listen --per connection`: the first bytes of a connection decide where it
//! goes; then the relay's workers carry it, those bytes first.
//!
//! What an undecided connection may take is bounded: [`PEEK`] bytes, the peek
//! timeout (in all, so that a trickle does not prolong it), and the number of them.
//! Whatever is not decided by then goes by what has arrived, else to the default.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;
use tracing::info;
use underpass_logic::mux::{Decision, Opening};

use super::{
    listen::{ByRoute, Taker},
    route::{Match, Route},
};
use crate::{
    address::HostPort,
    relay::{
        dial,
        engine::{Engine, prepare},
        report::{self, Counts},
        serve::readable,
        tcp,
        worker::Job,
    },
};

/// How many bytes of a connection are looked at, at most. A ClientHello has at most a
/// few thousand, with post-quantum key shares; HTTP servers take requests of 8 KiB.
pub const PEEK: usize = 16 << 10;

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many there are.
    pub most: usize,
    /// How many are undecided.
    pub undecided: usize,
    /// How long one is undecided.
    pub peek: Duration,
    /// How long connecting to its target takes.
    pub connect: Duration,
    /// How long nothing moves on it.
    pub idle: Duration,
}

/// All that accepting and deciding takes.
#[derive(Debug)]
pub struct Connections {
    matches: Vec<Match>,
    /// One for each route, and then the default's, if there is one.
    targets: Vec<Target>,
    default: Option<usize>,
    pub engine: Engine,
    pub counts: Counts,
    limits: Limits,
    log_each: bool,
    undecided: AtomicUsize,
    by_route: ByRoute,
    to_default: AtomicU64,
    no_route: AtomicU64,
    silent: AtomicU64,
    left: AtomicU64,
}

#[derive(Debug)]
struct Target {
    address: HostPort,
    /// If connecting to it needs no name.
    direct: Option<SocketAddr>,
    text: String,
}

impl From<HostPort> for Target {
    fn from(address: HostPort) -> Self {
        let direct = address.ip().map(|ip| (ip, address.port).into());
        Self { direct, text: address.to_string(), address }
    }
}

/// A client that has not said enough yet.
struct Client {
    stream: TcpStream,
    peer: SocketAddr,
    begun: Instant,
    said: Said,
}

/// What a client has said so far.
#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    /// How many bytes are needed before it makes sense to look again.
    needed: usize,
}

/// What looking at a client gave.
enum Look {
    /// Where it goes, if anywhere.
    Decided(Option<usize>),
    /// More must come.
    Wait,
    /// It is gone.
    Left,
}

impl Connections {
    pub fn new(
        routes: Vec<Route<HostPort>>,
        default: Option<HostPort>,
        engine: Engine,
        limits: Limits,
        log_each: bool,
    ) -> Arc<Self> {
        let by_route = ByRoute::new(&routes);
        let (matches, targets): (Vec<_>, Vec<_>) =
            routes.into_iter().map(|route| (route.matches, Target::from(route.target))).unzip();
        let mut targets = targets;
        let default = default.map(|default| {
            targets.push(default.into());
            targets.len() - 1
        });
        Arc::new(Self {
            matches,
            targets,
            default,
            engine,
            counts: Counts::default(),
            limits,
            log_each,
            undecided: AtomicUsize::new(0),
            by_route,
            to_default: AtomicU64::new(0),
            no_route: AtomicU64::new(0),
            silent: AtomicU64::new(0),
            left: AtomicU64::new(0),
        })
    }

    /// Reads what has come and decides, if it can be decided.
    fn look(&self, mut stream: &TcpStream, said: &mut Said) -> Look {
        let mut chunk = [0; PEEK];
        loop {
            let room = PEEK - said.bytes.len();
            match stream.read(&mut chunk[..room]) {
                Ok(0) if said.bytes.is_empty() => return Look::Left,
                Ok(0) => return Look::Decided(self.decide(&said.bytes, true).unwrap_or_default()),
                Ok(read) => {
                    said.bytes.extend_from_slice(&chunk[..read]);
                    let full = said.bytes.len() == PEEK;
                    if full || said.bytes.len() >= said.needed {
                        match self.decide(&said.bytes, full) {
                            Ok(to) => return Look::Decided(to),
                            Err(needed) => said.needed = needed,
                        }
                    }
                    if read < room {
                        return Look::Wait; // most likely nothing else is there
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Look::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Look::Left,
            }
        }
    }

    /// Which target these bytes ask for; else how many bytes are needed to say.
    fn decide(&self, bytes: &[u8], last: bool) -> Result<Option<usize>, usize> {
        match Opening::new(bytes).decide(self.matches.iter().map(Match::matcher), last) {
            Decision::Route(index) => Ok(Some(index)),
            Decision::None => Ok(self.default),
            Decision::More(needed) => Err(needed),
        }
    }

    /// Waits for what decides, as long as that may take.
    async fn wait(self: &Arc<Self>, client: Client) {
        let deadline = tokio::time::Instant::from_std(client.begun + self.limits.peek);
        let Client { stream, peer, begun, mut said } = client;
        let Ok(watched) = readable(stream) else { return self.leave() };
        let look = tokio::time::timeout_at(deadline, self.watch(&watched, &mut said)).await;
        let client = Client { stream: watched.into_inner(), peer, begun, said };
        match look {
            Ok(look) => self.act(client, look),
            Err(_elapsed) => self.act_now(client),
        }
    }

    async fn watch(&self, client: &AsyncFd<TcpStream>, said: &mut Said) -> Look {
        loop {
            let Ok(mut guard) = client.readable().await else { return Look::Left };
            // Before reading: what comes afterwards must be told anew.
            guard.clear_ready();
            match self.look(client.get_ref(), said) {
                Look::Wait => {}
                look @ (Look::Decided(_) | Look::Left) => return look,
            }
        }
    }

    /// Decides by what is there, as no more is waited for.
    fn act_now(self: &Arc<Self>, client: Client) {
        if client.said.bytes.is_empty() {
            self.silent.fetch_add(1, Relaxed);
        }
        let to = self.decide(&client.said.bytes, true).unwrap_or_default();
        self.act(client, Look::Decided(to));
    }

    fn act(self: &Arc<Self>, client: Client, look: Look) {
        match look {
            Look::Decided(Some(index)) => self.forward(client, index),
            Look::Decided(None) => {
                self.no_route.fetch_add(1, Relaxed);
                if self.log_each {
                    report::log_unreached(client.peer, "none", &"no route takes it", client.begun.elapsed());
                }
                self.counts.open.fetch_sub(1, Relaxed);
            }
            Look::Left => self.leave(),
            Look::Wait => self.act_now(client),
        }
    }

    fn leave(&self) {
        self.left.fetch_add(1, Relaxed);
        self.counts.open.fetch_sub(1, Relaxed);
    }

    fn forward(self: &Arc<Self>, client: Client, index: usize) {
        match self.default {
            Some(default) if default == index => drop(self.to_default.fetch_add(1, Relaxed)),
            _ => self.by_route.count(index),
        }
        let target = &self.targets[index];
        let Some(direct) = target.direct else {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.dial(client, index).await });
            return;
        };
        let now = Instant::now();
        match dial::start(direct) {
            Ok(stream) => self.carry(client, stream, index, Some(now + self.limits.connect)),
            Err(error) => self.unreached(&client, index, &error),
        }
    }

    async fn dial(self: Arc<Self>, client: Client, index: usize) {
        let connecting = dial::connect(&self.targets[index].address);
        match tokio::time::timeout(self.limits.connect, connecting).await {
            Ok(Ok(stream)) => match stream.into_std() {
                Ok(stream) => self.carry(client, stream, index, None),
                Err(error) => self.unreached(&client, index, &error),
            },
            Ok(Err(error)) => self.unreached(&client, index, &error),
            Err(_elapsed) => self.unreached(&client, index, &dial::DialError::TimedOut(self.limits.connect)),
        }
    }

    fn unreached(&self, client: &Client, index: usize, error: &dyn std::fmt::Display) {
        tcp::reset_on_close(&client.stream);
        self.counts.open.fetch_sub(1, Relaxed);
        self.counts.failed.fetch_add(1, Relaxed);
        report::log_unreached(client.peer, &self.targets[index].text, error, client.begun.elapsed());
    }

    fn carry(self: &Arc<Self>, client: Client, target: TcpStream, index: usize, connecting: Option<Instant>) {
        let this = Arc::clone(self);
        let Client { stream, peer, begun, said } = client;
        self.engine.carry(Job {
            client: stream,
            target,
            connecting,
            early: said.bytes,
            choice: self.engine.choice,
            idle: self.limits.idle,
            done: Box::new(move |report| {
                this.counts.add(&report);
                if this.log_each {
                    report::log(peer, &this.targets[index].text, &report, begun.elapsed());
                }
                this.counts.open.fetch_sub(1, Relaxed);
            }),
        });
    }
}

impl Taker for Connections {
    fn counts(&self) -> &Counts {
        &self.counts
    }

    fn most(&self) -> usize {
        self.limits.most
    }

    fn take(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let Ok(stream) = prepare(stream) else { return self.leave() };
        let mut client = Client { stream, peer, begun: Instant::now(), said: Said::default() };
        match self.look(&client.stream, &mut client.said) {
            Look::Wait if self.undecided.load(Relaxed) < self.limits.undecided => {
                self.undecided.fetch_add(1, Relaxed);
                let this = Arc::clone(self);
                tokio::spawn(async move {
                    this.wait(client).await;
                    this.undecided.fetch_sub(1, Relaxed);
                });
            }
            look @ (Look::Decided(_) | Look::Left | Look::Wait) => self.act(client, look),
        }
    }

    fn describe(&self) -> Value {
        json!({
            "per": "connection",
            "path": self.engine.choice.word(),
            "counts": self.counts.describe(),
            "routes": self.by_route.describe(),
            "default": self.to_default.load(Relaxed),
            "no_route": self.no_route.load(Relaxed),
            "silent": self.silent.load(Relaxed),
            "left": self.left.load(Relaxed),
            "undecided": self.undecided.load(Relaxed),
        })
    }

    fn log(&self) {
        self.counts.log();
        info!(
            routes = %self.by_route,
            default = self.to_default.load(Relaxed),
            no_route = self.no_route.load(Relaxed),
            silent = self.silent.load(Relaxed),
            left = self.left.load(Relaxed),
            undecided = self.undecided.load(Relaxed),
            "decisions"
        );
    }
}
