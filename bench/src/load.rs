//! The load: a server that does what a connection's first byte asks for, clients
//! that measure, and what they cost.
//!
//! Both run as threads with blocking sockets, so that the load generator itself has
//! as few moving parts as it can.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use socket2::SockRef;
use underpass::lab::Namespace;

/// What the first byte of a connection asks the server for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Read everything and count it.
    Sink = b's' as isize,
    /// Send everything back.
    Echo = b'e' as isize,
    /// Read [`SHORT`] bytes with the first, send as many back, close.
    Once = b'o' as isize,
}

/// A short exchange's request, and its answer.
const SHORT: usize = 64;
const CHUNK: usize = 128 * 1024;
/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Enough to accept as fast as 32 clients connect.
const ACCEPTORS: usize = 32;

/// What the server has read and counted.
#[derive(Debug, Default)]
struct Sunk {
    bytes: AtomicU64,
    /// Connections that may still bring some.
    open: AtomicU64,
}

/// A server in a namespace; it ends when dropped.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
    sunk: Arc<Sunk>,
    acceptors: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens at `at` inside `namespace`, its threads on `cpu` if one is named.
    pub fn start(namespace: &Namespace, at: SocketAddr, cpu: Option<usize>) -> Result<Self> {
        namespace.enter(|| {
            pin(cpu)?;
            let listener =
                socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
            listener.set_reuse_address(true)?;
            listener.bind(&at.into()).with_context(|| format!("cannot bind {at}"))?;
            listener.listen(4096)?;
            let listener = Arc::new(TcpListener::from(listener));
            let sunk = Arc::new(Sunk::default());
            let acceptors = (0..ACCEPTORS)
                .map(|_| {
                    let (listener, sunk) = (Arc::clone(&listener), Arc::clone(&sunk));
                    thread::spawn(move || accept(&listener, &sunk))
                })
                .collect();
            Ok(Self { listener, sunk, acceptors })
        })
    }

    fn sunk(&self) -> u64 {
        self.sunk.bytes.load(Ordering::Relaxed)
    }

    /// Waits until all that was sent has arrived, so that what is measured next does
    /// not pay for it.
    fn drained(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.sunk.open.load(Ordering::Relaxed) > 0 {
            ensure!(Instant::now() < deadline, "a bulk stream's end did not arrive");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the acceptors, whose accept then fails.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, sunk: &Arc<Sunk>) {
    while let Ok((mut stream, _)) = listener.accept() {
        let mut request = [0; SHORT];
        // A client that leaves without a word was only looking whether somebody listens.
        let Ok(1..) = stream.set_nodelay(true).and_then(|()| stream.read(&mut request[..1])) else {
            continue;
        };
        if request[0] == Ask::Once as u8 {
            // A failure shows at the client, which counts.
            let _ = stream.read_exact(&mut request[1..]).and_then(|()| stream.write_all(&request));
            continue;
        }
        let (echo, sunk) = (request[0] == Ask::Echo as u8, Arc::clone(sunk));
        let serve = move || if echo { send_back(stream) } else { sink(stream, &sunk) };
        let _ = thread::Builder::new().stack_size(256 * 1024).spawn(serve);
    }
}

fn send_back(mut stream: TcpStream) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

fn sink(mut stream: TcpStream, sunk: &Sunk) {
    sunk.open.fetch_add(1, Ordering::Relaxed);
    let mut buffer = vec![0; CHUNK];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        sunk.bytes.fetch_add(n as u64, Ordering::Relaxed);
    }
    sunk.open.fetch_sub(1, Ordering::Relaxed);
}

/// Clients in a namespace that talk to `to`: the server or a relay before it.
#[derive(Debug)]
pub struct Clients<'a> {
    pub namespace: &'a Namespace,
    pub to: SocketAddr,
    /// The CPU that their threads run on, if it matters.
    pub cpu: Option<usize>,
}

/// What a bulk transfer reached.
#[derive(Debug, Clone, Copy)]
pub struct Bulk {
    pub gbit_per_s: f64,
    /// Of the whole system: client, relay, server and kernel.
    pub cpu_s_per_gib: f64,
}

