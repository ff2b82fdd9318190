//! The front that relay and `mux listen` share: the port, who is let in and how many, what
//! clients say of themselves, what is told, and how it all ends.

use std::{
    fmt::Display,
    fs::File,
    io::{self, Read as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    time::MissedTickBehavior,
};
use tracing::{info, warn};

use super::{
    Choice, End, dial,
    origin::{self, Origin},
    report::{self, Counts},
    settings::ConnectionArgs,
    tcp,
    worker::{Accepted, Job, Taken, Undecided},
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
/// How often the summary is logged.
const SUMMARY: Duration = Duration::from_mins(1);

/// Lets clients in.
#[derive(Debug)]
pub struct Front {
    pub counts: Counts,
    pub args: ConnectionArgs,
    /// How many connections there may be, by the user's word or the descriptors'.
    most: usize,
    /// When a target that cannot be reached was last told of.
    told: Mutex<Option<Instant>>,
    refusals: Mutex<Refusals>,
}

/// Why a client is turned away that was let in and then kept its header back.
pub const NO_HEADER: &str = "it sent no whole PROXY protocol header";

/// A client that was let in.
#[derive(Debug)]
pub struct Client {
    pub stream: TcpStream,
    /// By its PROXY protocol header, else where it connects from.
    pub peer: SocketAddr,
    pub begun: Instant,
    /// What was read of it and nobody has got yet.
    pub said: Vec<u8>,
    /// It must begin with a PROXY protocol header, and has not yet.
    pub owes_header: bool,
    origin: Option<Origin>,
    /// Kept for as long as it is connected.
    pub seat: Seat,
}

/// A place among the open connections, free again when dropped.
#[derive(Debug)]
pub struct Seat(Arc<Front>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.counts.open.fetch_sub(1, Relaxed);
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Client {
    /// Takes the header off what was read. Gives whether it was there, or none is due.
    ///
    /// # Errors
    /// Why this is no header.
    pub fn take_header(&mut self) -> Result<bool, &'static str> {
        if !self.owes_header {
            return Ok(true);
        }
        let Some((origin, length)) = origin::read(&self.said)? else { return Ok(false) };
        self.said.drain(..length);
        self.owes_header = false;
        self.origin = origin;
        self.peer = origin.map_or(self.peer, |origin| origin.source);
        Ok(true)
    }

    /// What the target is told of it before its first byte.
    pub fn introduction(&self) -> Vec<u8> {
        let Some(version) = self.seat.0.args.proxy_protocol else { return vec![] };
        let own = || Some(Origin { source: self.peer, destination: self.stream.local_addr().ok()? });
        origin::header(version, self.origin.or_else(own))
    }
}

impl Front {
    /// Without a word of the user's, there may be so many connections.
    pub fn new(args: ConnectionArgs, most: usize) -> Arc<Self> {
        let most = args.max_connections.map_or(most, |wanted| most.min(wanted as usize));
        let (told, refusals) = (Mutex::new(None), Mutex::default());
        Arc::new(Self { counts: Counts::default(), args, most, told, refusals })
    }

    /// Makes what `accept` gave ready to be carried, if it may come in.
    ///
    /// # Errors
    /// Where the listener itself has failed.
    pub fn admit(self: &Arc<Self>, listener: &TcpListener, accepted: Accepted) -> io::Result<Option<Client>> {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                self.refusals().failed(listener, &self.counts, error)?;
                return Ok(None);
            }
        };
        let open = self.counts.open.fetch_add(1, Relaxed);
        let seat = Seat(Arc::clone(self));
        let ip = peer.ip().to_canonical();
        if !self.args.allow.is_empty() && !self.args.allow.iter().any(|network| network.contains(&ip)) {
            self.turn_away(&format_args!("{ip} is in no network of --allow"));
        } else if open >= self.most {
            let by = match self.args.max_connections {
                Some(most) if most as usize == self.most => "--max-connections allows",
                _ => "there are descriptors for",
            };
            self.turn_away(&format_args!("{open} connections are open, as many as {by}"));
        } else if let Err(error) = stream.set_nonblocking(true) {
            self.turn_away(&error);
        } else {
            let (begun, owes_header) = (Instant::now(), self.args.accept_proxy_protocol);
            return Ok(Some(Client { stream, peer, begun, said: vec![], owes_header, origin: None, seat }));
        }
        Ok(None)
    }

    /// Goes on with a client once it has sent its header, if one is due.
    pub fn meet(
        self: &Arc<Self>,
        mut client: Client,
        late: bool,
        then: Box<dyn FnOnce(Client) -> Taken + Send>,
    ) -> Taken {
        match hear(&mut client) {
            Ok(true) => then(client),
            Ok(false) if !late => {
                let (front, until) = (Arc::clone(self), client.begun + self.args.connect_timeout);
                let look = move |client, late| front.meet(client, late, then);
                Taken::Waits(Undecided { client, until, look: Box::new(look) })
            }
            Ok(false) => {
                self.turn_away(&format_args!("{}: {NO_HEADER}", client.peer));
                Taken::Gone
            }
            Err(why) => {
                self.turn_away(&format_args!("{}: {why}", client.peer));
                Taken::Gone
            }
        }
    }

    /// The same as [`Self::meet`], for a client that no worker watches.
    pub async fn met(&self, client: Client) -> Option<Client> {
        if !client.owes_header {
            return Some(client);
        }
        let (peer, until) = (client.peer, client.begun + self.args.connect_timeout);
        let heard = tokio::time::timeout_at(until.into(), hear_all(client)).await;
        match heard.unwrap_or(Err(NO_HEADER)) {
            Ok(client) => Some(client),
            Err(why) => {
                self.turn_away(&format_args!("{peer}: {why}"));
                None
            }
        }
    }

    /// A client is not served.
    pub fn turn_away(&self, why: &dyn Display) {
        self.refusals().refuse(&self.counts, why);
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects a client with a target whose address is known, without waiting until it is
    /// reached. `name` is what the log calls the target.
    pub fn connect(
        self: &Arc<Self>,
        client: Client,
        choice: Choice,
        to: SocketAddr,
        name: Arc<str>,
    ) -> Taken {
        match dial::start(to) {
            Ok(target) => {
                let until = Instant::now() + self.args.connect_timeout;
                Taken::Carried(self.job(client, choice, target, Some(until), name))
            }
            Err(error) => {
                self.unreached(client, &name, &error);
                Taken::Gone
            }
        }
    }

    /// What a worker needs to carry a client that has its other side. `connecting`: until when
    /// that may take to be reached, if it is not yet.
    pub fn job(
        self: &Arc<Self>,
        client: Client,
        choice: Choice,
        target: TcpStream,
        connecting: Option<Instant>,
        name: Arc<str>,
    ) -> Job {
        let front = Arc::clone(self);
        let mut early = client.introduction();
        let Client { stream, peer, begun, said, seat, .. } = client;
        early.extend(said);
        Job {
            client: stream,
            target,
            connecting,
            early,
            choice,
            idle: self.args.idle_timeout,
            done: Box::new(move |report| {
                // First, so that who reads that it has ended finds its seat free.
                drop(seat);
                front.counts.add(&report);
                if front.args.log_connections {
                    report::log(peer, &name, &report, begun.elapsed());
                } else if let End::Unreachable(error) = &report.end {
                    front.tell_unreached(peer, &name, error, begun);
                }
            }),
        }
    }

    /// Ends a client whose target was not reached.
    pub fn unreached(&self, client: Client, target: &str, error: &dyn Display) {
        tcp::reset_on_close(&client.stream);
        self.counts.failed.fetch_add(1, Relaxed);
        self.tell_unreached(client.peer, target, error, client.begun);
    }

    /// A target that cannot be reached is told of even where connections are not
    /// logged, but then at most once a second: the summary has the number.
    pub fn tell_unreached(&self, peer: SocketAddr, target: &str, error: &dyn Display, begun: Instant) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if self.args.log_connections || told.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
            *told = Some(Instant::now());
            report::log_unreached(peer, target, error, begun.elapsed());
        }
    }

    /// Serves until the process is told to stop, or `accept` fails, which ends in no other
    /// way. Meanwhile `underpass status` is answered and the summary logged.
    ///
    /// # Errors
    /// Where accepting failed.
    pub async fn serve(
        &self,
        function: &str,
        listener: &TcpListener,
        accept: impl Future<Output = io::Error>,
        describe: impl AsyncFn() -> Value,
        log: impl Fn(),
    ) -> Result<()> {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut summary = tokio::time::interval_at(tokio::time::Instant::now() + SUMMARY, SUMMARY);
        summary.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut status = std::pin::pin!(live::answer(function, describe));
        let mut accept = std::pin::pin!(accept);
        let mut listed = true;
        loop {
            tokio::select! {
                // It only ever ends with an error, and connections do without.
                result = &mut status, if listed => {
                    listed = false;
                    let why = result.err().unwrap_or_else(|| anyhow::anyhow!("ended"));
                    warn!("not listed by `underpass status`: {why:#}");
                }
                error = &mut accept => return Err(anyhow::Error::from(error).context("cannot accept").into()),
                _ = summary.tick(), if !self.args.log_connections => log(),
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
            }
        }
        // At once, whoever else has it open. It listens: there is no error.
        let _ = SockRef::from(listener).shutdown(Shutdown::Both);
        Ok(())
    }

    /// Lets connections finish for the grace time, then ends them by `end`.
    pub async fn stop(&self, end: impl FnOnce()) {
        info!(open = self.counts.open.load(Relaxed), grace = ?self.args.grace, "stopping");
        self.drain(self.args.grace).await;
        end();
        // Their last log lines.
        self.drain(Duration::from_secs(1)).await;
    }

    async fn drain(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        while self.counts.open.load(Relaxed) > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Accepts clients where no worker does. Ends when the listener fails.
    pub async fn accept_all(
        self: &Arc<Self>,
        listener: &AsyncFd<Arc<TcpListener>>,
        mut take: impl FnMut(Client),
    ) -> io::Error {
        loop {
            let accepted = listener.async_io(Interest::READABLE, |listener| listener.accept()).await;
            match self.admit(listener.get_ref(), accepted) {
                Ok(Some(client)) => take(client),
                Ok(None) => {}
                Err(error) => return error,
            }
        }
    }
}

