//! Connections of random shape on `--path auto`, of which every byte is checked at
//! both ends: as auto likes, and with changes of path forced all the time.

use std::{
    collections::HashSet,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::ready;
use crate::kit::{
    Daemon, Family, Hosts, Stream, accept, connect, eventually, expect_end, fields, reset, underpass,
};

/// So many at the same time.
const AT_ONCE: u64 = 16;

#[test]
fn random_shapes_ipv4() {
    run(Family::V4, 300, None);
}

#[test]
fn random_shapes_ipv6() {
    run(Family::V6, 300, None);
}

#[test]
fn random_shapes_with_forced_switches_ipv4() {
    run(Family::V4, 700, Some("5000"));
}

#[test]
fn random_shapes_with_forced_switches_ipv6() {
    run(Family::V6, 700, Some("200000"));
}

/// What a connection does; both ends know it from its seed.
struct Script {
    phases: Vec<Phase>,
    end: End,
}

enum Phase {
    /// Small messages, each answered.
    Exchange { rounds: u64, bytes: u64 },
    /// Both ways at once.
    Flow { there: Flow, back: Flow },
    /// Nothing for a while.
    Pause(Duration),
}

#[derive(Clone, Copy)]
struct Flow {
    bytes: u64,
    /// The sender pauses now and then.
    halting: bool,
    /// The reader does.
    slow: bool,
}

enum End {
    /// One side finishes; the other one sends a tail and closes.
    Finish { client_first: bool, tail: Flow },
    /// One side sends something and resets the connection.
    Reset { by_client: bool, bytes: u64 },
}

impl Script {
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let phases = (0..random.u8(..4)).map(|_| Phase::random(&mut random)).collect();
        let end = match random.u8(..8) {
            0 => End::Reset { by_client: random.bool(), bytes: size(&mut random) },
            _ => End::Finish { client_first: random.bool(), tail: Flow::random(&mut random) },
        };
        Self { phases, end }
    }

    /// Whether the connection ends in order, and then what the client sends and gets.
    fn expected(&self) -> Option<(u64, u64)> {
        let mut sum = (8, 0);
        for phase in &self.phases {
            let (there, back) = match phase {
                Phase::Exchange { rounds, bytes } => (rounds * bytes, rounds * bytes),
                Phase::Flow { there, back } => (there.bytes, back.bytes),
                Phase::Pause(_) => (0, 0),
            };
            sum = (sum.0 + there, sum.1 + back);
        }
        match self.end {
            End::Reset { .. } => None,
            End::Finish { client_first: true, tail } => Some((sum.0, sum.1 + tail.bytes)),
            End::Finish { client_first: false, tail } => Some((sum.0 + tail.bytes, sum.1)),
        }
    }
}

impl Phase {
    fn random(random: &mut fastrand::Rng) -> Self {
        match random.u8(..5) {
            0 => Self::Pause(Duration::from_millis(random.u64(..50))),
            1 | 2 => Self::Exchange { rounds: random.u64(1..80), bytes: random.u64(1..3000) },
            _ => Self::Flow { there: Flow::random(random), back: Flow::random(random) },
        }
    }
}

impl Flow {
    fn random(random: &mut fastrand::Rng) -> Self {
        Self { bytes: size(random), halting: random.u8(..4) == 0, slow: random.u8(..4) == 0 }
    }
}

/// 0 to 16 MiB, small ones as often as large ones.
fn size(random: &mut fastrand::Rng) -> u64 {
    let bits = random.u32(0..=24);
    random.u64(..1 << bits)
}

/// One end of a connection: what it sends, and what has to come.
struct Side {
    out: Stream,
    back: Stream,
    is_client: bool,
}

impl Side {
    fn new(seed: u64, is_client: bool) -> Self {
        let [there, back] = [Stream::new(seed * 2), Stream::new(seed * 2 + 1)];
        let (out, back) = if is_client { (there, back) } else { (back, there) };
        Self { out, back, is_client }
    }

    fn play(&mut self, phase: &Phase, stream: &TcpStream) {
        match phase {
            Phase::Pause(time) => thread::sleep(*time),
            Phase::Exchange { rounds, bytes } => {
                for _ in 0..*rounds {
                    if self.is_client {
                        self.out.send(stream, *bytes).unwrap();
                        self.back.receive(stream, *bytes);
                    } else {
                        self.back.receive(stream, *bytes);
                        self.out.send(stream, *bytes).unwrap();
                    }
                }
            }
            Phase::Flow { there, back } => {
                let (going, coming) = if self.is_client { (there, back) } else { (back, there) };
                let (out, back) = (&mut self.out, &mut self.back);
                thread::scope(|scope| {
                    scope.spawn(|| send(stream, out, *going));
                    receive(stream, back, *coming);
                });
            }
        }
    }

