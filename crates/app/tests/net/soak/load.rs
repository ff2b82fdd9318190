//! What runs all the time: TCP through relays and multiplexers, messages, datagrams,
//! names, and local exchanges that are accelerated, all watched.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering},
    thread::{self, Scope},
    time::Duration,
};

use nix::mount::{MsFlags, mount};
use serde_json::Value;
use underpass::shortcut::cgroup::Temporary;

use super::{
    Tally, Witness,
    faults::succeed,
    usage::{self, Usage},
};
use crate::{
    kit::{Daemon, Family, Hosts, Stream, connect, reset, underpass},
    relay::ready,
};

/// The kinds of work, by the place of their counts.
pub const KINDS: [&str; 6] =
    ["TCP connections", "runs of messages", "datagrams", "DNS answers", "local exchanges", "faulty peers"];
const CLIENTS: u64 = 10;
/// Where the relays listen, always the same: one for each way to choose a path.
pub const RELAYS: [&str; 3] = ["10.0.1.2:4000", "10.0.1.2:4001", "10.0.1.2:4002"];
const PATHS: [&str; 3] = ["auto", "kernel", "splice"];
const MUX: &str = "10.0.2.2:4100";
const MESSAGES: &str = "10.0.2.2:4200";
const BACKENDS: [&str; 2] = ["10.0.2.2:4201", "10.0.2.2:4202"];
/// A file system of its own, of 1 MiB.
pub const DISK: &str = "/run/underpass-soak";

/// What a client asks the service to do: the first byte of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Ask {
    /// Receive all, then send as much of another stream.
    Answer = b'a',
    /// The same, late.
    AnswerLate = b'l',
    /// Send back every few bytes, as they come.
    Talk = b't',
    /// Reset after a part.
    Reset = b'r',
    /// Never read.
    Stall = b's',
}

/// What load threads use.
pub struct Shared {
    pub hosts: Hosts,
    pub service: String,
    cgroup: Temporary,
}

/// All that runs.
pub struct Place {
    pub shared: Arc<Shared>,
    relays: [Option<Daemon>; RELAYS.len()],
    mux: Option<Daemon>,
    messages: Daemon,
    watch: Option<Daemon>,
    listener: TcpListener,
    nth: usize,
}

