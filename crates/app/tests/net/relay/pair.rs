//! Pair mode, with socat and nc as its clients.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
};

use super::{Path, line_of, on_every_path_waiting, start};
use crate::kit::{
    Daemon, Family, Hosts, PATIENCE, Stream, connect, eventually, exchange, expect_end, fields, reset,
};

on_every_path_waiting!(
    socat_and_nc,
    a_client_that_leaves_is_forgotten,
    a_client_that_sent_and_finished_is_kept,
    what_is_kept_is_bounded,
    either_side_may_close,
    many_pairs,
);

struct Pairing {
    hosts: Hosts,
    relay: Daemon,
    listen: SocketAddr,
}

impl Pairing {
    fn new(path: Path, family: Family) -> Self {
        let hosts = Hosts::new();
        let listen = SocketAddr::new(Hosts::relay_address(family), 0).to_string();
        let (relay, listen) = start(&hosts, &["--pair", "--path", path.word(), "--listen", &listen]);
        Self { hosts, relay, listen }
    }

    fn connect(&self) -> TcpStream {
        connect(&self.hosts.client, self.listen).unwrap()
    }

    /// A pair that has met.
    fn pair(&self) -> [TcpStream; 2] {
        let (first, second) = (self.connect(), self.connect());
        exchange(&first, &second, &mut Stream::new(1), &mut Stream::new(2), 10);
        [first, second]
    }

    /// How many connections the relay's host has on the relay's port.
    fn connected(&self) -> usize {
        let port = format!(":{:04X} ", self.listen.port());
        self.hosts.relay.enter(|| {
            let tables = ["tcp", "tcp6"]
                .map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap());
            // The local address, the remote one, and 01 for established.
            let is_ours = |line: &&str| {
                line.find(&port).is_some_and(|at| at < 50) && line.split_whitespace().nth(3) == Some("01")
            };
            tables.iter().flat_map(|table| table.lines()).filter(is_ours).count()
        })
    }
}

/// A program with pipes to and from it.
fn piped(hosts: &Hosts, command: &mut Command) -> Child {
    hosts.client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap()
}

/// What the first sends before the second comes is kept; both ways are intact, and
/// both programs end by themselves.
fn socat_and_nc(path: Path, family: Family) {
    const EARLY: usize = 150_000;
    const MUCH: usize = 4 << 20;
    let pairing = Pairing::new(path, family);
    let (host, port) = (pairing.listen.ip().to_string(), pairing.listen.port().to_string());
    let mut socat = piped(
        &pairing.hosts,
        Command::new("socat").args(["-t", "60", "-", &format!("TCP:{}", pairing.listen)]),
    );
    let bytes = |seed| {
        let mut bytes = vec![0; MUCH];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        bytes
    };
    let (there, back) = (bytes(1), bytes(2));
    thread::scope(|scope| {
        let mut to_socat = socat.stdin.take().unwrap();
        to_socat.write_all(&there[..EARLY]).unwrap();
        eventually("socat has connected", || pairing.connected() == 1);
        let mut nc = piped(&pairing.hosts, Command::new("nc").args(["-N", &host, &port]));
        let mut to_nc = nc.stdin.take().unwrap();
        scope.spawn(move || to_nc.write_all(&back).unwrap());
        scope.spawn(|| {
            let rest = &there[EARLY..];
            let mut to_socat = to_socat;
            to_socat.write_all(rest).unwrap();
        });
        let at_nc = scope.spawn(move || nc.wait_with_output().unwrap());
        let at_socat = socat.wait_with_output().unwrap();
        let at_nc = at_nc.join().unwrap();
        assert!(at_socat.status.success() && at_nc.status.success(), "{} {}", at_socat.status, at_nc.status);
        assert!(at_nc.stdout == there, "nc got {} bytes, or other ones", at_nc.stdout.len());
        assert!(at_socat.stdout == bytes(2), "socat got {} bytes, or other ones", at_socat.stdout.len());
    });
    let line = fields(&pairing.relay.line(" connection "));
    let got = ["sent", "received", "end"].map(|name| line[name].as_str());
    assert_eq!(got, ["4194304", "4194304", "closed"], "{line:?}");
}

/// However it leaves: the next two are a pair.
fn a_client_that_leaves_is_forgotten(path: Path, family: Family) {
    let pairing = Pairing::new(path, family);
    for way in 0..3 {
        let leaves = pairing.connect();
        let address = leaves.local_addr().unwrap();
        match way {
            0 => drop(leaves),
            1 => reset(leaves),
            _ => {
                (&leaves).write_all(b"this is for nobody").unwrap();
                eventually("the relay has it", || pairing.connected() == 1);
                reset(leaves);
            }
        }
        let line = line_of(&pairing.relay, address);
        assert_eq!(line["end"], "left before another came", "{way}: {line:?}");
        drop(pairing.pair());
    }
}