impl Clients<'_> {
    /// Waits until an exchange succeeds: a relay may listen before it is ready.
    pub fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let knock = || ask(self.to, Ask::Echo).and_then(|mut stream| exchange(&mut stream, &mut [0x55; 64]));
        loop {
            match self.namespace.enter(knock) {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Sends as much as it can over this many connections at once.
    pub fn bulk(&self, server: &Server, streams: usize, time: Duration) -> Result<Bulk> {
        self.enter(|| {
            let senders = Senders::start(self.to, streams)?;
            thread::sleep(Duration::from_millis(300)); // windows open
            let (bytes, cpu, start) = (server.sunk(), cpu_seconds()?, Instant::now());
            thread::sleep(time);
            let (bytes, cpu) = (server.sunk() - bytes, cpu_seconds()? - cpu);
            let seconds = start.elapsed().as_secs_f64();
            senders.stop()?;
            server.drained()?;
            ensure!(bytes > 0, "not a byte arrived");
            let gib = bytes as f64 / (1u64 << 30) as f64;
            Ok(Bulk { gbit_per_s: bytes as f64 * 8.0 / seconds / 1e9, cpu_s_per_gib: cpu / gib })
        })
    }

    /// Sends `size` bytes over one connection and waits for them to come back, again
    /// and again; the round-trip times in microseconds.
    pub fn ping_pong(&self, size: usize, time: Duration) -> Result<Vec<f64>> {
        self.enter(|| {
            let mut stream = ask(self.to, Ask::Echo)?;
            let mut buffer = vec![0x55; size];
            for _ in 0..200 {
                exchange(&mut stream, &mut buffer)?;
            }
            let (mut times, start) = (vec![], Instant::now());
            while start.elapsed() < time {
                times.push(exchange(&mut stream, &mut buffer)?);
            }
            Ok(times)
        })
    }

    /// Connects, asks, is answered and closed, over and over by this many threads;
    /// exchanges a second.
    pub fn short(&self, parallel: usize, time: Duration) -> Result<f64> {
        Ok(self.short_counted(parallel, time)?.0)
    }

    /// The same, and how many there were.
    pub fn short_counted(&self, parallel: usize, time: Duration) -> Result<(f64, u64)> {
        self.enter(|| {
            let start = Instant::now();
            let one = || -> Result<u64> {
                let mut done = 0;
                while start.elapsed() < time {
                    once(self.to).context("a short connection failed")?;
                    done += 1;
                }
                Ok(done)
            };
            let done: u64 = in_parallel(parallel, |_| one())?.into_iter().sum();
            Ok((done as f64 / start.elapsed().as_secs_f64(), done))
        })
    }

    /// Short exchanges at a fixed total rate, by this many threads; how many a second it
    /// came to.
    pub fn short_paced(&self, parallel: usize, per_second: u32, time: Duration) -> Result<f64> {
        self.enter(|| {
            let start = Instant::now();
            let pause = Duration::from_secs(1) * parallel as u32 / per_second;
            let done = in_parallel(parallel, |i| {
                let (mut due, mut done) = (start + pause * i as u32 / parallel as u32, 0_u64);
                while due < start + time {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    once(self.to).context("a short connection failed")?;
                    done += 1;
                    due += pause;
                }
                Ok(done)
            })?;
            Ok(done.into_iter().sum::<u64>() as f64 / start.elapsed().as_secs_f64())
        })
    }

    /// 64-byte exchanges over this many connections, a pause after each, beside bulk
    /// streams; the round-trip times in microseconds and the streams' Gbit/s.
    pub fn mixed(
        &self,
        server: &Server,
        interactive: usize,
        streams: usize,
        time: Duration,
    ) -> Result<(Vec<f64>, f64)> {
        self.enter(|| {
            let senders = Senders::start(self.to, streams)?;
            thread::sleep(Duration::from_millis(300));
            let (bytes, start) = (server.sunk(), Instant::now());
            let times = in_parallel(interactive, |_| {
                let mut stream = ask(self.to, Ask::Echo)?;
                let (mut buffer, mut times) = ([0x55; 64], vec![]);
                while start.elapsed() < time {
                    times.push(exchange(&mut stream, &mut buffer)?);
                    thread::sleep(Duration::from_millis(2));
                }
                Ok(times)
            })?;
            let rate = (server.sunk() - bytes) as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9;
            senders.stop()?;
            server.drained()?;
            Ok((times.concat(), rate))
        })
    }

    /// Opens connections that have been used once, and now rest.
    pub fn idle(&self, n: usize) -> Result<Vec<TcpStream>> {
        self.enter(|| {
            (0..n)
                .map(|_| {
                    let mut stream = ask(self.to, Ask::Echo)?;
                    exchange(&mut stream, &mut [0x55; 64])?;
                    Ok(stream)
                })
                .collect()
        })
    }

    /// 64-byte exchanges at a fixed total rate, going round these connections; the
    /// times from when each was due until it was answered, in microseconds, and the
    /// CPU seconds that the whole system spent a second.
    pub fn paced(
        &self,
        streams: &mut [TcpStream],
        per_second: u32,
        time: Duration,
    ) -> Result<(Vec<f64>, f64)> {
        const THREADS: usize = 10;
        self.enter(|| {
            let share = streams.len().div_ceil(THREADS);
            let pause = Duration::from_secs(1) * THREADS as u32 / per_second;
            let (cpu, start) = (cpu_seconds()?, Instant::now());
            let times = thread::scope(|scope| {
                let threads: Vec<_> = streams
                    .chunks_mut(share)
                    .enumerate()
                    .map(|(i, streams)| {
                        let first = start + pause * i as u32 / THREADS as u32;
                        scope.spawn(move || pace(streams, first, pause, start + time))
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().expect("no panic")).collect::<Result<Vec<_>>>()
            })?;
            let cpu = (cpu_seconds()? - cpu) / start.elapsed().as_secs_f64();
            Ok((times.concat(), cpu))
        })
    }

    fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.enter(|| {
            pin(self.cpu)?;
            f()
        })
    }
}

fn pace(streams: &mut [TcpStream], first: Instant, pause: Duration, end: Instant) -> Result<Vec<f64>> {
    let (mut due, mut times, mut buffer) = (first, vec![], [0x55; 64]);
    let n = streams.len();
    for i in (0..n).cycle() {
        if due >= end {
            break;
        }
        thread::sleep(due.saturating_duration_since(Instant::now()));
        exchange(&mut streams[i], &mut buffer)?;
        times.push(due.elapsed().as_secs_f64() * 1e6);
        due += pause;
    }
    Ok(times)
}

/// Threads that send as fast as they can.
struct Senders {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Senders {
    fn start(to: SocketAddr, n: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = vec![];
        for _ in 0..n {
            let (mut stream, stop) = (ask(to, Ask::Sink)?, Arc::clone(&stop));
            threads.push(thread::spawn(move || {
                let chunk = vec![0x55; CHUNK];
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&chunk)?;
                }
                Ok(())
            }));
        }
        Ok(Self { stop, threads })
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no panic").context("a bulk stream broke")?;
        }
        Ok(())
    }
}

