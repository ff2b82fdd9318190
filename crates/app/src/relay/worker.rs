//! A worker: one thread that carries many connections, with an epoll set of its own.
//!
//! A connection is a pair of sockets and two directions. Each direction is carried
//! by `copy` (read and write), by `splice` (through a pipe, without copying) or by
//! the kernel (see `kernel.rs`), where the worker only carries what the program
//! passes to it, hands on the end of each direction and forwards resets.
//!
//! All of epoll is edge-triggered. Sockets on the kernel path are watched without
//! EPOLLIN: with it each segment that the program redirects would wake the thread
//! for nothing.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};
use serde::Serialize;
use tokio::sync::oneshot;
use underpass_logic::relay::{Path, Window, better_path};

use super::{
    Choice, End, Side,
    front::Client,
    kernel::{Event, Joined, Kernel, SLOTS},
    pipe::{Pipe, Pipes},
    report::word,
    tcp,
};

/// How much is carried for one direction before it is the others' turn. What is carried
/// at once should still be in the CPU's cache when it is written.
const TURN: usize = 64 << 10;
/// The read buffer, one for all of a worker's connections.
const CHUNK: usize = 64 << 10;
/// How soon, and how late, a direction is looked at again that waits for the kernel
/// to queue or drain bytes: nothing tells when that has happened.
const RETRY: Duration = Duration::from_millis(1);
const RETRY_AT_MOST: Duration = Duration::from_millis(64);
/// Whether the program's addition is a full barrier, as `logic::relay::news` needs it.
/// Where it is not, a direction is looked at once more after the last owed byte is written.
const TOLD_IN_TIME: bool = cfg!(target_arch = "x86_64");
/// How often connections are looked at that may be idle or connecting for too long.
const OVERDUE_CHECK: Duration = Duration::from_millis(250);
/// What epoll says when the ring buffer, a command or a client has come; else it is a
/// slot.
const RING: u64 = u64::MAX;
const COMMANDS: u64 = u64::MAX - 1;
const CLIENTS: u64 = u64::MAX - 2;

/// Gives connections to a worker.
#[derive(Debug, Clone)]
pub struct Worker {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    /// How many connections it has, those on their way to it among them.
    load: Arc<AtomicUsize>,
}

/// A listener that workers accept from themselves, which saves a client the way over
/// another thread.
#[derive(Clone)]
pub struct Door {
    pub listener: Arc<TcpListener>,
    /// What becomes of a client, or why there is none. Called on the worker's thread: must
    /// not block.
    pub take: Arc<dyn Fn(Accepted) -> Taken + Send + Sync>,
}

/// What becomes of a client.
pub enum Taken {
    /// Nothing that the worker has to do.
    Gone,
    /// The worker carries it.
    Carried(Job),
    /// It has to say more first.
    Waits(Undecided),
    /// Somebody else takes it.
    Elsewhere(Client, Box<dyn FnOnce(Client) + Send>),
}

impl Taken {
    /// Whether the worker has it from now on.
    pub fn stays(&self) -> bool {
        match self {
            Self::Carried(_) | Self::Waits(_) => true,
            Self::Gone | Self::Elsewhere(..) => false,
        }
    }
}

impl std::fmt::Debug for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("Gone"),
            Self::Carried(job) => f.debug_tuple("Carried").field(job).finish(),
            Self::Waits(undecided) => f.debug_tuple("Waits").field(&undecided.client).finish(),
            Self::Elsewhere(client, _) => f.debug_tuple("Elsewhere").field(client).finish(),
        }
    }
}

/// A client of which it is not known yet what becomes.
pub struct Undecided {
    pub client: Client,
    /// Until when it may take.
    pub until: Instant,
    /// Looks at what it has said, all of it; the last time when it is late, and then does not
    /// wait again. Called on the worker's thread: must not block.
    pub look: Box<dyn FnOnce(Client, bool) -> Taken + Send>,
}

