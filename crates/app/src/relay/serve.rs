//! Accepts clients, finds each its other side, and gives both to a worker.

use std::{
    fs::File,
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::MissedTickBehavior,
};
use tracing::{info, warn};

use super::{
    Args, End,
    dial::{self, dial},
    engine::Engine,
    report::{self, Counts},
    settings::{Settings, Target, To},
    tcp,
    worker::{Accepted, Job},
};
use crate::{
    address::{HostPort, Listen},
    error::{Error, Result},
    live,
};

/// Descriptors that are not for connections: epoll sets, maps, pipes kept, logs.
const RESERVED_DESCRIPTORS: u64 = 256;
/// As many connections may wait to be accepted, if the kernel's own limit
/// (`net.core.somaxconn`) allows.
const BACKLOG: i32 = 4096;
const SUMMARY: Duration = Duration::from_mins(1);

pub(crate) fn run(args: Args) -> Result<()> {
    let settings = args.settings()?;
    crate::logging::start();
    let most = raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        if let To::Target(Target { address, via }) = &settings.to {
            let resolved = via.as_ref().map_or(address, |proxy| &proxy.address);
            dial::resolve(resolved).await.map_err(anyhow::Error::from)?;
        }
        let listener = listen(&settings.listen).await?;
        let engine = Engine::start(settings.choice)?;
        Relay::new(settings, engine, most).serve(listener).await
    })
}

/// What accepting connections takes.
struct Relay {
    settings: Settings,
    target: String,
    /// The target's address, if connecting to it needs no name and no proxy.
    direct: Option<SocketAddr>,
    engine: Engine,
    counts: Counts,
    /// As many connections as there are descriptors for.
    most: usize,
    /// When a target that cannot be reached was last told of.
    told: Mutex<Option<Instant>>,
    refusals: Mutex<Refusals>,
}

impl Relay {
    fn new(settings: Settings, engine: Engine, most: usize) -> Arc<Self> {
        let (target, direct) = match &settings.to {
            To::Pair => ("pair".into(), None),
            To::Target(Target { address, via }) => {
                let ip = address.ip().filter(|_| via.is_none());
                (address.to_string(), ip.map(|ip| (ip, address.port).into()))
            }
        };
        Arc::new(Self {
            settings,
            target,
            direct,
            engine,
            counts: Counts::default(),
            most,
            told: Mutex::new(None),
            refusals: Mutex::default(),
        })
    }

    async fn serve(self: Arc<Self>, listener: TcpListener) -> Result<()> {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut summary = tokio::time::interval_at(tokio::time::Instant::now() + SUMMARY, SUMMARY);
        summary.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let address = listener.local_addr().context("no local address")?;
        info!(listen = %address, to = self.target, kernel = self.engine.kernel, "ready");
        let listener = Arc::new(listener);
        let (mut acceptor, mut failure) = self.open(&listener).context("cannot watch the listener")?;
        let status = live::answer("relay", async || self.describe(address).await);
        let mut status = std::pin::pin!(status);
        let mut listed = true;
        loop {
            tokio::select! {
                // It only ever ends with an error, and the relay does its job without.
                result = &mut status, if listed => {
                    listed = false;
                    warn!("not listed by `underpass status`: {:#}", result.err().unwrap_or_else(|| anyhow::anyhow!("ended")));
                }
                result = async { acceptor.as_mut().expect("there is one").accept().await }, if acceptor.is_some() => {
                    result.context("cannot accept")?;
                }
                Some(error) = failure.recv() => return Err(anyhow::Error::from(error).context("cannot accept").into()),
                _ = summary.tick(), if !self.settings.connections.log_connections => self.counts.log(),
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
            }
        }
        // At once, whoever else has it open. It listens: there is no error.
        let _ = SockRef::from(&*listener).shutdown(Shutdown::Both);
        self.engine.close_door();
        drop((acceptor, listener));
        self.stop().await;
        Ok(())
    }

