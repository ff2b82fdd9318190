//! `mux listen --per message`: one client connection carries many messages, and each
//! goes whole and in order to the backend that its tag names.
//!
//! Messages are sorted a buffer at a time and written from where they were read, by
//! one vectored write for each backend: there is neither a copy nor a system call
//! for each message. Replies go back whole, from one backend at a time.
//!
//! A backend that does not keep up stops the reading, and with it the client
//! ([`WhenFull::Wait`]), or has a bounded queue and loses what does not fit
//! ([`WhenFull::Drop`]). Nothing else is ever kept but the rest of a message.

use std::{
    collections::VecDeque,
    fmt,
    future::{Future as _, poll_fn},
    io::{self, IoSlice},
    ops::RangeInclusive,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use serde_json::{Value, json};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream, task::JoinHandle, time::Instant};
use underpass_abi::mux::Table;
use underpass_logic::mux::{frame::Frame, table};

use super::listen::ByRoute;
use crate::{
    address::HostPort,
    relay::{
        dial::{self, DialError},
        front::{Client, Front},
    },
};

/// The buffer that a connection starts with, in bytes; it grows while reads fill it.
const BUFFER: usize = 16 << 10;
/// The buffer that reads can make it grow to: what is read is written while it is still in
/// the CPU's cache. A message that is longer makes it as long as the message.
const LARGE_BUFFER: usize = 128 << 10;
/// What waits for a backend with [`WhenFull::Drop`], at most, if no message is longer.
const QUEUE: usize = 256 << 10;
/// The longest message where `--length` does not say.
pub const MAX_MESSAGE: u32 = 1 << 20;
/// The longest message that `--length` can allow: each is held in memory whole.
pub const LONGEST: u32 = 64 << 20;
/// How many messages one write carries, at most (UIO_MAXIOV).
const MAX_SLICES: usize = 1024;
/// How long a backend that failed is left alone, with [`WhenFull::Drop`].
const RETRY: Duration = Duration::from_secs(1);

/// What happens if a backend does not keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WhenFull {
    /// The client waits, and with it the messages for all other backends
    Wait,
    /// Its messages are dropped; the other backends are not held up
    Drop,
}

/// What happens to a message of a wrong length or without a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Invalid {
    /// It is skipped
    Drop,
    /// It ends the client's connection
    Close,
}

/// How messages are told apart and where they go.
#[derive(Debug)]
pub struct Plan {
    /// Where a message ends.
    pub frame: Frame,
    /// The lengths that are valid, in bytes.
    pub lengths: RangeInclusive<u32>,
    /// The tags; each slot's `order` is the index of its backend.
    pub table: Box<Table>,
    /// One for each route, and then the default's, if there is one.
    pub backends: Vec<HostPort>,
    /// The index of the backend for messages without a route.
    pub default: Option<usize>,
    /// Messages delivered, by backend.
    pub by_route: ByRoute,
    /// If a backend does not keep up.
    pub when_full: WhenFull,
    /// If a message is not valid.
    pub invalid: Invalid,
    /// How long connecting to a backend may take.
    pub connect_timeout: Duration,
    /// How long nothing may move.
    pub idle_timeout: Duration,
}

/// What has been counted, for one connection or for all.
#[derive(Debug, Default)]
pub struct Tally {
    /// Messages delivered (or put into a backend's queue).
    pub messages: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Replies handed to clients.
    pub replies: AtomicU64,
    /// Their bytes.
    pub reply_bytes: AtomicU64,
    /// Messages of a length that is not valid.
    pub wrong_length: AtomicU64,
    /// Messages without a route.
    pub no_route: AtomicU64,
    /// Messages dropped as a backend's queue was full.
    pub full: AtomicU64,
    /// Messages dropped as a backend could not be reached.
    pub unreachable: AtomicU64,
    /// Messages cut off by the end of their connection.
    pub cut_off: AtomicU64,
}