impl Place {
    pub fn new() -> Self {
        std::fs::create_dir_all(DISK).unwrap();
        mount(Some("soak"), DISK, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
        let hosts = Hosts::new();
        let listener = hosts.listen(Family::V4);
        let service = MUX.to_owned();
        let shared = Arc::new(Shared { hosts, service, cgroup: Temporary::new("soak").unwrap() });
        let hosts = &shared.hosts;
        let messages = {
            let mut command = underpass();
            command.args(["mux", "listen", MESSAGES, "--per", "message", "--frame", "u16be@0"]);
            command.args(["--route", &format!("@2:600={}", BACKENDS[0])]);
            command.args(["--route", &format!("@2:601={}", BACKENDS[1])]);
            Daemon::start(&hosts.server, &mut command)
        };
        messages.line("ready");
        let mut place =
            Self { shared, relays: [None, None, None], mux: None, messages, watch: None, listener, nth: 0 };
        place.restart_mux();
        place.restart_watch();
        for _ in RELAYS {
            place.restart_relay();
        }
        place.attach_to_interfaces();
        place.attach_shortcut();
        place
    }

    /// Kills one relay after the other.
    pub fn restart_relay(&mut self) {
        let nth = self.nth % RELAYS.len();
        self.nth += 1;
        self.relays[nth] = None;
        let mut command = underpass();
        command.args(["relay", "--listen", RELAYS[nth], "--path", PATHS[nth], "--to", MUX]);
        let relay = Daemon::start(&self.shared.hosts.relay, &mut command);
        ready(&relay);
        self.relays[nth] = Some(relay);
    }

    pub fn restart_mux(&mut self) {
        self.mux = None;
        let mut command = underpass();
        let at = self.listener.local_addr().unwrap();
        command.args(["mux", "listen", MUX, "--route", &format!("@1:soak={at}")]);
        let mux = Daemon::start(&self.shared.hosts.server, &mut command);
        mux.line("ready");
        self.mux = Some(mux);
    }

    pub fn restart_watch(&mut self) {
        self.watch = None;
        let mut command = underpass();
        command.args(["watch", "--json"]).stdout(File::create("/dev/null").unwrap());
        let watch = Daemon::start(&self.shared.hosts.server, &mut command);
        watch.line("watching");
        self.watch = Some(watch);
    }

    /// Attaches what is attached: anew, or in place of what is there.
    pub fn attach_again(&self) {
        self.attach_to_interfaces();
        succeed(&self.shared.hosts.client, &["shortcut", "detach"]);
        self.attach_shortcut();
    }

    fn attach_shortcut(&self) {
        let cgroup = self.shared.cgroup.path().to_str().unwrap();
        succeed(&self.shared.hosts.client, &["shortcut", "attach", "--cgroup", cgroup]);
    }

    fn attach_to_interfaces(&self) {
        let hosts = &self.shared.hosts;
        succeed(&hosts.client, &["dnsguard", "attach", "eth0", "--resolver", "10.0.1.2"]);
        let routes = ["--route", "@4:600=5001", "--route", "@4:601=5002"];
        succeed(&hosts.server, &[&["mux", "attach", "eth0", "--port", "5000"], &routes[..]].concat());
    }

    pub fn usage(&self) -> Vec<Usage> {
        let named = ["relay auto", "relay kernel", "relay splice"].into_iter().zip(&self.relays);
        let all = named.chain([("mux", &self.mux), ("watch", &self.watch)]);
        let mut usage: Vec<_> =
            all.filter_map(|(name, daemon)| Some(Usage::of(name, daemon.as_ref()?))).collect();
        usage.push(Usage::of("mux messages", &self.messages));
        usage
    }

    /// What is attached or runs, and whether it is at work, as each host's `status` has it.
    pub fn attached(&self) -> BTreeSet<String> {
        let hosts = &self.shared.hosts;
        let all = [("client", &hosts.client), ("relay", &hosts.relay), ("server", &hosts.server)];
        let items = all.iter().flat_map(|(name, host)| {
            let status: Value = serde_json::from_str(&succeed(host, &["status", "--json"])).unwrap();
            let items = status["items"].as_array().unwrap().clone();
            items
                .into_iter()
                .map(move |it| format!("{name}: {} on {}, works: {}", it["function"], it["on"], it["works"]))
        });
        items.collect()
    }

    /// How many local connections the shortcut's maps hold as accelerated.
    pub fn accelerated(&self) -> u64 {
        let shown = succeed(&self.shared.hosts.client, &["shortcut", "show", "--json"]);
        let shown: Value = serde_json::from_str(&shown).unwrap();
        shown["accelerated_now"].as_u64().unwrap()
    }

    /// The programs that all hold.
    pub fn programs(&self) -> BTreeSet<u32> {
        let all = self.relays.iter().chain([&self.mux, &self.watch]).flatten().chain([&self.messages]);
        all.flat_map(usage::programs).collect()
    }

    /// Ends everything in order; returns what watch has said last.
    pub fn end(self) -> String {
        use nix::sys::signal::Signal::{SIGINT, SIGTERM};
        for mut daemon in self.relays.into_iter().flatten().chain(self.mux).chain([self.messages]) {
            daemon.signal(SIGTERM);
            assert!(daemon.wait().success());
        }
        let mut watch = self.watch.unwrap();
        watch.signal(SIGINT);
        assert!(watch.wait().success());
        succeed(&self.shared.hosts.client, &["down"]);
        watch.log().last().cloned().unwrap_or_default()
    }
}

/// The services, which live as long as the process.
pub fn serve(place: &Place, tally: &'static Tally) {
    let hosts = &place.shared.hosts;
    accept_all(place.listener.try_clone().unwrap(), tally, answer);
    for backend in BACKENDS {
        let listener = hosts.server.enter(|| TcpListener::bind(backend)).unwrap();
        accept_all(listener, tally, |mut stream| io::copy(&mut stream.try_clone()?, &mut stream).map(drop));
    }
    for port in [5001, 5002] {
        let socket = hosts.server.enter(|| UdpSocket::bind(("10.0.2.2", port))).unwrap();
        datagrams(socket, move |got| vec![[&port.to_string().into_bytes()[..], got].concat()]);
    }
    let socket = hosts.relay.enter(|| UdpSocket::bind("10.0.1.2:53")).unwrap();
    datagrams(socket, |query| vec![resolve(query, true), resolve(query, false)]);
}

fn accept_all(listener: TcpListener, tally: &'static Tally, serve: fn(TcpStream) -> io::Result<()>) {
    thread::spawn(move || {
        loop {
            // Faults make it fail, and the client sees that; the listener has a deadline.
            let Ok((stream, _)) = listener.accept() else { continue };
            thread::spawn(move || {
                let _witness = Witness(tally);
                serve(stream)
            });
        }
    });
}

fn datagrams(socket: UdpSocket, answers: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) {
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        loop {
            // An interface that is down makes both fail.
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            for answer in answers(&buffer[..length]) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
}

/// An answer to a query for an address; a forged one claims authority and spells the name out.
fn resolve(query: &[u8], forged: bool) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2..4].copy_from_slice(if forged { &[0x84, 0] } else { &[0x81, 0x80] });
    answer[7] = 1;
    let name = query[12..query.len() - 4].to_vec();
    answer.extend(if forged { name } else { vec![0xc0, 12] });
    answer.extend([0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    answer.extend(if forged { [6, 6, 6, 6] } else { [1, 2, 3, 4] });
    answer
}

fn answer(stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    let mut head = [0; 13];
    (&stream).read_exact(&mut head)?;
    let number = |at: usize| u64::from(u32::from_be_bytes(*head[at..].first_chunk().unwrap()));
    let (ask, seed, bytes) = (head[0], number(5), number(9));
    match ask {
        b's' => {
            thread::sleep(Duration::from_millis(500));
            reset(stream);
        }
        b'r' => {
            (&stream).take(bytes / 2).read_to_end(&mut vec![])?;
            reset(stream);
        }
        b't' => drop(io::copy(&mut &stream, &mut &stream)?),
        _ => {
            if Stream::new(seed).receive_all(&stream)? != bytes {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if ask == Ask::AnswerLate as u8 {
                thread::sleep(Duration::from_millis(200));
            }
            Stream::new(seed + 1).send(&stream, bytes)?;
        }
    }
    Ok(())
}

/// Starts all load; each thread ends when the tally says so.
pub fn start<'scope>(scope: &'scope Scope<'scope, '_>, shared: &'scope Shared, tally: &'static Tally) {
    let spawn = |work: Box<dyn Fn(&mut fastrand::Rng) + Send + 'scope>, seed| {
        scope.spawn(move || {
            let _witness = Witness(tally);
            let mut random = fastrand::Rng::with_seed(seed);
            while !tally.stopped() {
                work(&mut random);
            }
        });
    };
    for number in 0..CLIENTS {
        spawn(Box::new(move |random| client(&shared.hosts, tally, random)), number);
    }
    spawn(Box::new(move |random| tally.work(1, || messages(&shared.hosts, random))), 100);
    spawn(Box::new(move |random| multiplexed(&shared.hosts, tally, random)), 101);
    spawn(Box::new(move |random| names(&shared.hosts, tally, random)), 102);
    spawn(Box::new(move |_| tally.work(4, || exchange(shared))), 103);
}

fn client(hosts: &Hosts, tally: &Tally, random: &mut fastrand::Rng) {
    let bytes = 1 << random.u32(0..22);
    let to: SocketAddr = random.choice(RELAYS).unwrap().parse().unwrap();
    let seed = random.u32(..) >> 1;
    match random.u8(..10) {
        0..4 => tally.work(0, || whole(hosts, to, Ask::Answer, seed, bytes)),
        4 => tally.work(0, || whole(hosts, to, Ask::AnswerLate, seed, bytes)),
        5..7 => tally.work(0, || talk(hosts, to, random)),
        7 => tally.work(5, || broken(hosts, to, Ask::Reset, bytes)),
        8 => tally.work(5, || broken(hosts, to, Ask::Stall, bytes)),
        _ => tally.work(5, || rubbish(hosts, to, random)),
    }
}

fn begin(hosts: &Hosts, to: SocketAddr, ask: Ask, seed: u32, bytes: u64) -> io::Result<TcpStream> {
    let stream = connect(&hosts.client, to)?;
    let mut head = vec![ask as u8];
    head.extend(b"soak");
    head.extend(seed.to_be_bytes());
    head.extend((bytes as u32).to_be_bytes());
    (&stream).write_all(&head)?;
    Ok(stream)
}

/// A connection that has to succeed.
pub fn whole(hosts: &Hosts, to: SocketAddr, ask: Ask, seed: u32, bytes: u64) -> io::Result<u64> {
    let stream = begin(hosts, to, ask, seed, bytes)?;
    Stream::new(seed.into()).send(&stream, bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let got = Stream::new(u64::from(seed) + 1).receive_all(&stream)?;
    if got == bytes {
        Ok(2 * bytes)
    } else {
        Err(io::Error::other(format!("{got} of {bytes} bytes came back")))
    }
}

/// Request and response, over and over.
fn talk(hosts: &Hosts, to: SocketAddr, random: &mut fastrand::Rng) -> io::Result<u64> {
    let stream = begin(hosts, to, Ask::Talk, 0, 0)?;
    let mut moved = 0;
    for _ in 0..random.u32(1..300) {
        let said: Vec<u8> = (0..random.usize(1..2000)).map(|_| random.u8(..)).collect();
        (&stream).write_all(&said)?;
        let mut heard = vec![0; said.len()];
        (&stream).read_exact(&mut heard)?;
        assert_eq!(said, heard, "other bytes came back");
        moved += 2 * said.len() as u64;
    }
    Ok(moved)
}

/// A connection that the service breaks. Whether it breaks while sending or receiving
/// does not matter, but it has to.
fn broken(hosts: &Hosts, to: SocketAddr, ask: Ask, bytes: u64) -> io::Result<u64> {
    let bytes = bytes.max(64);
    let stream = begin(hosts, to, ask, 0, bytes)?;
    // Which error it is does not matter: what hangs meets the deadline.
    let sent = Stream::new(0).send(&stream, bytes);
    hangs(sent.and_then(|()| (&stream).read(&mut [0]).map(drop)))
}

/// What no route takes: the multiplexer closes it. Or a client that leaves at once.
fn rubbish(hosts: &Hosts, to: SocketAddr, random: &mut fastrand::Rng) -> io::Result<u64> {
    let stream = connect(&hosts.client, to)?;
    if random.bool() {
        reset(stream);
        return Ok(0);
    }
    let junk: Vec<u8> = (0..random.usize(1..5000)).map(|_| random.u8(..)).collect();
    let sent = (&stream).write_all(&junk);
    hangs(sent.and_then(|()| (&stream).read(&mut [0]).map(drop)))
}

fn hangs(result: io::Result<()>) -> io::Result<u64> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
        Ok(()) | Err(_) => Ok(0),
    }
}

