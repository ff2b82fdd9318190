//! What end-to-end tests share: hosts joined by veth, children whose log is read
//! while they run, and streams of which every byte is checked.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::{Domain, SockRef, Socket, Type};
use underpass::lab::Namespace;

/// A guard against hanging, far above what anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// The address families, as tests are named after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Three hosts in a row, each in its own network namespace: client - relay - server.
pub struct Hosts {
    pub client: Namespace,
    pub relay: Namespace,
    pub server: Namespace,
}

impl Hosts {
    pub fn new() -> Self {
        let [client, relay] = [(); 2].map(|()| Namespace::new().unwrap());
        client.join("eth0", &relay, "eth0").unwrap();
        Self::with(client, relay)
    }

    /// As before, with a long wire between client and relay.
    pub fn far(delay: Duration) -> (Self, Wire) {
        let [client, middle, relay] = [(); 3].map(|()| Namespace::new().unwrap());
        client.join("eth0", &middle, "west").unwrap();
        middle.join("east", &relay, "eth0").unwrap();
        for host in [&client, &relay] {
            // The wire takes whole frames as they are: they have to be frames of a wire.
            let mut ethtool = Command::new("ethtool");
            ethtool.args(["-K", "eth0", "tx", "off", "tso", "off", "gso", "off"]).stdout(Stdio::null());
            assert!(host.spawn(&mut ethtool).unwrap().wait().unwrap().success());
        }
        let wire = Wire::new(&middle, delay);
        (Self::with(client, relay), wire)
    }

    fn with(client: Namespace, relay: Namespace) -> Self {
        let server = Namespace::new().unwrap();
        relay.join("eth1", &server, "eth0").unwrap();
        let addresses = [
            (&client, "eth0", ["10.0.1.1", "fd00:1::1"]),
            (&relay, "eth0", ["10.0.1.2", "fd00:1::2"]),
            (&relay, "eth1", ["10.0.2.1", "fd00:2::1"]),
            (&server, "eth0", ["10.0.2.2", "fd00:2::2"]),
        ];
        for (host, interface, [v4, v6]) in addresses {
            host.address(interface, v4.parse::<IpAddr>().unwrap(), 24).unwrap();
            host.address(interface, v6.parse::<IpAddr>().unwrap(), 64).unwrap();
        }
        Self { client, relay, server }
    }

    /// Where clients find the relay.
    pub fn relay_address(family: Family) -> IpAddr {
        match family {
            Family::V4 => [10, 0, 1, 2].into(),
            Family::V6 => "fd00:1::2".parse().unwrap(),
        }
    }

    /// Where the relay finds the server.
    pub fn server_address(family: Family) -> IpAddr {
        match family {
            Family::V4 => [10, 0, 2, 2].into(),
            Family::V6 => "fd00:2::2".parse().unwrap(),
        }
    }

    /// A listener on the server.
    pub fn listen(&self, family: Family) -> TcpListener {
        let listener = self.server.enter(|| TcpListener::bind((Self::server_address(family), 0))).unwrap();
        patient(&listener);
        listener
    }

    /// A listener on the server that accepts no connection before [`Stuck::release`].
    pub fn listen_stuck(&self, family: Family) -> Stuck {
        let address = SocketAddr::new(Self::server_address(family), 0);
        let listener: TcpListener = self.server.enter(|| {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(0).unwrap();
            socket.into()
        });
        patient(&listener);
        let to = listener.local_addr().unwrap();
        // The one that has room in the queue; SYNs that come after it are dropped.
        let filler = self.relay.enter(|| TcpStream::connect(to)).unwrap();
        Stuck { listener, filler }
    }
}

/// A listener whose queue is full.
pub struct Stuck {
    listener: TcpListener,
    filler: TcpStream,
}

impl Stuck {
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// From now on connections are accepted; those that were begun retry every second.
    pub fn release(self) -> TcpListener {
        // With room: a full queue answers with SYN cookies, and a FIN that repairs a lost
        // ACK then costs the byte before it.
        SockRef::from(&self.listener).listen(1024).unwrap();
        let (filled, _) = self.listener.accept().unwrap();
        drop((filled, self.filler));
        self.listener
    }
}

