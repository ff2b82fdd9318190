//! The relay: finds each client its other side, and gives both to a worker.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use anyhow::Context as _;
use serde_json::json;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};
use tracing::info;

use super::{
    Args,
    dial::{self, dial},
    engine::Engine,
    front::{Client, Front, listen, raise_descriptor_limit, readable},
    report,
    settings::{Settings, Target, To},
    worker::Taken,
};
use crate::error::Result;

pub(crate) fn run(args: Args) -> Result<()> {
    let settings = args.settings()?;
    crate::logging::start();
    let front = Front::new(settings.connections.clone(), raise_descriptor_limit());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        if let To::Target(Target { address, via }) = &settings.to {
            let resolved = via.as_ref().map_or(address, |proxy| &proxy.address);
            dial::resolve(resolved).await.map_err(anyhow::Error::from)?;
        }
        let listener = listen(&settings.listen).await?;
        let engine = Engine::start(settings.choice)?;
        Relay::new(settings, front, engine).serve(Arc::new(listener)).await
    })
}

/// What a client's other side takes.
struct Relay {
    to: To,
    /// What the log calls it.
    target: Arc<str>,
    /// The target's address, if connecting to it needs no name and no proxy.
    direct: Option<SocketAddr>,
    front: Arc<Front>,
    engine: Engine,
    /// For what takes more than connecting to an address.
    runtime: Handle,
}

impl Relay {
    fn new(settings: Settings, front: Arc<Front>, engine: Engine) -> Arc<Self> {
        let (target, direct) = match &settings.to {
            To::Pair => ("pair".into(), None),
            To::Target(Target { address, via }) => {
                let ip = address.ip().filter(|_| via.is_none());
                (address.to_string().into(), ip.map(|ip| (ip, address.port).into()))
            }
        };
        Arc::new(Self { to: settings.to, target, direct, front, engine, runtime: Handle::current() })
    }

    async fn serve(self: Arc<Self>, listener: Arc<TcpListener>) -> Result<()> {
        let address = listener.local_addr().context("no local address")?;
        info!(listen = %address, to = &*self.target, kernel = self.engine.kernel, "ready");
        let (describe, log) = (async || self.describe(address).await, || self.front.counts.log());
        if let To::Target(target) = &self.to {
            let accept = self.open(&listener, target);
            self.front.serve("relay", &listener, accept, describe, log).await?;
            self.engine.close_door();
        } else {
            let watched = readable(Arc::clone(&listener)).context("cannot watch the listener")?;
            let accept = Acceptor { relay: &self, listener: watched, waiting: None }.accept_all();
            self.front.serve("relay", &listener, accept, describe, log).await?;
        }
        drop(listener);
        self.front.stop(|| self.engine.stop()).await;
        self.front.counts.log();
        Ok(())
    }

    /// Lets the workers accept clients. Ends when the listener fails them.
    async fn open(self: &Arc<Self>, listener: &Arc<TcpListener>, target: &Target) -> io::Error {
        let (relay, target) = (Arc::clone(self), target.clone());
        let take = move |client| {
            let (next, target) = (Arc::clone(&relay), target.clone());
            relay.front.meet(client, false, Box::new(move |client| next.go(client, target)))
        };
        self.engine.open(&self.front, listener, take).await
    }

    /// Connects a client with its target.
    fn go(self: Arc<Self>, client: Client, target: Target) -> Taken {
        let Some(direct) = self.direct else {
            let runtime = self.runtime.clone();
            let dial = move |client| drop(runtime.spawn(self.dial(target, client)));
            return Taken::Elsewhere(client, Box::new(dial));
        };
        self.front.connect(client, self.engine.choice, direct, Arc::clone(&self.target))
    }

    /// Connects a client with a target that has a name or is behind a proxy.
    async fn dial(self: Arc<Self>, target: Target, client: Client) {
        match dial(&target, self.front.args.connect_timeout).await {
            Ok(stream) => {
                let (choice, name) = (self.engine.choice, Arc::clone(&self.target));
                self.engine.carry(self.front.job(client, choice, stream, None, name));
            }
            Err(error) => self.front.unreached(client, &self.target, &error),
        }
    }

    /// What `underpass status` shows.
    async fn describe(&self, address: SocketAddr) -> serde_json::Value {
        json!({
            "listen": address,
            "to": *self.target,
            "path": self.engine.choice.word(),
            "kernel": self.engine.kernel,
            "counts": self.front.counts.describe(),
            "connections": self.engine.describe().await,
        })
    }
}

/// Accepts clients that are to be paired.
struct Acceptor<'a> {
    relay: &'a Arc<Relay>,
    listener: AsyncFd<Arc<TcpListener>>,
    /// The first client of a pair.
    waiting: Option<AsyncFd<Client>>,
}

impl Acceptor<'_> {
    async fn accept_all(mut self) -> io::Error {
        loop {
            if let Err(error) = self.accept().await {
                return error;
            }
        }
    }

    /// Takes one client that waits to be accepted, or notices that a client that waits for its
    /// pair has left.
    async fn accept(&mut self) -> io::Result<()> {
        let accepted = tokio::select! {
            accepted = self.listener.async_io(Interest::READABLE, |listener| listener.accept()) => accepted,
            () = has_left(self.waiting.as_ref()) => {
                self.forget_waiting();
                return Ok(());
            }
        };
        if let Some(client) = self.relay.front.admit(self.listener.get_ref(), accepted)? {
            self.pair(client);
        }
        Ok(())
    }

    /// Joins a client with the one that waits, or lets it wait.
    fn pair(&mut self, client: Client) {
        match self.waiting.take() {
            Some(first) => {
                let Relay { front, engine, .. } = &**self.relay;
                let name = client.peer.to_string().into();
                // Two clients, one connection between them: the second one's seat is free.
                engine.carry(front.job(first.into_inner(), engine.choice, client.stream, None, name));
            }
            None => match readable(client) {
                Ok(client) => self.waiting = Some(client),
                Err(error) => self.relay.front.turn_away(&error),
            },
        }
    }

    fn forget_waiting(&mut self) {
        if let Some(client) = self.waiting.take()
            && self.relay.front.args.log_connections
        {
            let Client { peer, begun, .. } = client.get_ref();
            report::log_unreached(*peer, "pair", &"left before another came", begun.elapsed());
        }
    }
}

/// Waits until a client that waits for its pair is gone: reset, or finished without
/// having sent anything. What it has sent stays in its socket, and if it finished
/// after that its bytes are still delivered.
async fn has_left(waiting: Option<&AsyncFd<Client>>) {
    let Some(client) = waiting else { return std::future::pending().await };
    loop {
        let Ok(mut guard) = client.readable().await else { return };
        match guard.try_io(|client| client.get_ref().stream.peek(&mut [0])) {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(_)) => break,
            Err(_would_block) => {}
        }
    }
    // What it has sent stays readable, and so does its end: only a reset is news now.
    let _ = client.ready(Interest::ERROR).await;
}
