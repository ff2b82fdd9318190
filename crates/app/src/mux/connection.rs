//! `mux listen --per connection`: the first bytes of a connection decide where it
//! goes; then the relay's workers carry it, those bytes first.
//!
//! What an undecided connection may take is bounded: [`PEEK`] bytes, the peek
//! timeout (in all, so that a trickle does not prolong it), and the number of them.
//! Whatever is not decided by then goes by what has arrived, else to the default.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tracing::info;
use underpass_logic::mux::{Decision, Opening};

use super::{
    listen::ByRoute,
    route::{Match, Route},
};
use crate::{
    address::HostPort,
    relay::{
        dial,
        engine::Engine,
        front::{Client, Front, NO_HEADER},
        report,
        worker::{Taken, Undecided},
    },
};

/// How many bytes of a connection are looked at, at most. A ClientHello has at most a
/// few thousand, with post-quantum key shares; HTTP servers take requests of 8 KiB.
pub const PEEK: usize = 16 << 10;

/// What undecided connections may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many there are.
    pub undecided: usize,
    /// How long one is undecided.
    pub peek: Duration,
}

/// All that deciding takes.
#[derive(Debug)]
pub struct Connections {
    matches: Vec<Match>,
    /// One for each route, and then the default's, if there is one.
    targets: Vec<Target>,
    default: Option<usize>,
    pub front: Arc<Front>,
    pub engine: Engine,
    /// For targets that have a name.
    runtime: Handle,
    limits: Limits,
    undecided: AtomicUsize,
    by_route: ByRoute,
    no_route: AtomicU64,
    silent: AtomicU64,
    left: AtomicU64,
}

#[derive(Debug)]
struct Target {
    address: HostPort,
    /// If connecting to it needs no name.
    direct: Option<SocketAddr>,
    text: Arc<str>,
}

impl From<HostPort> for Target {
    fn from(address: HostPort) -> Self {
        let direct = address.ip().map(|ip| (ip, address.port).into());
        Self { direct, text: address.to_string().into(), address }
    }
}

/// What looking at a client gave.
enum Look {
    /// Where it goes, if anywhere.
    Decided(Option<usize>),
    /// More must come: before so many bytes are there it makes no sense to look again.
    Wait(usize),
    /// It is gone.
    Left,
    /// What it must begin with is missing.
    Wrong(&'static str),
}

/// A place among the undecided connections, free again when dropped.
struct Place(Arc<Connections>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.undecided.fetch_sub(1, Relaxed);
    }
}