impl Tally {
    /// The counters by name.
    pub fn named(&self) -> [(&'static str, u64); 9] {
        [
            ("messages", &self.messages),
            ("bytes", &self.bytes),
            ("replies", &self.replies),
            ("reply bytes", &self.reply_bytes),
            ("dropped: wrong length", &self.wrong_length),
            ("dropped: no route", &self.no_route),
            ("dropped: backend full", &self.full),
            ("dropped: backend unreachable", &self.unreachable),
            ("cut off", &self.cut_off),
        ]
        .map(|(name, counter)| (name, counter.load(Relaxed)))
    }

    /// Adds what another counted.
    pub fn add(&self, other: &Self) {
        let ours = self.counters();
        for (ours, theirs) in ours.into_iter().zip(other.counters()) {
            ours.fetch_add(theirs.load(Relaxed), Relaxed);
        }
    }

    fn counters(&self) -> [&AtomicU64; 9] {
        [
            &self.messages,
            &self.bytes,
            &self.replies,
            &self.reply_bytes,
            &self.wrong_length,
            &self.no_route,
            &self.full,
            &self.unreachable,
            &self.cut_off,
        ]
    }

    fn moved(&self) -> u64 {
        self.bytes.load(Relaxed) + self.reply_bytes.load(Relaxed) + self.wrong_length.load(Relaxed)
    }
}

/// All that serving clients takes.
#[derive(Debug)]
pub struct Messages {
    plan: Plan,
    front: Arc<Front>,
    /// Of connections that have finished.
    total: Tally,
    /// Of those that have not.
    running: Mutex<Vec<Arc<Tally>>>,
}

impl Messages {
    /// Serves clients by a plan.
    pub fn new(plan: Plan, front: Arc<Front>) -> Arc<Self> {
        Arc::new(Self { plan, front, total: Tally::default(), running: Mutex::default() })
    }

    /// Serves a client that was let in.
    pub async fn serve(self: Arc<Self>, client: Client) {
        let Some(client) = self.front.met(client).await else { return };
        let introduction = client.introduction();
        let Client { stream, peer, begun, said, seat, .. } = client;
        let tally = Arc::new(Tally::default());
        self.running().push(Arc::clone(&tally));
        let result = match TcpStream::from_std(stream) {
            Ok(client) => serve(client, said, introduction, &self.plan, &tally).await,
            Err(error) => Err(Ended::Client(error)),
        };
        self.finish(&tally);
        self.front.counts.finished.fetch_add(1, Relaxed);
        if result.is_err() {
            self.front.counts.failed.fetch_add(1, Relaxed);
        }
        if self.front.args.log_connections {
            let end = result.err().map_or("closed".to_owned(), |why| why.to_string());
            tracing::info!(client = %peer, %tally, duration = ?begun.elapsed(), end, "connection");
        }
        drop(seat);
    }

    fn running(&self) -> MutexGuard<'_, Vec<Arc<Tally>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, tally: &Arc<Tally>) {
        let mut running = self.running();
        running.retain(|other| !Arc::ptr_eq(other, tally));
        self.total.add(tally);
    }

    /// Of all connections, those that run among them.
    fn all(&self) -> Tally {
        let (running, all) = (self.running(), Tally::default());
        all.add(&self.total);
        running.iter().for_each(|tally| all.add(tally));
        all
    }

    /// What `underpass status` and `mux show` show.
    pub fn describe(&self) -> Value {
        let tally = self.all().named().into_iter();
        let tally: Value =
            tally.map(|(name, count)| (name.replace([' ', ':'], "_").replace("__", "_"), count)).collect();
        json!({
            "per": "message",
            "path": "copy",
            "counts": self.front.counts.describe(),
            "routes": self.plan.by_route.describe("messages"),
            "messages": tally,
        })
    }