/// Connects from a host, with deadlines on what comes after.
pub fn connect(from: &Namespace, to: SocketAddr) -> io::Result<TcpStream> {
    let stream = from.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    patient(&stream);
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Accepts a connection, with deadlines on this and on what comes after.
pub fn accept(listener: &TcpListener) -> TcpStream {
    patient(listener);
    let (stream, _) = listener.accept().unwrap_or_else(|e| panic!("no connection came: {e}"));
    patient(&stream);
    stream.set_nodelay(true).unwrap();
    stream
}

fn patient(socket: &impl std::os::fd::AsFd) {
    let socket = SockRef::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// Closes a connection by a reset.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Tries until it succeeds.
///
/// # Panics
/// If it never does.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "it never came true that {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The binary under test.
pub fn underpass() -> Command {
    Command::new(env!("CARGO_BIN_EXE_underpass"))
}

/// A child whose stderr is read while it runs. It is killed when this is dropped;
/// what it said is shown if the test has failed.
pub struct Daemon {
    name: String,
    child: Child,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    news: Condvar,
}

impl Daemon {
    /// Starts a child on a host.
    pub fn start(host: &Namespace, command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = host.spawn(command.stdin(Stdio::null()).stderr(Stdio::piped())).unwrap();
        let (stderr, log) = (child.stderr.take().unwrap(), Arc::new(Log::default()));
        let writer = Arc::clone(&log);
        thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                writer.change(|(lines, _)| lines.push(String::from_utf8_lossy(&line).into_owned()));
            }
            writer.change(|(_, ended)| *ended = true);
        });
        Self { name, child, log }
    }

    /// What it has said so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lines().0.clone()
    }

    /// Waits for a line that has `part` in it.
    pub fn line(&self, part: &str) -> String {
        self.find(part, |line| line.contains(part))
    }

    /// Waits for the first line like this.
    ///
    /// # Panics
    /// If it does not come, with all that came.
    pub fn find(&self, what: &str, mut is_it: impl FnMut(&str) -> bool) -> String {
        let (until, mut seen) = (Instant::now() + PATIENCE, 0);
        let mut log = self.log.lines();
        loop {
            if let Some(line) = log.0[seen..].iter().find(|line| is_it(line)) {
                return line.clone();
            }
            seen = log.0.len();
            let left = until.saturating_duration_since(Instant::now());
            if log.1 || left.is_zero() {
                let all = log.0.join("\n");
                drop(log);
                panic!("{} never said {what}; it said:\n{all}", self.name);
            }
            log = self.log.news.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the child ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Bytes of its memory that are in use (VmRSS).
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only where it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            println!("{} said:\n{}", self.name, self.log().join("\n"));
        }
    }
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, (Vec<String>, bool)> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, f: impl FnOnce(&mut (Vec<String>, bool))) {
        f(&mut self.lines());
        self.news.notify_all();
    }
}

/// The fields of a log line: `listen=[::]:80 to="a \"b\""`.
pub fn fields(line: &str) -> HashMap<String, String> {
    let mut fields = HashMap::new();
    let mut rest = line;
    while let Some(at) = rest.find('=') {
        let name = rest[..at].rsplit(' ').next().unwrap_or_default();
        let (value, after) = value(&rest[at + 1..]);
        fields.insert(name.to_owned(), value);
        rest = after;
    }
    fields
}

fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_once(' ').unwrap_or((text, ""));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, char)| char)),
            _ => value.push(char),
        }
    }
    panic!("a quote without its twin in a log line: {text}");
}

#[test]
fn log_lines_have_fields() {
    let fields = fields(r#"2026  INFO ready listen=[::]:80 to="a \"b=c\"" none="" n=1"#);
    let got = ["listen", "to", "none", "n"].map(|name| fields[name].as_str());
    assert_eq!(got, ["[::]:80", "a \"b=c\"", "", "1"]);
}

/// Carries frames between the interfaces `west` and `east` of a namespace, each after a
/// time, until it is dropped. netem does that better; not every kernel has it.
pub struct Wire {
    cut: Arc<AtomicBool>,
}

impl Wire {
    fn new(middle: &Namespace, delay: Duration) -> Self {
        let wire = Self { cut: Arc::default() };
        for (from, to) in [("west", "east"), ("east", "west")] {
            let [from, to] = [from, to].map(|end| middle.frames(end).unwrap());
            nix::sys::socket::setsockopt(&from, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20)).unwrap();
            from.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let (under_way, arriving) = mpsc::channel::<(Instant, Vec<u8>)>();
            let cut = Arc::clone(&wire.cut);
            thread::spawn(move || {
                let mut frame = vec![0; 64 << 10];
                while !cut.load(Ordering::Relaxed) {
                    if let Ok(len) = (&from).read(&mut frame) {
                        under_way.send((Instant::now() + delay, frame[..len].to_vec())).unwrap();
                    }
                }
            });
            thread::spawn(move || {
                for (due, frame) in arriving {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    // A full queue loses it, as on any wire.
                    let _ = to.send(&frame);
                }
            });
        }
        wire
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut.store(true, Ordering::Relaxed);
    }
}