/// What `accept` gave.
pub type Accepted = io::Result<(TcpStream, SocketAddr)>;

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// A connection for a worker: two non-blocking sockets and what to do with them.
pub struct Job {
    pub client: TcpStream,
    pub target: TcpStream,
    /// Until when the target may take to connect, if it has not.
    pub connecting: Option<Instant>,
    /// What was read from the client already: it goes to the target first.
    pub early: Vec<u8>,
    pub choice: Choice,
    /// How long nothing may move.
    pub idle: Duration,
    /// Called on the worker's thread: must not block.
    pub done: Box<dyn FnOnce(Report) + Send>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("client", &self.client)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// What came of a connection.
#[derive(Debug)]
pub struct Report {
    pub end: End,
    /// The path at the end, and why it was that.
    pub path: Path,
    pub why: String,
    /// How often the path changed.
    pub switches: u32,
    /// From the client, then from the target.
    pub bytes: [Bytes; 2],
}

/// Bytes of one direction by the path that moved them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    pub copy: u64,
    pub splice: u64,
    pub kernel: u64,
}

impl Bytes {
    /// All of them.
    pub fn total(self) -> u64 {
        self.copy + self.splice + self.kernel
    }
}

/// An open connection, for `underpass status`.
#[derive(Debug, Serialize)]
pub struct Open {
    pub client: Option<SocketAddr>,
    pub target: Option<SocketAddr>,
    pub path: &'static str,
    pub why: String,
    pub switches: u32,
    pub from_client: Bytes,
    pub from_target: Bytes,
}

#[derive(Debug)]
enum Command {
    Take(Box<Taken>),
    Open(Door),
    CloseDoor,
    Describe(oneshot::Sender<Vec<Open>>),
    Stop,
}

impl Worker {
    /// Starts the thread. Without `kernel` it never takes the kernel path.
    ///
    /// # Errors
    /// Where the process has no descriptors or threads left.
    pub fn start(kernel: Option<Kernel>) -> Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let load = Arc::new(AtomicUsize::new(0));
        let mut thread = Thread::new(kernel, inbox, Arc::clone(&wake), Arc::clone(&load))?;
        thread::Builder::new().name("worker".into()).spawn(move || thread.run())?;
        Ok(Self { commands, wake, load })
    }

    /// How many connections it has.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Carries a connection to its end.
    pub fn carry(&self, job: Job) {
        self.take(Taken::Carried(job));
    }

    /// Takes a client that another worker has accepted.
    pub fn take(&self, taken: Taken) {
        self.load.fetch_add(usize::from(taken.stays()), Ordering::Relaxed);
        self.command(Command::Take(Box::new(taken)));
    }

    /// Accepts clients, beside other workers.
    pub fn open(&self, door: Door) {
        self.command(Command::Open(door));
    }

    /// Accepts no more clients.
    pub fn close_door(&self) {
        self.command(Command::CloseDoor);
    }

    /// Tells of the open connections. The channel fails if the thread was stopped.
    pub fn describe(&self) -> oneshot::Receiver<Vec<Open>> {
        let (tell, told) = oneshot::channel();
        self.command(Command::Describe(tell));
        told
    }

    /// Ends every connection, and the thread.
    pub fn stop(&self) {
        self.command(Command::Stop);
    }

    fn command(&self, command: Command) {
        // Both fail only if the thread has been stopped: then nothing is to be done.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

struct Thread {
    inbox: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    door: Option<Door>,
    pairs: Vec<Option<Box<Pair>>>,
    /// By their slots, which their pairs will have.
    undecided: HashMap<u32, Undecided>,
    /// When those are late, in about that order; some are decided since.
    deadlines: VecDeque<(Instant, u32)>,
    load: Arc<AtomicUsize>,
    free: Vec<u32>,
    /// Not to be used again before the events at hand are dealt with: some may be
    /// about the pair that had the slot.
    freed: Vec<u32>,
    retries: BinaryHeap<Reverse<(Instant, u32)>>,
    tools: Tools,
}

/// What carrying takes.
struct Tools {
    kernel: Option<Kernel>,
    pipes: Pipes,
    buffer: Box<[u8]>,
}

struct Pair {
    /// The client, then the target.
    ends: [Socket; 2],
    connecting: Option<Instant>,
    choice: Choice,
    path: Path,
    why: String,
    switches: u32,
    window: Window,
    idle: Duration,
    /// When bytes last moved, and how many there were by then.
    active: (Instant, u64),
    done: Option<Box<dyn FnOnce(Report) + Send>>,
}

/// A socket, and the direction that begins there.
struct Socket {
    stream: TcpStream,
    interest: EpollFlags,
    readable: bool,
    writable: bool,
    /// Its FIN has come, though there may be bytes before it.
    finished: bool,
    /// All that it sent is read.
    eof: bool,
    /// The other side was told that nothing more will come.
    shut: bool,
    held: Held,
    joined: Option<Joined>,
    copied: u64,
    spliced: u64,
    /// Owed bytes were written since it was last seen that none are owed.
    has_paid: bool,
    retry: Duration,
    retry_is_due: bool,
}

/// Bytes that were read and are not written yet.
enum Held {
    None,
    Bytes(Vec<u8>, usize),
    Pipe(Pipe),
}

/// Why a direction does not go on now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Epoll will tell.
    Event,
    /// Nothing will tell: look again soon.
    Retry,
    /// The others come first.
    Turn,
}