/// A run of messages to both backends; each comes back whole, once, in its backend's order.
fn messages(hosts: &Hosts, random: &mut fastrand::Rng) -> io::Result<u64> {
    const COUNT: u32 = 300;
    let stream = connect(&hosts.relay, MESSAGES.parse().unwrap())?;
    let (mut pending, mut sent) = (vec![], [vec![], vec![]]);
    for number in 0..COUNT {
        let backend = random.usize(..2);
        let filling = random.usize(..1000);
        let mut message = ((9 + filling) as u16).to_be_bytes().to_vec();
        message.extend(["600", "601"][backend].as_bytes());
        message.extend(number.to_be_bytes());
        message.resize(9 + filling, number as u8);
        pending.extend(&message);
        sent[backend].push(message);
    }
    let bytes = pending.len() as u64;
    let writer = stream.try_clone()?;
    let sender = thread::spawn(move || -> io::Result<()> {
        (&writer).write_all(&pending)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut came = [0, 0];
    let mut reader = io::BufReader::new(&stream);
    for _ in 0..COUNT {
        let mut message = vec![0; 2];
        reader.read_exact(&mut message)?;
        message.resize(usize::from(u16::from_be_bytes([message[0], message[1]])), 0);
        reader.read_exact(&mut message[2..])?;
        let backend = usize::from(message[4] - b'0');
        assert_eq!(message, sent[backend][came[backend]], "another message was expected");
        came[backend] += 1;
    }
    sender.join().unwrap()?;
    Ok(2 * bytes)
}

/// Datagrams through the rewritten port; they may be lost, but not wrong.
fn multiplexed(hosts: &Hosts, tally: &Tally, random: &mut fastrand::Rng) {
    let socket = hosts.relay.enter(|| UdpSocket::bind("10.0.2.1:0")).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let Ok(()) = socket.connect("10.0.2.2:5000") else { return };
    for number in 0..200_u32 {
        let nth = random.usize(..2);
        let said =
            [&number.to_be_bytes()[..], ["600", "601"][nth].as_bytes(), &vec![7; random.usize(..1200)]]
                .concat();
        let mut heard = [0; 2000];
        if socket.send(&said).is_err() {
            continue;
        }
        // One that was late may come first.
        while let Ok(length) = socket.recv(&mut heard) {
            if heard[4..8] == said[..4] {
                let expected = [["5001", "5002"][nth].as_bytes(), &said].concat();
                assert_eq!(heard[..length], expected, "another datagram came back");
                tally.work(2, || Ok(2 * said.len() as u64));
                break;
            }
        }
    }
}

/// Names, each answered twice, first by a forger; only the truth may arrive.
fn names(hosts: &Hosts, tally: &Tally, random: &mut fastrand::Rng) {
    let socket = hosts.client.enter(|| UdpSocket::bind("10.0.1.1:0")).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    for _ in 0..100 {
        let mut query = random.u16(..).to_be_bytes().to_vec();
        query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        query.extend([4]);
        query.extend((0..4).map(|_| random.lowercase() as u8));
        query.extend([7]);
        query.extend(b"example\0\0\x01\0\x01");
        let mut heard = [0; 600];
        // While it is attached anew after `down` forgeries pass: that is a fault.
        let before = tally.faults.load(Ordering::SeqCst);
        if socket.send_to(&query, "10.0.1.2:53").is_err() {
            continue;
        }
        while let Ok(length) = socket.recv(&mut heard) {
            let forged = heard[..length].ends_with(&[6, 6, 6, 6]);
            let met = before % 2 == 1 || tally.faults.load(Ordering::SeqCst) != before;
            assert!(!forged || met, "a forged answer arrived");
            if heard[..2] == query[..2] {
                tally.work(3, || Ok(0));
                break;
            }
        }
    }
}

/// Two programs that exchange messages over loopback, accelerated after a while.
fn exchange(shared: &Shared) -> io::Result<u64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut/exchange.py");
    let start = |role: &str, port: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo $$ > \"$0\" && exec python3 \"$@\""]);
        shell.arg(shared.cgroup.path().join("cgroup.procs")).arg(&script);
        shell.args([role, "127.0.0.1", port, "400", "30000", "1"]).stdout(Stdio::piped());
        shared.hosts.client.spawn(&mut shell)
    };
    let mut server = start("server", "0")?;
    let mut said = io::BufReader::new(server.stdout.take().unwrap());
    let mut port = String::new();
    io::BufRead::read_line(&mut said, &mut port)?;
    let client = start("client", port.trim())?.wait_with_output()?;
    let mut rest = String::new();
    said.read_to_string(&mut rest)?;
    let well = server.wait()?.success() && client.status.success();
    let client = String::from_utf8_lossy(&client.stdout).into_owned();
    let (ours, theirs): (Vec<_>, Vec<_>) =
        (client.split_whitespace().collect(), rest.split_whitespace().collect());
    if !well || ours.len() != 2 || theirs.len() != 2 {
        return Err(io::Error::other(format!("an exchange ended badly: {client} {rest}")));
    }
    assert_eq!((ours[0], ours[1]), (theirs[1], theirs[0]), "other bytes arrived");
    Ok(0)
}