    /// Lets clients in. Where a client needs nothing but a connection to an address the
    /// workers accept it; else it is accepted here. The channel is for a listener that
    /// fails the workers.
    fn open(
        self: &Arc<Self>,
        listener: &Arc<TcpListener>,
    ) -> io::Result<(Option<Acceptor>, mpsc::UnboundedReceiver<io::Error>)> {
        let (fail, failure) = mpsc::unbounded_channel();
        let Some(direct) = self.direct else {
            let listener = readable(Arc::clone(listener))?;
            let acceptor = Acceptor { relay: Arc::clone(self), listener, waiting: None };
            return Ok((Some(acceptor), failure));
        };
        let (relay, of_refusal) = (Arc::clone(self), Arc::clone(listener));
        self.engine.open(listener, move |accepted| match relay.admit(&of_refusal, accepted) {
            Ok(admitted) => admitted.and_then(|(client, peer)| relay.connect(direct, client, peer)),
            Err(error) => {
                // Nobody is there to be told once the relay stops, which shuts the listener.
                let _ = fail.send(error);
                None
            }
        });
        Ok((None, failure))
    }

    /// Makes what `accept` gave ready to be carried, within the limit.
    ///
    /// # Errors
    /// Where the listener itself has failed.
    fn admit(
        &self,
        listener: &TcpListener,
        accepted: Accepted,
    ) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        let (client, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                self.refusals().failed(listener, &self.counts, error)?;
                return Ok(None);
            }
        };
        let open = self.counts.open.fetch_add(1, Ordering::Relaxed);
        if open >= self.most {
            self.turn_away(format_args!("{open} connections are open, as many as there are descriptors for"));
            return Ok(None);
        }
        if let Err(error) = client.set_nonblocking(true) {
            self.turn_away(format_args!("{error}"));
            return Ok(None);
        }
        Ok(Some((client, peer)))
    }

    /// A client that was counted is not served.
    fn turn_away(&self, why: std::fmt::Arguments<'_>) {
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
        self.refusals().refuse(&self.counts, why);
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `underpass status` shows.
    async fn describe(&self, address: SocketAddr) -> serde_json::Value {
        json!({
            "listen": address,
            "to": self.target,
            "path": self.engine.choice.word(),
            "kernel": self.engine.kernel,
            "counts": self.counts.describe(),
            "connections": self.engine.describe().await,
        })
    }

    /// Lets connections finish for the grace time, then ends them.
    async fn stop(&self) {
        let open = || self.counts.open.load(Ordering::Relaxed);
        info!(open = open(), grace = ?self.settings.connections.grace, "stopping");
        let until = Instant::now() + self.settings.connections.grace;
        while open() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.engine.stop();
        // Their last log lines.
        let until = Instant::now() + Duration::from_secs(1);
        while open() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.counts.log();
    }

    /// Starts to connect a client with an address.
    fn connect(self: &Arc<Self>, direct: SocketAddr, client: TcpStream, peer: SocketAddr) -> Option<Job> {
        let begun = Instant::now();
        match dial::start(direct) {
            Ok(target) => {
                let until = begun + self.settings.connections.connect_timeout;
                Some(self.job([client, target], peer, begun, Some(until), None))
            }
            Err(error) => {
                self.unreached(&client, peer, &error, begun);
                None
            }
        }
    }

    /// Connects a client with a target that has a name or is behind a proxy.
    async fn dial(self: Arc<Self>, target: Target, client: TcpStream, peer: SocketAddr) {
        let begun = Instant::now();
        match dial(&target, self.settings.connections.connect_timeout).await {
            Ok(target) => self.engine.carry(self.job([client, target], peer, begun, None, None)),
            Err(error) => self.unreached(&client, peer, &error, begun),
        }
    }

    fn unreached(&self, client: &TcpStream, peer: SocketAddr, error: &dyn std::fmt::Display, begun: Instant) {
        tcp::reset_on_close(client);
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
        self.tell_unreached(peer, error, begun);
    }

    /// A target that cannot be reached is told of even where connections are not
    /// logged, but then at most once a second: the summary has the number.
    fn tell_unreached(&self, peer: SocketAddr, error: &dyn std::fmt::Display, begun: Instant) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if self.settings.connections.log_connections
            || told.is_none_or(|at| at.elapsed() >= Duration::from_secs(1))
        {
            *told = Some(Instant::now());
            report::log_unreached(peer, &self.target, error, begun.elapsed());
        }
    }

    /// `name` is what the log calls the target, if it is another one for each client.
    fn job(
        self: &Arc<Self>,
        [client, target]: [TcpStream; 2],
        peer: SocketAddr,
        begun: Instant,
        connecting: Option<Instant>,
        name: Option<String>,
    ) -> Job {
        let relay = Arc::clone(self);
        Job {
            client,
            target,
            connecting,
            early: vec![],
            choice: self.engine.choice,
            idle: self.settings.connections.idle_timeout,
            done: Box::new(move |report| {
                relay.counts.add(&report);
                if relay.settings.connections.log_connections {
                    report::log(peer, name.as_ref().unwrap_or(&relay.target), &report, begun.elapsed());
                } else if let End::Unreachable(error) = &report.end {
                    relay.tell_unreached(peer, error, begun);
                }
                relay.counts.open.fetch_sub(1, Ordering::Relaxed);
            }),
        }
    }
}