/// Which of a direction's two sockets failed.
enum Failed {
    Source(io::Error),
    Destination(io::Error),
}

#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    Exit,
}

impl Thread {
    fn new(
        kernel: Option<Kernel>,
        inbox: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        load: Arc<AtomicUsize>,
    ) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        if let Some(kernel) = &kernel {
            epoll.add(&kernel.events, EpollEvent::new(EpollFlags::EPOLLIN, RING))?;
        }
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, COMMANDS))?;
        let tools = Tools { kernel, pipes: Pipes::default(), buffer: vec![0; CHUNK].into() };
        let (pairs, free, freed, retries) = (vec![], vec![], vec![], BinaryHeap::new());
        let (undecided, deadlines) = (HashMap::new(), VecDeque::new());
        Ok(Self {
            inbox,
            wake,
            epoll,
            door: None,
            pairs,
            undecided,
            deadlines,
            load,
            free,
            freed,
            retries,
            tools,
        })
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 256];
        let mut overdue_check = Instant::now();
        loop {
            let timeout = self.timeout(overdue_check);
            let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
            for event in &events[..count] {
                match event.data() {
                    RING => self.drain_ring(),
                    CLIENTS => self.accept(),
                    COMMANDS => {
                        if self.take_commands() == Next::Exit {
                            return;
                        }
                    }
                    slot => self.socket_event(slot as u32, event.events()),
                }
            }
            self.run_retries();
            let now = Instant::now();
            while self.next_deadline().is_some_and(|at| at <= now) {
                if let Some((_, slot)) = self.deadlines.pop_front() {
                    self.look(slot, true);
                }
            }
            if now >= overdue_check {
                overdue_check = now + OVERDUE_CHECK;
                self.end_overdue(now);
            }
            self.free.append(&mut self.freed);
        }
    }

    /// Until something is due; rounded up to epoll's milliseconds, so as not to wake
    /// just before.
    fn timeout(&mut self, overdue_check: Instant) -> EpollTimeout {
        let late = self.next_deadline();
        let retry = self.retries.peek().map(|Reverse((at, _))| *at);
        let check = (self.load.load(Ordering::Relaxed) > 0).then_some(overdue_check);
        let Some(due) = retry.into_iter().chain(check).chain(late).min() else { return EpollTimeout::NONE };
        let left = due.saturating_duration_since(Instant::now());
        u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX).into()
    }

    fn take_commands(&mut self) -> Next {
        // Nothing to read means that an earlier turn has taken this wake-up's command.
        let _ = self.wake.read();
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Take(taken) => self.settle(*taken),
                Command::Open(door) => self.open_door(door),
                Command::CloseDoor => self.close_door(),
                Command::Describe(tell) => {
                    let kernel = self.tools.kernel.as_ref();
                    let open = self.pairs.iter().flatten().map(|pair| pair.describe(kernel)).collect();
                    // Whoever asked may have left.
                    let _ = tell.send(open);
                }
                Command::Stop => {
                    self.undecided.clear();
                    for index in 0..self.pairs.len() as u32 {
                        self.end(index * 2, End::Stopped);
                    }
                    return Next::Exit;
                }
            }
        }
        Next::GoOn
    }

    fn open_door(&mut self, door: Door) {
        // Of the workers that wait, the kernel wakes one (EPOLLEXCLUSIVE, Linux 4.5).
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        match self.epoll.add(&door.listener, EpollEvent::new(interest, CLIENTS)) {
            Ok(()) => self.door = Some(door),
            Err(error) => drop((door.take)(Err(error.into()))),
        }
    }

    fn close_door(&mut self) {
        if let Some(door) = self.door.take() {
            // It was added, and is still open.
            let _ = self.epoll.delete(&door.listener);
        }
    }

    /// Accepts one client; epoll tells again of others that wait.
    fn accept(&mut self) {
        let Some(door) = &self.door else { return };
        let accepted = door.listener.accept();
        // Another worker was faster.
        if accepted.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            return;
        }
        let taken = (door.take)(accepted);
        self.load.fetch_add(usize::from(taken.stays()), Ordering::Relaxed);
        self.settle(taken);
    }

    /// Does what becomes of a client that nobody watches yet.
    fn settle(&mut self, taken: Taken) {
        match taken {
            Taken::Gone => {}
            Taken::Elsewhere(client, take) => take(client),
            Taken::Carried(job) => {
                let slot = self.slot();
                self.begin(slot, job, false);
            }
            Taken::Waits(undecided) => {
                let slot = self.slot();
                let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
                let event = EpollEvent::new(interest, slot.into());
                if self.epoll.add(&undecided.client.stream, event).is_err() {
                    // Without memory left for it; dropping it closes it.
                    return self.leave(slot);
                }
                self.deadlines.push_back((undecided.until, slot));
                self.undecided.insert(slot, undecided);
            }
        }
    }

    fn slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.pairs.push(None);
            (self.pairs.len() as u32 - 1) * 2
        })
    }

    fn leave(&mut self, slot: u32) {
        self.freed.push(slot);
        self.load.fetch_sub(1, Ordering::Relaxed);
    }

    /// Looks at what an undecided client has said.
    fn look(&mut self, slot: u32, late: bool) {
        let Some(Undecided { client, look, .. }) = self.undecided.remove(&slot) else { return };
        match look(client, late) {
            Taken::Waits(undecided) => drop(self.undecided.insert(slot, undecided)),
            Taken::Carried(job) => self.begin(slot, job, true),
            Taken::Gone => self.leave(slot),
            Taken::Elsewhere(client, take) => {
                // It was added, and is still open.
                let _ = self.epoll.delete(&client.stream);
                self.leave(slot);
                take(client);
            }
        }
    }

    /// When the next undecided client is late.
    fn next_deadline(&mut self) -> Option<Instant> {
        while let Some(&(at, slot)) = self.deadlines.front() {
            if self.undecided.get(&slot).is_some_and(|undecided| undecided.until == at) {
                return Some(at);
            }
            self.deadlines.pop_front();
        }
        None
    }

    /// Begins to carry; the client may be watched already.
    fn begin(&mut self, slot: u32, job: Job, client_is_watched: bool) {
        let pair = Box::new(Pair::new(job));
        let watched = (slot..).zip(&pair.ends).try_for_each(|(slot, socket)| {
            let mut event = EpollEvent::new(socket.interest, slot.into());
            if client_is_watched && Side::of_slot(slot) == Side::Client {
                return self.epoll.modify(&socket.stream, &mut event);
            }
            self.epoll.add(&socket.stream, event)
        });
        self.pairs[slot as usize / 2] = Some(pair);
        if let Err(error) = watched {
            self.end(slot, End::Failed(Side::Client, error.into()));
        }
        // Epoll now tells what each socket is ready for.
    }

    fn drain_ring(&mut self) {
        while let Some(event) = self.tools.kernel.as_mut().and_then(Kernel::event) {
            match event {
                Event::Passed(slot) => {
                    if let Some(socket) = self.socket(slot) {
                        socket.readable = true;
                        self.advance(slot);
                    }
                }
                Event::Broken(slot, reason) => self.end(slot, End::Broken(reason)),
            }
        }
    }

    fn socket(&mut self, slot: u32) -> Option<&mut Socket> {
        Some(&mut self.pairs.get_mut(slot as usize / 2)?.as_mut()?.ends[slot as usize % 2])
    }

    fn socket_event(&mut self, slot: u32, flags: EpollFlags) {
        let Some(Some(pair)) = self.pairs.get_mut(slot as usize / 2) else { return self.look(slot, false) };
        let socket = &mut pair.ends[slot as usize % 2];
        if flags.contains(EpollFlags::EPOLLERR)
            && let Ok(Some(error)) = socket.stream.take_error()
        {
            let connecting = pair.connecting.is_some() && Side::of_slot(slot) == Side::Target;
            let side = Side::of_slot(slot);
            return self
                .end(slot, if connecting { End::Unreachable(error) } else { End::Failed(side, error) });
        }
        if flags.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP) {
            socket.finished = true;
            socket.readable = true;
        }
        socket.readable |= flags.contains(EpollFlags::EPOLLIN);
        let writable = flags.contains(EpollFlags::EPOLLOUT);
        socket.writable |= writable;
        if writable && Side::of_slot(slot) == Side::Target {
            pair.connecting = None;
        }
        self.advance(slot);
        if writable {
            self.advance(slot ^ 1);
        }
    }

    fn run_retries(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((at, slot))) = self.retries.peek().copied()
            && at <= now
        {
            self.retries.pop();
            if let Some(socket) = self.socket(slot) {
                socket.retry_is_due = false;
                self.advance(slot);
            }
        }
    }

    fn end_overdue(&mut self, now: Instant) {
        for index in 0..self.pairs.len() {
            let Some(pair) = &mut self.pairs[index] else { continue };
            let slot = index as u32 * 2;
            if pair.connecting.is_some_and(|until| now >= until) {
                self.end(slot, End::Unreachable(ErrorKind::TimedOut.into()));
                continue;
            }
            let moved = pair.bytes(self.tools.kernel.as_ref()).iter().map(|bytes| bytes.total()).sum();
            if moved != pair.active.1 {
                pair.active = (now, moved);
            } else if now - pair.active.0 >= pair.idle {
                self.end(slot, End::Idle);
            }
        }
    }

    /// Does what can be done now for the direction that begins at `slot`.
    fn advance(&mut self, slot: u32) {
        let Some(Some(pair)) = self.pairs.get_mut(slot as usize / 2) else { return };
        if pair.connecting.is_some() {
            return;
        }
        match pair.advance(slot, &mut self.tools).and_then(|wait| {
            pair.watch(slot, &self.epoll, &self.tools).map_err(Failed::Source)?;
            Ok(wait)
        }) {
            Ok(_) if pair.ends.iter().all(|socket| socket.shut) => self.end(slot, End::Closed),
            Ok(wait) => {
                if let Some(after) = pair.ends[slot as usize % 2].look_again(wait) {
                    self.retries.push(Reverse((Instant::now() + after, slot)));
                }
                self.reconsider(slot & !1);
            }
            Err(Failed::Source(error)) => self.end(slot, End::Failed(Side::of_slot(slot), error)),
            Err(Failed::Destination(error)) => self.end(slot, End::Failed(Side::of_slot(slot ^ 1), error)),
        }
    }

    /// Changes the path where another suits the connection better.
    fn reconsider(&mut self, slot: u32) {
        let Some(Some(pair)) = self.pairs.get_mut(slot as usize / 2) else { return };
        let Some((path, why)) = pair.wish() else { return };
        match (path, &mut self.tools.kernel) {
            (Path::Kernel, Some(kernel)) if slot < SLOTS => {
                if !pair.can_be_joined() {
                    if pair.ends.iter().any(|socket| socket.finished) {
                        pair.give_up_kernel("it was closing before the kernel could take over");
                    }
                    return;
                }
                let [a, b] = &mut pair.ends;
                match kernel.join(slot, [&a.stream, &b.stream]) {
                    Ok([of_a, of_b]) => {
                        (a.joined, b.joined) = (Some(of_a), Some(of_b));
                        pair.switch(path, why);
                        self.advance(slot);
                        self.advance(slot + 1);
                    }
                    Err(refused) => pair.give_up_kernel(&format!("{refused:#}")),
                }
            }
            (Path::Kernel, _) => pair.give_up_kernel("the kernel path is full"),
            (Path::Copy | Path::Splice, _) => pair.switch(path, why),
        }
    }

    /// Closes a pair and tells whoever gave it.
    fn end(&mut self, slot: u32, end: End) {
        let slot = slot & !1;
        let Some(mut pair) = self.pairs.get_mut(slot as usize / 2).and_then(Option::take) else { return };
        if end.is_a_failure() {
            pair.ends.iter().for_each(|socket| tcp::reset_on_close(&socket.stream));
        }
        let (bytes, done) = (pair.bytes(self.tools.kernel.as_ref()), pair.done.take());
        let report = Report { end, path: pair.path, why: pair.why, switches: pair.switches, bytes };
        for socket in pair.ends {
            // Closing a socket takes it out of epoll and of the sockmaps.
            drop(socket.stream);
            if let (Some(kernel), Some(joined)) = (&mut self.tools.kernel, &socket.joined) {
                kernel.forget(joined);
            }
        }
        self.leave(slot);
        if let Some(done) = done {
            done(report);
        }
    }
}