    /// The summary.
    pub fn log(&self) {
        let counts = &self.front.counts;
        tracing::info!(
            open = counts.open.load(Relaxed),
            finished = counts.finished.load(Relaxed),
            failed = counts.failed.load(Relaxed),
            refused = counts.refused.load(Relaxed),
            routes = %self.plan.by_route,
            tally = %self.all(),
            "summary"
        );
    }
}

impl fmt::Display for Tally {
    /// Those that are not zero.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, count) in self.named().into_iter().filter(|(_, count)| *count > 0) {
            write!(f, "{separator}{name}: {count}")?;
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("nothing") } else { Ok(()) }
    }
}

/// Why a connection ended before both sides had finished.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The client's side failed.
    #[error("the client's connection failed: {0}")]
    Client(io::Error),
    /// A backend's side failed.
    #[error("backend {0} failed: {1}")]
    Backend(String, io::Error),
    /// A backend could not be reached.
    #[error("{0}")]
    Unreachable(#[from] DialError),
    /// A message that is not valid, with [`Invalid::Close`].
    #[error("{0}")]
    Invalid(&'static str),
    /// The stream can no longer be told apart into messages.
    #[error("a message {0} says that it has {1} bytes, which cannot be")]
    Frame(&'static str, u64),
    /// Nothing moved for too long.
    #[error("idle for {0:?}")]
    Idle(Duration),
}

/// Carries the messages of one client to their backends, and the replies back.
///
/// `said` is what was read of the client already; `introduction` goes first to each backend.
///
/// # Errors
/// Why it ended early. The client is reset if messages may have been lost by it.
async fn serve(
    client: TcpStream,
    said: Vec<u8>,
    introduction: Vec<u8>,
    plan: &Plan,
    tally: &Tally,
) -> Result<(), Ended> {
    let backends = Backends::new(plan.backends.len(), introduction);
    let forward = forward(&client, said, plan, &backends, tally);
    let replies = replies(&client, plan, &backends, tally);
    let both = async { tokio::try_join!(forward, replies).map(|_| ()) };
    let result = tokio::select! {
        result = both => result,
        idle = idle(plan.idle_timeout, tally) => Err(idle),
    };
    if let Err(Ended::Client(_) | Ended::Backend(..) | Ended::Unreachable(_)) = &result {
        // Who is still there must not take the end for an orderly one.
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
        backends.reset();
    }
    result
}

async fn idle(timeout: Duration, tally: &Tally) -> Ended {
    let mut before = tally.moved();
    loop {
        tokio::time::sleep(timeout).await;
        let now = tally.moved();
        if now == before {
            return Ended::Idle(timeout);
        }
        before = now;
    }
}

/// Client to backends.
async fn forward(
    client: &TcpStream,
    said: Vec<u8>,
    plan: &Plan,
    backends: &Backends,
    tally: &Tally,
) -> Result<(), Ended> {
    let mut sorter = Sorter::new(plan, said);
    let mut end = false;
    let mut outlets: Vec<Outlet> = plan.backends.iter().map(|_| Outlet::default()).collect();
    loop {
        sorter.sort(plan, tally)?;
        match plan.when_full {
            WhenFull::Wait => deliver_all(client, &mut sorter, plan, &mut outlets, backends, tally).await?,
            WhenFull::Drop => deliver_some(&mut sorter, plan, &mut outlets, backends, tally),
        }
        sorter.compact();
        if end {
            break;
        }
        end = fill(client, &mut sorter, plan, &mut outlets, tally, backends).await?;
    }
    if sorter.filled > 0 || sorter.skip > 0 {
        tally.cut_off.fetch_add(1, Relaxed);
    }
    poll_fn(
        |cx| if flush(cx, plan, &mut outlets, tally, backends) { Poll::Ready(()) } else { Poll::Pending },
    )
    .await;
    backends.finish();
    Ok(())
}

/// Reads from the client, and meanwhile writes what waits in queues. Gives whether
/// the client has finished.
async fn fill(
    client: &TcpStream,
    sorter: &mut Sorter,
    plan: &Plan,
    outlets: &mut [Outlet],
    tally: &Tally,
    backends: &Backends,
) -> Result<bool, Ended> {
    loop {
        poll_fn(|cx| {
            if plan.when_full == WhenFull::Drop {
                flush(cx, plan, outlets, tally, backends);
            }
            client.poll_read_ready(cx)
        })
        .await
        .map_err(Ended::Client)?;
        match client.try_read(sorter.room()) {
            Ok(read) => {
                sorter.filled += read;
                return Ok(read == 0);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Ended::Client(error)),
        }
    }
}

/// Hands every message that was sorted to its backend, however long that takes.
async fn deliver_all(
    client: &TcpStream,
    sorter: &mut Sorter,
    plan: &Plan,
    outlets: &mut [Outlet],
    backends: &Backends,
    tally: &Tally,
) -> Result<(), Ended> {
    let Sorter { buffer, batches, touched, .. } = sorter;
    // First what each takes at once, so that a slow backend holds the others up as
    // little as can be.
    for patient in [false, true] {
        for &index in touched.iter() {
            let batch = &mut batches[index];
            let failed = |error| Ended::Backend(plan.backends[index].to_string(), error);
            while !batch.is_empty() {
                let Some(stream) = outlets[index].stream().cloned() else {
                    let to = &plan.backends[index];
                    let stream = connect(to, plan.connect_timeout, &backends.introduction).await?;
                    let stream = Arc::new(stream);
                    backends.add(index, Arc::clone(&stream));
                    outlets[index].state = State::Open(stream);
                    continue;
                };
                if batch.write(&stream, buffer).map_err(failed)? {
                    continue;
                }
                if !patient {
                    break;
                }
                tokio::select! {
                    ready = stream.writable() => ready.map_err(failed)?,
                    () = gone(client) => return Err(Ended::Client(io::ErrorKind::ConnectionReset.into())),
                }
            }
        }
    }
    for &index in touched.iter() {
        plan.by_route.count(index, batches[index].delivered(tally));
    }
    Ok(())
}

/// Hands every message that was sorted to its backend or into its queue, or drops it.
fn deliver_some(
    sorter: &mut Sorter,
    plan: &Plan,
    outlets: &mut [Outlet],
    backends: &Backends,
    tally: &Tally,
) {
    let Sorter { buffer, batches, touched, .. } = sorter;
    for &index in touched.iter() {
        let (outlet, batch) = (&mut outlets[index], &mut batches[index]);
        outlet.start(&plan.backends[index], plan.connect_timeout, &backends.introduction);
        if let (State::Open(stream), true) = (&outlet.state, outlet.queue.is_empty())
            && batch.write(stream, buffer).is_err()
        {
            outlet.fail(backends, index);
        }
        let (mut full, mut unreachable) = (0, 0);
        let failed = matches!(outlet.state, State::Failed(_));
        while let Some((message, whole)) = batch.next(buffer) {
            if failed {
                unreachable += 1;
            } else if !whole || outlet.queue.len() + message.len() <= plan.queue() {
                // What has been written in part must be completed: it fits always.
                outlet.queue.extend(message);
                continue;
            } else {
                full += 1;
            }
            batch.dropped += 1;
            batch.dropped_bytes += message.len() as u64;
        }
        tally.full.fetch_add(full, Relaxed);
        tally.unreachable.fetch_add(unreachable, Relaxed);
        plan.by_route.count(index, batch.delivered(tally));
    }
}

/// Writes what waits in queues, as far as that goes without waiting. Gives whether
/// nothing waits any more.
fn flush(
    cx: &mut Context<'_>,
    plan: &Plan,
    outlets: &mut [Outlet],
    tally: &Tally,
    backends: &Backends,
) -> bool {
    let mut empty = true;
    for (index, outlet) in outlets.iter_mut().enumerate() {
        if let State::Connecting(connecting) = &mut outlet.state {
            match Pin::new(connecting).poll(cx) {
                Poll::Ready(Ok(Ok(stream))) => {
                    let stream = Arc::new(stream);
                    backends.add(index, Arc::clone(&stream));
                    outlet.state = State::Open(stream);
                }
                Poll::Ready(result) => {
                    if let Ok(Err(error)) = result {
                        tracing::warn!("{error}");
                    }
                    tally.unreachable.fetch_add(u64::from(!outlet.queue.is_empty()), Relaxed);
                    outlet.fail(backends, index);
                }
                Poll::Pending => {
                    empty &= outlet.queue.is_empty();
                    continue;
                }
            }
        }
        let State::Open(stream) = &outlet.state else { continue };
        let stream = Arc::clone(stream);
        while !outlet.queue.is_empty() {
            if stream.poll_write_ready(cx).is_pending() {
                break;
            }
            let (first, second) = outlet.queue.as_slices();
            match stream.try_write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(written) => drop(outlet.queue.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!("backend {} failed: {error}", plan.backends[index]);
                    outlet.fail(backends, index);
                }
            }
        }
        empty &= outlet.queue.is_empty();
    }
    empty
}

/// Ends when the client's connection has failed, not when it has only finished sending.
async fn gone(client: &TcpStream) {
    loop {
        match client.ready(Interest::ERROR).await {
            Ok(ready) if !ready.is_error() => tokio::task::yield_now().await,
            Ok(_) | Err(_) => return,
        }
    }
}

async fn connect(to: &HostPort, timeout: Duration, introduction: &[u8]) -> Result<TcpStream, DialError> {
    let connected = async {
        let stream = dial::connect(to).await?;
        let sent = write_all(&stream, introduction).await;
        sent.map(|()| stream).map_err(|error| DialError::Connect(to.to_string(), error))
    };
    tokio::time::timeout(timeout, connected).await.map_err(|_| DialError::TimedOut(timeout))?
}

/// The way to one backend.
#[derive(Debug, Default)]
struct Outlet {
    state: State,
    /// What waits, with [`WhenFull::Drop`].
    queue: VecDeque<u8>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Unused,
    Connecting(JoinHandle<Result<TcpStream, DialError>>),
    Open(Arc<TcpStream>),
    Failed(Instant),
}

impl Outlet {
    fn stream(&self) -> Option<&Arc<TcpStream>> {
        match &self.state {
            State::Open(stream) => Some(stream),
            State::Unused | State::Connecting(_) | State::Failed(_) => None,
        }
    }

    /// Starts to connect, unless that has been done or has failed just now.
    fn start(&mut self, to: &HostPort, timeout: Duration, introduction: &[u8]) {
        let start = match &self.state {
            State::Unused => true,
            State::Failed(when) => when.elapsed() >= RETRY,
            State::Connecting(_) | State::Open(_) => false,
        };
        if start {
            let (to, introduction) = (to.clone(), introduction.to_vec());
            let connect = async move { connect(&to, timeout, &introduction).await };
            self.state = State::Connecting(tokio::spawn(connect));
        }
    }

    fn fail(&mut self, backends: &Backends, index: usize) {
        self.state = State::Failed(Instant::now());
        self.queue = VecDeque::new();
        backends.remove(index);
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        if let State::Connecting(connecting) = &self.state {
            connecting.abort();
        }
    }
}

impl Plan {
    /// The longest message that is carried, in bytes.
    fn longest(&self) -> usize {
        *self.lengths.end() as usize
    }

    fn queue(&self) -> usize {
        QUEUE.max(self.longest())
    }
}

/// Where messages lie in the buffer, for one backend.
#[derive(Debug, Default)]
struct Batch {
    /// Start and length of each.
    messages: Vec<(u32, u32)>,
    /// How many of them are done with.
    done: usize,
    /// How much of the first that is not done with has been written.
    written: usize,
    bytes: u64,
    dropped: u64,
    dropped_bytes: u64,
}

impl Batch {
    fn push(&mut self, start: usize, length: usize) {
        self.messages.push((start as u32, length as u32));
        self.bytes += length as u64;
    }

    fn is_empty(&self) -> bool {
        self.done == self.messages.len()
    }

    /// Writes as much as goes without waiting. Gives whether anything did.
    fn write(&mut self, to: &TcpStream, buffer: &[u8]) -> io::Result<bool> {
        let mut any = false;
        while !self.is_empty() {
            let mut slices = Vec::with_capacity(MAX_SLICES.min(self.messages.len() - self.done));
            let (mut skip, mut offered) = (self.written, 0);
            for &(start, length) in self.messages[self.done..].iter().take(MAX_SLICES) {
                let (start, end) = (start as usize + skip, start as usize + length as usize);
                slices.push(IoSlice::new(&buffer[start..end]));
                offered += end - start;
                skip = 0;
            }
            match to.try_write_vectored(&slices) {
                Ok(written) => {
                    self.advance(written);
                    any = true;
                    if written < offered {
                        // The socket is full; asking again would only say so.
                        return Ok(any);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) => return Err(error),
            }
        }
        Ok(any)
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(&(_, length)) = self.messages.get(self.done) {
            let left = length as usize - self.written;
            if written < left {
                self.written += written;
                return;
            }
            written -= left;
            self.written = 0;
            self.done += 1;
        }
    }

    /// The next message, or what has not been written of it, and whether it is whole.
    fn next<'b>(&mut self, buffer: &'b [u8]) -> Option<(&'b [u8], bool)> {
        let &(start, length) = self.messages.get(self.done)?;
        let (start, written) = (start as usize, std::mem::take(&mut self.written));
        self.done += 1;
        Some((&buffer[start + written..start + length as usize], written == 0))
    }

    /// Counts what was delivered, and gives how many messages that are.
    fn delivered(&mut self, tally: &Tally) -> u64 {
        let delivered = self.messages.len() as u64 - self.dropped;
        tally.messages.fetch_add(delivered, Relaxed);
        tally.bytes.fetch_add(self.bytes.saturating_sub(self.dropped_bytes), Relaxed);
        self.messages.clear();
        (self.done, self.written, self.bytes, self.dropped, self.dropped_bytes) = (0, 0, 0, 0, 0);
        delivered
    }
}

/// What has been read and not yet delivered, sorted by backend.
#[derive(Debug)]
struct Sorter {
    buffer: Vec<u8>,
    /// How much of the buffer has been read into.
    filled: usize,
    /// How much of that has been sorted.
    used: usize,
    /// How many bytes of a message that is dropped are still to come.
    skip: u64,
    /// How long the buffer must be for the message at hand.
    needed: usize,
    batches: Vec<Batch>,
    /// The indices of the batches that are not empty.
    touched: Vec<usize>,
}

impl Sorter {
    /// Begins with what was read already.
    fn new(plan: &Plan, said: Vec<u8>) -> Self {
        Self {
            filled: said.len(),
            buffer: said,
            used: 0,
            skip: 0,
            needed: 0,
            batches: plan.backends.iter().map(|_| Batch::default()).collect(),
            touched: vec![],
        }
    }

    /// The room to read into: never empty.
    fn room(&mut self) -> &mut [u8] {
        if self.buffer.len() < self.needed.max(BUFFER) {
            self.buffer.resize(self.needed.max(BUFFER), 0);
        }
        &mut self.buffer[self.filled..]
    }

    /// Sorts all whole messages into batches.
    fn sort(&mut self, plan: &Plan, tally: &Tally) -> Result<(), Ended> {
        let skipped = self.skip.min(self.filled as u64);
        self.skip -= skipped;
        self.used = skipped as usize;
        self.needed = 0;
        while self.used < self.filled {
            let rest = &self.buffer[self.used..self.filled];
            let length = plan.frame.length(rest).map_err(|error| {
                tally.wrong_length.fetch_add(1, Relaxed);
                Ended::Frame("from the client", error.says)
            })?;
            let Some(length) = length else { break };
            let backend = match plan.judge(length, rest) {
                Judgement::To(backend) => Some(backend),
                Judgement::Unsure => {
                    self.needed = length as usize;
                    break;
                }
                Judgement::Invalid(counter, why) => {
                    counter(tally).fetch_add(1, Relaxed);
                    if plan.invalid == Invalid::Close {
                        return Err(Ended::Invalid(why));
                    }
                    None
                }
            };
            let here = length.min(rest.len() as u64) as usize;
            self.skip = length - here as u64;
            if let Some(backend) = backend {
                let batch = &mut self.batches[backend];
                if batch.messages.is_empty() {
                    self.touched.push(backend);
                }
                batch.push(self.used, here);
            }
            self.used += here;
        }
        Ok(())
    }

    /// Moves the rest, part of one message, to the front.
    fn compact(&mut self) {
        self.touched.clear();
        let full = self.filled == self.buffer.len();
        self.buffer.copy_within(self.used..self.filled, 0);
        self.filled -= self.used;
        self.used = 0;
        if full && self.buffer.len() < LARGE_BUFFER {
            self.buffer.resize((self.buffer.len() * 4).min(LARGE_BUFFER), 0);
        } else if self.filled == 0 && self.buffer.len() > LARGE_BUFFER {
            self.buffer = vec![]; // one long message must not cost its length for ever
        }
    }
}

/// What is to be done with a message.
enum Judgement {
    /// It goes to this backend.
    To(usize),
    /// It has not arrived far enough.
    Unsure,
    /// It is dropped and counted.
    Invalid(fn(&Tally) -> &AtomicU64, &'static str),
}

impl Plan {
    /// Judges a message by its length and what has arrived of it.
    fn judge(&self, length: u64, rest: &[u8]) -> Judgement {
        let valid = u32::try_from(length).is_ok_and(|length| self.lengths.contains(&length)) && length > 0;
        if !valid {
            return Judgement::Invalid(|tally| &tally.wrong_length, "a message's length is not valid");
        }
        let Some(message) = rest.get(..length as usize) else { return Judgement::Unsure };
        let route = table::find_in(&self.table, message).map(|slot| usize::from(slot.order));
        match route.or(self.default) {
            Some(backend) => Judgement::To(backend),
            None => Judgement::Invalid(|tally| &tally.no_route, "a message has no route"),
        }
    }
}

/// The backends' connections, for the way back.
#[derive(Debug)]
struct Backends {
    /// What each is told first.
    introduction: Vec<u8>,
    open: Mutex<Vec<Option<Arc<TcpStream>>>>,
    /// The client has finished, so no more backends will come.
    finished: AtomicBool,
    /// Who waits for replies: it must learn of changes.
    waiting: Mutex<Option<Waker>>,
}

impl Backends {
    fn new(count: usize, introduction: Vec<u8>) -> Self {
        Self {
            introduction,
            open: Mutex::new(vec![None; count]),
            finished: AtomicBool::new(false),
            waiting: Mutex::new(None),
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<Option<Arc<TcpStream>>>) -> T) -> T {
        f(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, index: usize, stream: Arc<TcpStream>) {
        self.with(|open| open[index] = Some(stream));
        self.changed();
    }

    fn remove(&self, index: usize) {
        self.with(|open| open[index] = None);
        self.changed();
    }

    /// Tells the backends that no more will come.
    fn finish(&self) {
        self.with(|open| {
            for stream in open.iter().flatten() {
                // It fails if the backend has gone, which its replies will show.
                let _ = SockRef::from(&**stream).shutdown(std::net::Shutdown::Write);
            }
        });
        self.finished.store(true, Relaxed);
        self.changed();
    }

    fn reset(&self) {
        self.with(|open| {
            for stream in open.iter().flatten() {
                let _ = SockRef::from(&**stream).set_linger(Some(Duration::ZERO));
            }
        });
    }

    fn changed(&self) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        waiting.into_iter().for_each(Waker::wake);
    }

    /// The next backend with something to read, after `last`; none if none will ever
    /// have.
    fn poll_readable(&self, cx: &mut Context<'_>, last: usize) -> Poll<Option<(usize, Arc<TcpStream>)>> {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        self.with(|open| {
            let count = open.len();
            let mut any = false;
            for index in (last + 1..count).chain(0..count.min(last + 1)) {
                let Some(stream) = &open[index] else { continue };
                any = true;
                if stream.poll_read_ready(cx).is_ready() {
                    return Poll::Ready(Some((index, Arc::clone(stream))));
                }
            }
            if any || !self.finished.load(Relaxed) { Poll::Pending } else { Poll::Ready(None) }
        })
    }
}