/// Accepts clients that have to be paired, or whose target takes more than connecting.
struct Acceptor {
    relay: Arc<Relay>,
    listener: AsyncFd<Arc<TcpListener>>,
    waiting: Option<Waiting>,
}

/// The first client of a pair.
type Waiting = (AsyncFd<TcpStream>, SocketAddr, Instant);

impl Acceptor {
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
        if let Some((client, peer)) = self.relay.admit(self.listener.get_ref(), accepted)? {
            self.take(client, peer);
        }
        Ok(())
    }

    fn take(&mut self, client: TcpStream, peer: SocketAddr) {
        match &self.relay.settings.to {
            To::Target(target) => {
                tokio::spawn(Arc::clone(&self.relay).dial(target.clone(), client, peer));
            }
            To::Pair => self.pair(client, peer),
        }
    }

    /// Joins a client with the one that waits, or lets it wait.
    fn pair(&mut self, client: TcpStream, peer: SocketAddr) {
        let now = Instant::now();
        match self.waiting.take() {
            Some((first, first_peer, begun)) => {
                let sockets = [first.into_inner(), client];
                // Two clients, one connection between them.
                self.relay.counts.open.fetch_sub(1, Ordering::Relaxed);
                let job = self.relay.job(sockets, first_peer, begun, None, Some(peer.to_string()));
                self.relay.engine.carry(job);
            }
            None => match readable(client) {
                Ok(client) => self.waiting = Some((client, peer, now)),
                Err(error) => self.relay.turn_away(format_args!("{error}")),
            },
        }
    }

    fn forget_waiting(&mut self) {
        if let Some((_, peer, begun)) = self.waiting.take() {
            self.relay.counts.open.fetch_sub(1, Ordering::Relaxed);
            if self.relay.settings.connections.log_connections {
                report::log_unreached(peer, "pair", &"left before another came", begun.elapsed());
            }
        }
    }
}

/// Turns clients away that cannot be served.
#[derive(Debug)]
pub(crate) struct Refusals {
    /// Given up for a moment when descriptors run out, so that a client can be
    /// accepted and closed instead of left waiting.
    spare: Option<File>,
    warned: Option<Instant>,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { spare: File::open("/dev/null").ok(), warned: None }
    }
}