impl Pair {
    fn new(job: Job) -> Self {
        let mut ends = [Socket::new(job.client), Socket::new(job.target)];
        if !job.early.is_empty() {
            ends[0].held = Held::Bytes(job.early, 0);
        }
        Self {
            ends,
            connecting: job.connecting,
            path: if job.choice == Choice::Splice { Path::Splice } else { Path::Copy },
            why: job.choice.why().to_owned(),
            choice: job.choice,
            switches: 0,
            window: Window::default(),
            idle: job.idle,
            active: (Instant::now(), 0),
            done: Some(job.done),
        }
    }

    fn bytes(&self, kernel: Option<&Kernel>) -> [Bytes; 2] {
        [&self.ends[0], &self.ends[1]].map(|socket| Bytes {
            copy: socket.copied,
            splice: socket.spliced,
            kernel: socket
                .joined
                .as_ref()
                .zip(kernel)
                .map_or(0, |(joined, kernel)| kernel.redirected(joined)),
        })
    }

    fn describe(&self, kernel: Option<&Kernel>) -> Open {
        let [from_client, from_target] = self.bytes(kernel);
        Open {
            client: self.ends[0].stream.peer_addr().ok(),
            target: self.ends[1].stream.peer_addr().ok(),
            path: word(self.path),
            why: self.why.clone(),
            switches: self.switches,
            from_client,
            from_target,
        }
    }