/// Backends to client.
async fn replies(client: &TcpStream, plan: &Plan, backends: &Backends, tally: &Tally) -> Result<(), Ended> {
    let mut inlets: Vec<Inlet> = plan.backends.iter().map(|_| Inlet::default()).collect();
    let mut last = 0;
    while let Some((index, stream)) = poll_fn(|cx| backends.poll_readable(cx, last)).await {
        last = index;
        let inlet = &mut inlets[index];
        match stream.try_read(inlet.room()) {
            Ok(0) => {
                tally.cut_off.fetch_add(u64::from(inlet.filled > 0), Relaxed);
                *inlet = Inlet::default();
                backends.remove(index);
            }
            Ok(read) => {
                inlet.filled += read;
                let whole = inlet.whole(plan, tally)?;
                write_all(client, &inlet.buffer[..whole]).await.map_err(Ended::Client)?;
                tally.reply_bytes.fetch_add(whole as u64, Relaxed);
                inlet.compact(whole);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if plan.when_full == WhenFull::Wait => {
                return Err(Ended::Backend(plan.backends[index].to_string(), error));
            }
            // The writer meets the error, too, and deals with it.
            Err(_) => {
                *inlet = Inlet::default();
                backends.remove(index);
            }
        }
    }
    // It fails if the client has gone, and then nothing is left to be done.
    let _ = SockRef::from(client).shutdown(std::net::Shutdown::Write);
    Ok(())
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a backend has replied and the client has not got yet.
#[derive(Debug, Default)]
struct Inlet {
    buffer: Vec<u8>,
    filled: usize,
    /// How long the buffer must be for the message at hand.
    needed: usize,
}

impl Inlet {
    fn room(&mut self) -> &mut [u8] {
        if self.buffer.len() < self.needed.max(BUFFER) {
            self.buffer.resize(self.needed.max(BUFFER), 0);
        }
        &mut self.buffer[self.filled..]
    }

    /// How many bytes whole messages have.
    fn whole(&mut self, plan: &Plan, tally: &Tally) -> Result<usize, Ended> {
        let (mut whole, mut count) = (0, 0);
        self.needed = 0;
        while whole < self.filled {
            let rest = &self.buffer[whole..self.filled];
            let length = match plan.frame.length(rest) {
                Ok(Some(length)) => length,
                Ok(None) => break,
                Err(error) => return Err(Ended::Frame("from a backend", error.says)),
            };
            if length == 0 || length > plan.longest().max(MAX_MESSAGE as usize) as u64 {
                return Err(Ended::Frame("from a backend", length));
            }
            if length > rest.len() as u64 {
                self.needed = length as usize;
                break;
            }
            whole += length as usize;
            count += 1;
        }
        tally.replies.fetch_add(count, Relaxed);
        Ok(whole)
    }

    fn compact(&mut self, whole: usize) {
        let full = self.filled == self.buffer.len();
        self.buffer.copy_within(whole..self.filled, 0);
        self.filled -= whole;
        if full && self.buffer.len() < LARGE_BUFFER {
            self.buffer.resize((self.buffer.len() * 4).min(LARGE_BUFFER), 0);
        }
    }
}