    fn end(&mut self, end: &End, stream: TcpStream) {
        match end {
            End::Finish { client_first, tail } if *client_first == self.is_client => {
                stream.shutdown(Shutdown::Write).unwrap();
                receive(&stream, &mut self.back, *tail);
                expect_end(&stream);
            }
            End::Finish { tail, .. } => {
                expect_end(&stream);
                send(&stream, &mut self.out, *tail);
            }
            End::Reset { by_client, bytes } if *by_client == self.is_client => {
                // A reset overtakes what the other side has not read yet: that has to
                // be nothing of what came before.
                self.back.receive(&stream, 1);
                self.out.send(&stream, *bytes).unwrap();
                reset(stream);
            }
            End::Reset { bytes, .. } => {
                self.out.send(&stream, 1).unwrap();
                // Some of it comes, and none of it wrong; then the reset, not an end.
                let before = self.back.count;
                let error = self.back.receive_all(&stream).expect_err("a reset was expected");
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                assert!(self.back.count - before <= *bytes);
            }
        }
    }
}

fn send(to: &TcpStream, stream: &mut Stream, flow: Flow) {
    let mut left = flow.bytes;
    while left > 0 {
        let part = if flow.halting { left.min(1 + flow.bytes / 5) } else { left };
        stream.send(to, part).unwrap();
        left -= part;
        if flow.halting {
            thread::sleep(Duration::from_millis(3));
        }
    }
}

fn receive(from: &TcpStream, stream: &mut Stream, flow: Flow) {
    let mut left = flow.bytes;
    while left > 0 {
        let part = if flow.slow { left.min(1 + flow.bytes / 7) } else { left };
        stream.receive(from, part);
        left -= part;
        if flow.slow {
            thread::sleep(Duration::from_millis(7));
        }
    }
}

fn play(stream: TcpStream, seed: u64, is_client: bool) {
    let (script, mut side) = (Script::new(seed), Side::new(seed, is_client));
    for phase in &script.phases {
        side.play(phase, &stream);
    }
    side.end(&script.end, stream);
}

fn run(family: Family, count: u64, switch_every: Option<&str>) {
    let hosts = Hosts::new();
    let target = hosts.listen(family);
    let mut command = underpass();
    let listen = SocketAddr::new(Hosts::relay_address(family), 0).to_string();
    command.args(["relay", "--log-connections", "--listen", &listen, "--to"]);
    command.arg(target.local_addr().unwrap().to_string());
    if let Some(bytes) = switch_every {
        command.env("UNDERPASS_TEST_SWITCH_EVERY", bytes);
    }
    let relay = Daemon::start(&hosts.relay, &mut command);
    let listen = ready(&relay);
    let begun = AtomicU64::new(0);
    let expected = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = begun.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    let client = connect(&hosts.client, listen).unwrap();
                    (&client).write_all(&seed.to_be_bytes()).unwrap();
                    let address = client.local_addr().unwrap().to_string();
                    if let Some((sent, received)) = Script::new(seed).expected() {
                        expected.lock().unwrap().insert((address, sent.to_string(), received.to_string()));
                    }
                    play(client, seed, true);
                }
            });
        }
        for _ in 0..count {
            let server = accept(&target);
            scope.spawn(move || {
                let mut seed = [0; 8];
                (&server).read_exact(&mut seed).unwrap();
                play(server, u64::from_be_bytes(seed), false);
            });
        }
    });
    let expected = expected.into_inner().unwrap();
    let mut paths = HashSet::new();
    eventually("every connection is in the log, with its bytes", || {
        let mut missing = expected.clone();
        for line in relay.log().iter().filter(|line| line.contains(" connection ")) {
            let mut line = fields(line);
            paths
                .extend(line["paths"].split(',').filter_map(|part| Some(part.split_once(':')?.0.to_owned())));
            let mut take = |name| line.remove(name).unwrap();
            if take("end") == "closed" {
                missing.remove(&(take("client"), take("sent"), take("received")));
            }
        }
        missing.is_empty()
    });
    assert_eq!(paths, ["copy", "splice", "kernel"].map(str::to_owned).into(), "every path was taken");
}