    fn advance(&mut self, slot: u32, tools: &mut Tools) -> Result<Wait, Failed> {
        let [a, b] = &mut self.ends;
        let (src, dst) = if slot.is_multiple_of(2) { (a, b) } else { (b, a) };
        let stopped = match (&tools.kernel, &mut src.joined) {
            (Some(kernel), Some(joined)) => kernel.throttle(joined, &src.stream).map_err(Failed::Source)?,
            _ => false,
        };
        let splice = self.path == Path::Splice;
        let before = src.copied + src.spliced;
        let wait = src.carry(dst, splice, tools)?;
        let moved = src.copied + src.spliced - before;
        if moved > 0 {
            self.window.note(slot % 2, moved);
        }
        match wait {
            Wait::Event if stopped => Ok(Wait::Retry),
            Wait::Event => src.finish(dst, tools),
            Wait::Retry | Wait::Turn => Ok(wait),
        }
    }

    /// Which path the connection should change to, and why.
    fn wish(&mut self) -> Option<(Path, &'static str)> {
        match self.choice {
            Choice::Copy | Choice::Splice => None,
            Choice::Kernel if self.path == Path::Kernel => None,
            Choice::Kernel => Some((Path::Kernel, Choice::Kernel.why())),
            Choice::Auto { kernel, switch_every: None } => better_path(self.path, &mut self.window, kernel),
            Choice::Auto { kernel, switch_every: Some(bytes) } => self.any_other_path(bytes, kernel),
        }
    }