/// An endless stream of bytes that look random; each seed has its own. Whoever
/// receives it knows what has to come, so the first wrong byte is told from which
/// it should have been, which no checksum does.
#[derive(Clone)]
pub struct Stream {
    at: usize,
    pub count: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        let at = fastrand::Rng::with_seed(seed).usize(..Self::ring().len());
        Self { at, count: 0 }
    }

    /// The bytes repeat after so many that no buffer or segment has that size.
    fn ring() -> &'static [u8] {
        static RING: OnceLock<Vec<u8>> = OnceLock::new();
        RING.get_or_init(|| {
            let mut ring = vec![0; (8 << 20) + 9973];
            fastrand::Rng::with_seed(1).fill(&mut ring);
            ring
        })
    }

    /// The next bytes, `most` or fewer, which stay the next.
    pub fn peek(&self, most: usize) -> &'static [u8] {
        let ring = Self::ring();
        &ring[self.at..ring.len().min(self.at + most)]
    }

    /// The next bytes, `most` or fewer.
    pub fn next(&mut self, most: usize) -> &'static [u8] {
        let bytes = self.peek(most);
        self.at = (self.at + bytes.len()) % Self::ring().len();
        self.count += bytes.len() as u64;
        bytes
    }

    /// Whether these are the next bytes.
    ///
    /// # Panics
    /// If not, with the place of the first wrong one.
    pub fn check(&mut self, mut got: &[u8]) {
        while !got.is_empty() {
            let before = self.count;
            let expected = self.next(got.len());
            let (head, tail) = got.split_at(expected.len());
            if head != expected {
                let wrong = head.iter().zip(expected).take_while(|(a, b)| a == b).count();
                let at = before + wrong as u64;
                panic!("byte {at} of a stream is not the one that was sent: {}", self.place(&head[wrong..]));
            }
            got = tail;
        }
    }

    /// Where bytes are from that came instead of the next ones.
    fn place(&self, got: &[u8]) -> String {
        let (ring, got) = (Self::ring(), &got[..got.len().min(64)]);
        match ring.windows(got.len()).position(|bytes| bytes == got) {
            Some(at) => {
                let origin = (self.at + ring.len() - (self.count % ring.len() as u64) as usize) % ring.len();
                let at = (at + ring.len() - origin) % ring.len();
                format!("it is byte {at} or one {} later", ring.len())
            }
            None => "it is of another stream, or of none".into(),
        }
    }

    /// Sends `bytes` of them in writes of random size.
    pub fn send(&mut self, mut to: &TcpStream, bytes: u64) -> io::Result<()> {
        let mut random = fastrand::Rng::with_seed(self.at as u64);
        let end = self.count + bytes;
        while self.count < end {
            let size = match random.u8(..8) {
                0 => random.usize(1..=100),
                1 => random.usize(1..=5000),
                _ => random.usize(1..=256 << 10),
            };
            to.write_all(self.next(size.min((end - self.count) as usize)))?;
        }
        Ok(())
    }

    /// Receives and checks exactly `bytes` of them.
    pub fn receive(&mut self, mut from: &TcpStream, bytes: u64) {
        let end = self.count + bytes;
        let mut buffer = vec![0; (256 << 10).min(bytes as usize)];
        while self.count < end {
            let most = buffer.len().min((end - self.count) as usize);
            match from.read(&mut buffer[..most]) {
                Ok(0) => panic!("the stream ended after {} of {end} bytes", self.count),
                Ok(count) => self.check(&buffer[..count]),
                Err(error) => panic!("the stream broke after {} of {end} bytes: {error}", self.count),
            }
        }
    }

    /// Receives and checks all that comes until the stream ends, or breaks.
    pub fn receive_all(&mut self, mut from: impl io::Read) -> io::Result<u64> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return Ok(self.count),
                Ok(count) => self.check(&buffer[..count]),
                // A socket with a deadline says so after the process was stopped and went
                // on (signal(7)), as a frozen virtual machine or control group does.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Makes sure that nothing comes any more but the end.
pub fn expect_end(mut from: &TcpStream) {
    match from.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0, "bytes came that were not sent"),
        Err(error) => panic!("the end was expected: {error}"),
    }
}

/// Makes sure that a connection is reset, by reading it.
pub fn expect_reset(mut from: &TcpStream) {
    match from.read(&mut [0; 1024]) {
        Ok(0) => panic!("a reset was expected, not an orderly end"),
        Ok(_) => panic!("a reset was expected, not bytes"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
}

/// Sends `bytes` there and as many back, checked.
pub fn exchange(a: &TcpStream, b: &TcpStream, there: &mut Stream, back: &mut Stream, bytes: u64) {
    let (mut got_there, mut got_back) = (there.clone(), back.clone());
    one_way(a, b, there, &mut got_there, bytes);
    one_way(b, a, back, &mut got_back, bytes);
}

/// Sends and receives at the same time: what is sent may be more than the buffers on
/// the way hold.
fn one_way(from: &TcpStream, to: &TcpStream, sent: &mut Stream, got: &mut Stream, bytes: u64) {
    thread::scope(|scope| {
        let sender = scope.spawn(|| sent.send(from, bytes).unwrap());
        got.receive(to, bytes);
        sender.join().unwrap();
    });
}

/// The right to open thousands of descriptors, which all tests of this process share:
/// one test at a time has it.
pub fn many_descriptors() -> MutexGuard<'static, ()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    guard
}