/// What it left is delivered, and the answer comes back.
fn a_client_that_sent_and_finished_is_kept(path: Path, family: Family) {
    let pairing = Pairing::new(path, family);
    let first = pairing.connect();
    let address = first.local_addr().unwrap();
    Stream::new(1).send(&first, 20_000).unwrap();
    first.shutdown(Shutdown::Write).unwrap();
    // The relay has to go on while such a client waits.
    eventually("the relay has it", || pairing.connected() == 0);
    thread::sleep(std::time::Duration::from_millis(100));
    let second = pairing.connect();
    assert_eq!(Stream::new(1).receive_all(&second).unwrap(), 20_000);
    Stream::new(2).send(&second, 30_000).unwrap();
    drop(second);
    assert_eq!(Stream::new(2).receive_all(&first).unwrap(), 30_000);
    let line = line_of(&pairing.relay, address);
    assert_eq!(["sent", "received", "end"].map(|name| line[name].as_str()), ["20000", "30000", "closed"]);
}

/// A first client that sends and sends is stopped until the second comes.
fn what_is_kept_is_bounded(path: Path, family: Family) {
    const ALL: u64 = 64 << 20;
    let pairing = Pairing::new(path, family);
    let first = pairing.connect();
    first.set_nonblocking(true).unwrap();
    let mut sent = Stream::new(1);
    let mut full = 0;
    while full < 200 {
        assert!(sent.count < 16 << 20, "nothing stops a client that waits");
        match (&first).write(sent.peek(64 << 10)) {
            Ok(count) => {
                sent.next(count);
                full = 0;
            }
            Err(_would_block) => {
                full += 1;
                thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
    first.set_nonblocking(false).unwrap();
    let second = pairing.connect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let rest = ALL - sent.count;
            sent.send(&first, rest).unwrap();
            first.shutdown(Shutdown::Write).unwrap();
        });
        assert_eq!(Stream::new(1).receive_all(&second).unwrap(), ALL);
    });
}

/// The other one gets the tail, and the end.
fn either_side_may_close(path: Path, family: Family) {
    const MUCH: u64 = 3 << 20;
    let pairing = Pairing::new(path, family);
    for closer in [0, 1] {
        let mut pair = pairing.pair();
        let first = pair[0].local_addr().unwrap();
        pair.swap(0, closer);
        let [closes, stays] = pair;
        let sender = thread::spawn(move || Stream::new(3).send(&closes, MUCH).unwrap());
        assert_eq!(Stream::new(3).receive_all(&stays).unwrap(), MUCH);
        sender.join().unwrap();
        drop(stays);
        let line = line_of(&pairing.relay, first);
        let (sent, received) = if closer == 0 { (MUCH + 10, 10) } else { (10, MUCH + 10) };
        let expected = [sent.to_string(), received.to_string(), "closed".to_owned()];
        assert_eq!(["sent", "received", "end"].map(|name| line[name].clone()), expected);
        // One that is reset takes the other with it.
        let mut pair = pairing.pair();
        pair.swap(0, closer);
        let [resets, stays] = pair;
        reset(resets);
        crate::kit::expect_reset(&stays);
    }
}

/// One after the other, then all at once.
fn many_pairs(path: Path, family: Family) {
    const AT_ONCE: u64 = 100;
    let pairing = Pairing::new(path, family);
    for _ in 0..100 {
        let [first, second] = pairing.pair();
        drop(first);
        expect_end(&second);
    }
    // Who meets whom is open; that they meet two by two is not.
    let clients: Vec<_> = pairing
        .hosts
        .client
        .enter(|| (0..AT_ONCE).map(|_| TcpStream::connect(pairing.listen).unwrap()).collect());
    for (number, mut client) in (0..).zip(&clients) {
        client.write_all(&u64::to_be_bytes(number)).unwrap();
    }
    let met: Vec<u64> = clients
        .iter()
        .map(|mut client| {
            let mut other = [0; 8];
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.read_exact(&mut other).unwrap();
            u64::from_be_bytes(other)
        })
        .collect();
    for (number, other) in (0..).zip(&met) {
        assert_ne!(number, *other);
        assert_eq!(met[*other as usize], number, "a pair is a pair for both");
    }
    assert_eq!(met.iter().collect::<HashSet<_>>().len() as u64, AT_ONCE);
}