impl Connections {
    pub fn new(
        routes: Vec<Route<HostPort>>,
        default: Option<HostPort>,
        front: Arc<Front>,
        engine: Engine,
        limits: Limits,
    ) -> Arc<Self> {
        let by_route = ByRoute::new(&routes, default.as_ref());
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
            front,
            engine,
            runtime: Handle::current(),
            limits,
            undecided: AtomicUsize::new(0),
            by_route,
            no_route: AtomicU64::new(0),
            silent: AtomicU64::new(0),
            left: AtomicU64::new(0),
        })
    }

    /// What becomes of a client that was let in.
    pub fn take(self: &Arc<Self>, mut client: Client) -> Taken {
        match self.look(&mut client, 0) {
            Look::Wait(needed) if self.undecided.load(Relaxed) < self.limits.undecided => {
                self.undecided.fetch_add(1, Relaxed);
                self.wait(client, needed, Place(Arc::clone(self)))
            }
            look @ (Look::Decided(_) | Look::Wait(_) | Look::Left | Look::Wrong(_)) => self.act(client, look),
        }
    }

    /// Lets a client say more, as long as that may take.
    fn wait(self: &Arc<Self>, client: Client, needed: usize, place: Place) -> Taken {
        let (this, until) = (Arc::clone(self), client.begun + self.limits.peek);
        let look = move |mut client: Client, late: bool| match this.look(&mut client, needed) {
            Look::Wait(needed) if !late => this.wait(client, needed, place),
            look @ (Look::Decided(_) | Look::Wait(_) | Look::Left | Look::Wrong(_)) => {
                drop(place);
                this.act(client, look)
            }
        };
        Taken::Waits(Undecided { client, until, look: Box::new(look) })
    }

    /// Reads what has come and decides, if it can be decided.
    fn look(&self, client: &mut Client, mut needed: usize) -> Look {
        let mut chunk = [0; PEEK];
        loop {
            let room = PEEK - client.said.len();
            match (&client.stream).read(&mut chunk[..room]) {
                Ok(0) if client.said.is_empty() || client.owes_header => return Look::Left,
                Ok(0) => return Look::Decided(self.decide(&client.said, true).unwrap_or_default()),
                Ok(read) => {
                    client.said.extend_from_slice(&chunk[..read]);
                    match client.take_header() {
                        Err(why) => return Look::Wrong(why),
                        Ok(false) => {}
                        Ok(true) if client.said.is_empty() => {}
                        Ok(true) => {
                            let full = client.said.len() == PEEK;
                            if full || client.said.len() >= needed {
                                match self.decide(&client.said, full) {
                                    Ok(to) => return Look::Decided(to),
                                    Err(more) => needed = more,
                                }
                            }
                        }
                    }
                    // On to the next read, even after a short one: an end that has come already is
                    // not told of again.
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Look::Wait(needed),
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

    fn act(self: &Arc<Self>, client: Client, look: Look) -> Taken {
        match look {
            Look::Decided(Some(index)) => self.forward(client, index),
            Look::Decided(None) => {
                self.no_route.fetch_add(1, Relaxed);
                if self.front.args.log_connections {
                    report::log_unreached(client.peer, "none", &"no route takes it", client.begun.elapsed());
                }
                Taken::Gone
            }
            Look::Left => {
                self.left.fetch_add(1, Relaxed);
                Taken::Gone
            }
            Look::Wrong(why) => {
                self.front.turn_away(&format_args!("{}: {why}", client.peer));
                Taken::Gone
            }
            Look::Wait(_) if client.owes_header => {
                self.front.turn_away(&format_args!("{}: {NO_HEADER}", client.peer));
                Taken::Gone
            }
            // No more is waited for: what is there decides.
            Look::Wait(_) => {
                self.silent.fetch_add(u64::from(client.said.is_empty()), Relaxed);
                let to = self.decide(&client.said, true).unwrap_or_default();
                self.act(client, Look::Decided(to))
            }
        }
    }

    fn forward(self: &Arc<Self>, client: Client, index: usize) -> Taken {
        self.by_route.count(index, 1);
        let target = &self.targets[index];
        let Some(direct) = target.direct else {
            let (this, runtime) = (Arc::clone(self), self.runtime.clone());
            let dial = move |client| drop(runtime.spawn(async move { this.dial(client, index).await }));
            return Taken::Elsewhere(client, Box::new(dial));
        };
        self.front.connect(client, self.engine.choice, direct, Arc::clone(&target.text))
    }

    async fn dial(self: Arc<Self>, client: Client, index: usize) {
        let (target, timeout) = (&self.targets[index], self.front.args.connect_timeout);
        match dial::within(timeout, &target.address).await {
            Ok(stream) => {
                let (choice, name) = (self.engine.choice, Arc::clone(&target.text));
                self.engine.carry(self.front.job(client, choice, stream, None, name));
            }
            Err(error) => self.front.unreached(client, &target.text, &error),
        }
    }

    /// What `underpass status` and `mux show` show.
    pub async fn describe(&self) -> Value {
        json!({
            "per": "connection",
            "path": self.engine.choice.word(),
            "kernel": self.engine.kernel,
            "counts": self.front.counts.describe(),
            "routes": self.by_route.describe("connections"),
            "no_route": self.no_route.load(Relaxed),
            "silent": self.silent.load(Relaxed),
            "left": self.left.load(Relaxed),
            "undecided": self.undecided.load(Relaxed),
            "connections": self.engine.describe().await,
        })
    }

    pub fn log(&self) {
        self.front.counts.log();
        info!(
            routes = %self.by_route,
            no_route = self.no_route.load(Relaxed),
            silent = self.silent.load(Relaxed),
            left = self.left.load(Relaxed),
            undecided = self.undecided.load(Relaxed),
            "decisions"
        );
    }
}