fn ask(to: SocketAddr, what: Ask) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[what as u8])?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<f64> {
    let start = Instant::now();
    stream.write_all(buffer).context("cannot send")?;
    stream.read_exact(buffer).context("no answer")?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

fn once(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0x55; SHORT];
    request[0] = Ask::Once as u8;
    stream.write_all(&request)?;
    let mut answer = Vec::with_capacity(SHORT);
    stream.read_to_end(&mut answer)?;
    if answer == request { Ok(()) } else { Err(io::Error::other("not the whole answer")) }
}

fn in_parallel<T: Send>(n: usize, f: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = (0..n).map(|i| scope.spawn(move || f(i))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Lets a namespace have short connections one after the other: they use up its ports in
/// ten seconds otherwise.
pub fn many_ports(namespace: &Namespace) -> Result<()> {
    namespace.enter(|| {
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535")?;
        fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")
    })?;
    Ok(())
}

/// Keeps a CPU busy with something else until dropped.
#[derive(Debug)]
pub struct Hog {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hog {
    pub fn start(cpu: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            pin(Some(cpu)).expect("a CPU that is there");
            while !stopped.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Keeps this thread, and what it starts, on one CPU.
pub fn pin(cpu: Option<usize>) -> io::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// What all CPUs together have spent on work since some moment: the time that has
/// passed without what they were idle. The kernel takes the time of each idle period
/// (with NO_HZ), but looks only at its ticks who is at work, and misses most of what
/// wakes up, works for some microseconds and sleeps again.
pub fn cpu_seconds() -> Result<f64> {
    static START: OnceLock<Instant> = OnceLock::new();
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let passed = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    let cpus = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait ..., in hundredths of a second
    let [_, _, _, idle, iowait, ..] = fields[..] else {
        anyhow::bail!("/proc/stat has no line of CPU times")
    };
    Ok(passed * cpus as f64 - (idle + iowait) / 100.0)
}