/// Waits for the header that a client owes.
async fn hear_all(client: Client) -> Result<Client, &'static str> {
    let mut watched = readable(client).map_err(|_| "it cannot be watched")?;
    loop {
        let mut guard = watched.readable_mut().await.map_err(|_| "it cannot be watched")?;
        // Before reading: what comes afterwards must be told anew.
        guard.clear_ready();
        if hear(guard.get_inner_mut())? {
            return Ok(watched.into_inner());
        }
    }
}

/// Reads the header that a client owes. Gives whether it is there.
fn hear(client: &mut Client) -> Result<bool, &'static str> {
    let mut chunk = [0; origin::LONGEST];
    while client.owes_header {
        match (&client.stream).read(&mut chunk) {
            Ok(0) => return Err("it left without a whole PROXY protocol header"),
            Ok(read) => client.said.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err("it left without a whole PROXY protocol header"),
        }
        client.take_header()?;
    }
    Ok(true)
}

/// Turns clients away that cannot be served.
#[derive(Debug)]
struct Refusals {
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
    fn failed(&mut self, listener: &TcpListener, counts: &Counts, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                self.spare = None;
                drop(listener.accept());
                self.spare = File::open("/dev/null").ok();
                self.refuse(counts, &error);
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
    fn refuse(&mut self, counts: &Counts, why: &dyn Display) {
        let refused = counts.refused.fetch_add(1, Relaxed) + 1;
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