    /// For tests: changes of path where nothing speaks for them.
    fn any_other_path(&mut self, every: u64, kernel: bool) -> Option<(Path, &'static str)> {
        let moved = self.window.moved();
        if moved < every || self.path == Path::Kernel {
            return None;
        }
        self.window = Window::default();
        // Any way to choose will do that depends on how the bytes happened to come.
        let path = match (moved ^ self.active.1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 62 {
            0 if kernel => Path::Kernel,
            1 => Path::Copy,
            _ => Path::Splice,
        };
        (path != self.path).then_some((path, "forced by a test"))
    }

    /// The kernel path takes over only while the user side holds nothing, and only
    /// connections that are open both ways.
    fn can_be_joined(&self) -> bool {
        self.ends
            .iter()
            .all(|socket| socket.held.is_empty() && !socket.finished && !socket.eof && !socket.shut)
    }

    fn switch(&mut self, path: Path, why: &str) {
        self.path = path;
        why.clone_into(&mut self.why);
        self.switches += 1;
    }

    fn give_up_kernel(&mut self, why: &str) {
        self.why = format!("not by the kernel: {why}");
        self.choice = self.choice.without_kernel();
    }

    /// Tells epoll what is of interest on the kernel path after the direction that
    /// begins at `slot` was carried; on the others all is, always.
    fn watch(&mut self, slot: u32, epoll: &Epoll, tools: &Tools) -> io::Result<()> {
        let Some(kernel) = tools.kernel.as_ref().filter(|_| self.path == Path::Kernel) else { return Ok(()) };
        for side in [slot % 2, (slot % 2) ^ 1] {
            let writes = !self.ends[side as usize ^ 1].held.is_empty();
            let socket = &mut self.ends[side as usize];
            let reads = match &socket.joined {
                Some(joined) if joined.judged => kernel.owed(joined) > 0,
                _ => !socket.eof,
            };
            let mut interest = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
            interest.set(EpollFlags::EPOLLIN, reads && socket.held.is_empty());
            interest.set(EpollFlags::EPOLLOUT, writes);
            if interest != socket.interest {
                socket.interest = interest;
                epoll.modify(&socket.stream, &mut EpollEvent::new(interest, ((slot & !1) + side).into()))?;
            }
        }
        Ok(())
    }
}

impl Socket {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            interest: EpollFlags::EPOLLIN
                | EpollFlags::EPOLLOUT
                | EpollFlags::EPOLLRDHUP
                | EpollFlags::EPOLLET,
            readable: false,
            writable: false,
            finished: false,
            eof: false,
            shut: false,
            held: Held::None,
            joined: None,
            copied: 0,
            spliced: 0,
            has_paid: false,
            retry: RETRY,
            retry_is_due: false,
        }
    }

    /// Moves bytes from here to `dst` as far as both sockets, and on the kernel path
    /// the order, allow.
    fn carry(&mut self, dst: &mut Self, splice: bool, tools: &mut Tools) -> Result<Wait, Failed> {
        let mut turn = TURN;
        loop {
            if !self.held.is_empty() {
                if !self.write_held(dst, tools)? {
                    return Ok(Wait::Event);
                }
                continue;
            }
            if let Some(wait) = self.has_to_wait(dst, tools)? {
                return Ok(wait);
            }
            if turn == 0 {
                return Ok(Wait::Turn);
            }
            // Without a descriptor left for a pipe, copying does as well.
            let pipe = if splice { tools.pipes.take().ok() } else { None };
            let count = match pipe {
                Some(pipe) => self.splice_into(pipe, tools),
                None => self.copy_over(dst, tools)?,
            };
            match count.map_err(Failed::Source)? {
                Some(0) => self.eof = true,
                Some(count) => turn = turn.saturating_sub(count),
                None => self.readable = false,
            }
        }
    }

    /// Why nothing can be read from here now, if so.
    fn has_to_wait(&mut self, dst: &Self, tools: &Tools) -> Result<Option<Wait>, Failed> {
        if let (Some(kernel), Some(joined), Some(to)) = (&tools.kernel, &mut self.joined, &dst.joined)
            && joined.judged
        {
            if kernel.owed(joined) == 0 {
                let again = std::mem::take(&mut self.has_paid) && !TOLD_IN_TIME;
                return Ok(Some(if again { Wait::Retry } else { Wait::Event }));
            }
            if !kernel.is_in_order(joined, (to, &dst.stream)).map_err(Failed::Destination)? {
                return Ok(Some(Wait::Retry));
            }
            if self.eof {
                // The program has passed bytes that the kernel has not queued yet.
                self.eof = false;
                return Ok(Some(Wait::Retry));
            }
        }
        Ok((self.eof || !self.readable).then_some(Wait::Event))
    }

    /// Writes what is held; false when the other socket takes no more.
    fn write_held(&mut self, dst: &mut Self, tools: &mut Tools) -> Result<bool, Failed> {
        if !dst.writable {
            return Ok(false);
        }
        let written = match &mut self.held {
            Held::None => return Ok(true),
            Held::Bytes(bytes, at) => dst.stream.write(&bytes[*at..]).inspect(|count| *at += count),
            Held::Pipe(pipe) => pipe.empty(&dst.stream),
        };
        match written {
            Ok(count) => {
                self.account(count, tools);
                self.let_go(tools);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                dst.writable = false;
                Ok(false)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(Failed::Destination(error)),
        }
    }

    fn account(&mut self, written: usize, tools: &mut Tools) {
        let written = written as u64;
        match &self.held {
            Held::Pipe(_) => self.spliced += written,
            Held::None | Held::Bytes(..) => self.copied += written,
        }
        if let (Some(kernel), Some(joined)) = (&mut tools.kernel, &self.joined) {
            kernel.consume(joined, written);
            self.has_paid = true;
        }
    }

    /// Gives back what held the bytes, once it is empty.
    fn let_go(&mut self, tools: &mut Tools) {
        if self.held.is_empty()
            && let Held::Pipe(pipe) = std::mem::replace(&mut self.held, Held::None)
        {
            tools.pipes.give_back(pipe);
        }
    }

    /// Fills a pipe from here. `None`: there is nothing to read.
    fn splice_into(&mut self, mut pipe: Pipe, tools: &mut Tools) -> io::Result<Option<usize>> {
        let filled = ready(pipe.fill(&self.stream));
        if pipe.held() > 0 {
            self.held = Held::Pipe(pipe);
        } else {
            tools.pipes.give_back(pipe);
        }
        filled
    }

    /// Reads from here and writes there at once what it takes. `None`: there is
    /// nothing to read.
    fn copy_over(&mut self, dst: &mut Self, tools: &mut Tools) -> Result<io::Result<Option<usize>>, Failed> {
        let mut buffer = std::mem::take(&mut tools.buffer);
        let result = self.copy_through(&mut buffer, dst, tools);
        tools.buffer = buffer;
        result
    }

    fn copy_through(
        &mut self,
        buffer: &mut [u8],
        dst: &mut Self,
        tools: &mut Tools,
    ) -> Result<io::Result<Option<usize>>, Failed> {
        let count = match ready((&self.stream).read(buffer)) {
            Ok(Some(count @ 1..)) => count,
            other => return Ok(other),
        };
        // Less than asked for: the socket is empty, and epoll tells of what comes
        // next. Except for a FIN that has been told of, and on the kernel path, where
        // a read stops at the end of a segment.
        if count < buffer.len() && !self.finished && self.joined.is_none() {
            self.readable = false;
        }
        let written = if dst.writable {
            match ready(dst.stream.write(&buffer[..count])) {
                Ok(written) => written.unwrap_or(0),
                Err(error) => return Err(Failed::Destination(error)),
            }
        } else {
            0
        };
        self.account(written, tools);
        if written < count {
            // A full send buffer: epoll tells when there is room.
            dst.writable = false;
            self.held = Held::Bytes(buffer[written..count].to_vec(), 0);
        }
        Ok(Ok(Some(count)))
    }

    /// Hands on the end of the direction once its last byte is delivered.
    fn finish(&mut self, dst: &Self, tools: &Tools) -> Result<Wait, Failed> {
        if self.shut || !self.held.is_empty() {
            return Ok(Wait::Event);
        }
        if let (Some(kernel), Some(joined), Some(to)) = (&tools.kernel, &self.joined, &dst.joined)
            && joined.judged
        {
            if !self.finished {
                return Ok(Wait::Event);
            }
            let drained = kernel.is_drained((joined, &self.stream), (to, &dst.stream));
            if !drained.map_err(Failed::Source)? {
                return Ok(Wait::Retry);
            }
        } else if !self.eof {
            return Ok(Wait::Event);
        }
        self.shut = true;
        if dst.shut {
            // Both ways are done: closing says it as well.
            return Ok(Wait::Event);
        }
        match dst.stream.shutdown(Shutdown::Write) {
            // It was reset meanwhile, which epoll reports.
            Err(error) if error.kind() != ErrorKind::NotConnected => Err(Failed::Destination(error)),
            _ => Ok(Wait::Event),
        }
    }

    /// When the direction has to be looked at without an event, unless that is
    /// planned already.
    fn look_again(&mut self, wait: Wait) -> Option<Duration> {
        let after = match wait {
            Wait::Event => {
                self.retry = RETRY;
                return None;
            }
            Wait::Turn => Duration::ZERO,
            Wait::Retry => self.retry,
        };
        if self.retry_is_due {
            return None;
        }
        self.retry_is_due = true;
        self.retry = if wait == Wait::Retry { (self.retry * 2).min(RETRY_AT_MOST) } else { RETRY };
        Some(after)
    }
}

impl Held {
    fn is_empty(&self) -> bool {
        match self {
            Self::None => true,
            Self::Bytes(bytes, at) => *at == bytes.len(),
            Self::Pipe(pipe) => pipe.held() == 0,
        }
    }
}

/// `None` where the call would have to wait.
fn ready(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