impl Refusals {
    /// Deals with an `accept` that failed.
    ///
    /// # Errors
    /// The error, where the listener itself has failed.
    pub(crate) fn failed(
        &mut self,
        listener: &TcpListener,
        counts: &Counts,
        error: io::Error,
    ) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                self.spare = None;
                drop(listener.accept());
                self.spare = File::open("/dev/null").ok();
                self.refuse(counts, format_args!("{error}"));
                Ok(())
            }
            // The client has left the queue, or an error of its connection shows here (accept(2)).
            Some(
                libc::ECONNABORTED | libc::EPROTO | libc::ENETDOWN | libc::EHOSTUNREACH | libc::ENETUNREACH,
            ) => Ok(()),
            Some(libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => Ok(()),
            _ => Err(error),
        }
    }

    /// Counts a client that was turned away, and says so at most once a second.
    pub(crate) fn refuse(&mut self, counts: &Counts, why: std::fmt::Arguments<'_>) {
        let refused = counts.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if self.warned.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
            self.warned = Some(Instant::now());
            warn!(refused, "a client is refused: {why}");
        }
    }
}

/// Watches a socket of the standard library, which knows nothing of the runtime: the
/// workers take it as it is.
pub(crate) fn readable<T: AsRawFd>(socket: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the sockets given here own their descriptor, which is not changed, and
    // `AsyncFd` owns them until it is dropped or gives them back.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Waits until a client that waits for its pair is gone: reset, or finished without
/// having sent anything. What it has sent stays in its socket, and if it finished
/// after that its bytes are still delivered.
async fn has_left(waiting: Option<&Waiting>) {
    let Some((client, ..)) = waiting else { return std::future::pending().await };
    loop {
        let Ok(mut guard) = client.readable().await else { return };
        match guard.try_io(|client| client.get_ref().peek(&mut [0])) {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(_)) => break,
            Err(_would_block) => {}
        }
    }
    // What it has sent stays readable, and so does its end: only a reset is news now.
    let _ = client.ready(Interest::ERROR).await;
}

/// Opens the port; without a host on all addresses of both families.
pub(crate) async fn listen(address: &Listen) -> Result<TcpListener> {
    let candidates: Vec<SocketAddr> = match &address.host {
        None => vec![([0u16; 8], address.port).into(), ([0u8; 4], address.port).into()],
        Some(host) => {
            let host = HostPort { host: host.clone(), port: address.port };
            dial::resolve(&host).await.map_err(|e| anyhow::anyhow!("--listen: {e}"))?
        }
    };
    let mut last = io::ErrorKind::NotFound.into();
    for candidate in candidates {
        match bind(candidate) {
            Ok(listener) => return Ok(listener),
            Err(error) => {
                let no_such_family = error.raw_os_error() == Some(libc::EAFNOSUPPORT)
                    || (candidate.is_ipv6() && error.kind() == io::ErrorKind::AddrNotAvailable);
                last = error;
                if !no_such_family {
                    break;
                }
            }
        }
    }
    Err(cannot_listen(address, &last))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit both.
    socket.set_tcp_nodelay(true)?;
    tcp::limit_receive_queue(&socket);
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the standard library may name more kinds")]
fn cannot_listen(address: &Listen, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => Error::Failed(anyhow::anyhow!(
            "cannot listen on {address}: the port is in use (`ss -ltnp` shows by whom)"
        )),
        io::ErrorKind::AddrNotAvailable => Error::Failed(anyhow::anyhow!(
            "cannot listen on {address}: no interface of this host has that address"
        )),
        io::ErrorKind::PermissionDenied => Error::Unable(format!(
            "cannot listen on {address}: ports below 1024 need CAP_NET_BIND_SERVICE; take a higher port, or give the \
             binary the capability: setcap cap_net_bind_service+ep"
        )),
        _ => Error::Failed(anyhow::anyhow!("cannot listen on {address}: {error}")),
    }
}

/// Allows as many descriptors as this process may have; returns for how many
/// connections that is enough.
pub(crate) fn raise_descriptor_limit() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 256 };
    // A privileged process may go above its hard limit, up to the system's.
    let system =
        std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let system: u64 = system.unwrap_or(hard);
    let limit = [(system, system), (hard, hard)]
        .into_iter()
        .find(|(soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard).is_ok())
        .map_or(soft, |(soft, _)| soft);
    (limit.saturating_sub(RESERVED_DESCRIPTORS) / 2).max(1) as usize
}
