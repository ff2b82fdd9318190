//! The ways to lose, repeat or reorder bytes, each on every path and family.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
};

use super::{Path, World, line_of, on_every_path, on_every_path_waiting, to};
use crate::kit::{Family, Hosts, Stream, accept, connect, exchange, expect_end, expect_reset, reset};

on_every_path_waiting!(early_bytes, fin_first, fin_first_with_a_late_answer);
on_every_path!(
    reset_by_the_client,
    reset_by_the_server,
    reset_after_half_close,
    half_close_by_the_client_while_the_server_sends,
    half_close_by_the_server_while_the_client_sends,
    tail_after_close,
    random_write_sizes,
    five_hundred_at_once,
);

const MIB: u64 = 1 << 20;
/// So many exchanges take a connection to the path that suits exchanges.
const WARM: u64 = 40;

/// A connection that has settled on its path, and its streams there and back.
struct Settled {
    client: TcpStream,
    server: TcpStream,
    there: Stream,
    back: Stream,
    address: SocketAddr,
}

fn settled(world: &World) -> Settled {
    let (client, server) = world.connect();
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    for _ in 0..WARM {
        exchange(&client, &server, &mut there, &mut back, 64);
    }
    let address = client.local_addr().unwrap();
    Settled { client, server, there, back, address }
}

/// The stream as its receiver sees it who has had what is sent so far.
fn seen(seed: u64) -> Stream {
    let mut stream = Stream::new(seed);
    while stream.count < WARM * 64 {
        stream.next((WARM * 64 - stream.count) as usize);
    }
    stream
}

/// Bytes that come before the relay has reached the target.
fn early_bytes(path: Path, family: Family) {
    let hosts = Hosts::new();
    let stuck = hosts.listen_stuck(family);
    let (relay, listen) = to(&hosts, path, family, stuck.address(), &[]);
    let client = connect(&hosts.client, listen).unwrap();
    let address = client.local_addr().unwrap();
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    there.send(&client, 50_000).unwrap();
    let server = accept(&stuck.release());
    Stream::new(1).receive(&server, 50_000);
    back.send(&server, 100).unwrap();
    Stream::new(2).receive(&client, 100);
    drop(client);
    expect_end(&server);
    drop(server);
    let line = line_of(&relay, address);
    assert_eq!([&line["sent"], &line["received"], &line["end"]], ["50000", "100", "closed"], "{line:?}");
}

/// The client has sent everything and finished before the relay has reached the target.
fn fin_first(path: Path, family: Family) {
    let hosts = Hosts::new();
    let stuck = hosts.listen_stuck(family);
    let (relay, listen) = to(&hosts, path, family, stuck.address(), &[]);
    let clients = [0, 1, 50_000].map(|bytes| {
        let client = connect(&hosts.client, listen).unwrap();
        Stream::new(bytes).send(&client, bytes).unwrap();
        (client.local_addr().unwrap(), bytes)
    });
    let target = stuck.release();
    let mut came: Vec<_> = clients
        .iter()
        .map(|_| {
            let (mut server, mut got) = (accept(&target), vec![]);
            server.read_to_end(&mut got).unwrap();
            Stream::new(got.len() as u64).check(&got);
            got.len() as u64
        })
        .collect();
    came.sort_unstable();
    assert_eq!(came, [0, 1, 50_000]);
    for (address, bytes) in clients {
        let line = line_of(&relay, address);
        assert_eq!([&line["sent"], &line["end"]], [bytes.to_string().as_str(), "closed"], "{line:?}");
    }
}

/// As before, but the client waits for the answer, which is long.
fn fin_first_with_a_late_answer(path: Path, family: Family) {
    let hosts = Hosts::new();
    let stuck = hosts.listen_stuck(family);
    let (relay, listen) = to(&hosts, path, family, stuck.address(), &[]);
    let client = connect(&hosts.client, listen).unwrap();
    let address = client.local_addr().unwrap();
    (&client).write_all(b"ask").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let server = accept(&stuck.release());
    let mut asked = vec![];
    (&server).read_to_end(&mut asked).unwrap();
    assert_eq!(asked, b"ask");
    let sender = thread::spawn(move || Stream::new(1).send(&server, 8 * MIB).unwrap());
    assert_eq!(Stream::new(1).receive_all(&client).unwrap(), 8 * MIB);
    sender.join().unwrap();
    let line = line_of(&relay, address);
    assert_eq!([&line["sent"], &line["received"], &line["end"]], ["3", "8388608", "closed"], "{line:?}");
}

fn reset_by_the_client(path: Path, family: Family) {
    let world = World::new(path, family);
    let Settled { client, server, address, .. } = settled(&world);
    reset(client);
    expect_reset(&server);
    let line = line_of(&world.relay, address);
    assert!(line["end"].starts_with("client: Connection reset"), "{line:?}");
    // Before anything was sent, too.
    let (client, server) = world.connect();
    reset(client);
    expect_reset(&server);
}

fn reset_by_the_server(path: Path, family: Family) {
    let world = World::new(path, family);
    let Settled { client, server, address, .. } = settled(&world);
    reset(server);
    expect_reset(&client);
    let line = line_of(&world.relay, address);
    assert!(line["end"].starts_with("target: Connection reset"), "{line:?}");
    let (client, server) = world.connect();
    reset(server);
    expect_reset(&client);
}

/// One side has finished, then it or the other is reset.
fn reset_after_half_close(path: Path, family: Family) {
    let world = World::new(path, family);
    for (client_finishes, client_resets) in [(true, true), (true, false), (false, true), (false, false)] {
        let Settled { client, server, address, .. } = settled(&world);
        let (finishes, other) = if client_finishes { (&client, &server) } else { (&server, &client) };
        finishes.shutdown(Shutdown::Write).unwrap();
        expect_end(other);
        let (resets, stays) = if client_resets { (client, server) } else { (server, client) };
        reset(resets);
        if client_finishes == client_resets {
            // Reading would show the end that came before: the reset shows in writing.
            expect_broken(&stays);
        } else {
            expect_reset(&stays);
        }
        let line = line_of(&world.relay, address);
        let side = if client_resets { "client: " } else { "target: " };
        assert!(line["end"].starts_with(side), "{client_finishes} {client_resets} {line:?}");
    }
}

/// Makes sure that a connection cannot be written to, soon or later.
fn expect_broken(mut to: &TcpStream) {
    crate::kit::eventually("writing fails", || match to.write(b"x") {
        Ok(_) => false,
        Err(error) => {
            let kind = error.kind();
            assert!(matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
            true
        }
    });
}

fn half_close_by_the_client_while_the_server_sends(path: Path, family: Family) {
    half_close(path, family, true);
}

fn half_close_by_the_server_while_the_client_sends(path: Path, family: Family) {
    half_close(path, family, false);
}

/// One side finishes in the middle of what the other sends, which goes on until it
/// has seen the end, and then some more.
fn half_close(path: Path, family: Family, by_client: bool) {
    const FEW: u64 = 300_000;
    let world = World::new(path, family);
    let Settled { client, server, mut there, mut back, address } = settled(&world);
    let seeds = if by_client { (1, 2) } else { (2, 1) };
    let (finisher, sender) = if by_client { (&client, &server) } else { (&server, &client) };
    let (few, many) = if by_client { (&mut there, &mut back) } else { (&mut back, &mut there) };
    thread::scope(|scope| {
        let sent = scope.spawn(|| {
            many.send(sender, 4 * MIB).unwrap();
            // The end must come while this side still sends.
            let mut got = seen(seeds.0);
            got.receive(sender, FEW);
            expect_end(sender);
            many.send(sender, 8 * MIB).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = seen(seeds.1);
        got.receive(finisher, MIB);
        few.send(finisher, FEW).unwrap();
        finisher.shutdown(Shutdown::Write).unwrap();
        got.receive(finisher, 11 * MIB);
        expect_end(finisher);
        sent.join().unwrap();
    });
    let (few, many) = (WARM * 64 + FEW, WARM * 64 + 12 * MIB);
    let (sent, received) = if by_client { (few, many) } else { (many, few) };
    world.closed(address, sent, received);
}

/// A side sends much and closes at once: all of it has to arrive. Then the other side.
fn tail_after_close(path: Path, family: Family) {
    const MUCH: u64 = 16 * MIB;
    let world = World::new(path, family);
    for by_client in [true, false] {
        let Settled { client, server, mut there, mut back, address } = settled(&world);
        let (closer, reader) = if by_client { (client, server) } else { (server, client) };
        let (stream, seed) = if by_client { (&mut there, 1) } else { (&mut back, 2) };
        thread::scope(|scope| {
            let sender = scope.spawn(move || {
                stream.send(&closer, MUCH).unwrap();
                drop(closer);
            });
            let mut got = seen(seed);
            got.receive(&reader, 100);
            assert_eq!(got.receive_all(&reader).unwrap(), WARM * 64 + MUCH);
            sender.join().unwrap();
        });
        drop(reader);
        let few = WARM * 64;
        let (sent, received) = if by_client { (few + MUCH, few) } else { (few, few + MUCH) };
        world.closed(address, sent, received);
    }
}

/// Both ways at once; over 1 GiB on one way of one family, less on the others.
fn random_write_sizes(path: Path, family: Family) {
    let (there, back) = match family {
        Family::V4 => (1024 * MIB + 1, 32 * MIB + 7),
        Family::V6 => (32 * MIB + 5, 128 * MIB + 3),
    };
    let world = World::new(path, family);
    let (client, server) = world.connect();
    let address = client.local_addr().unwrap();
    thread::scope(|scope| {
        for (stream, seed, bytes) in [(&client, 3, there), (&server, 4, back)] {
            scope.spawn(move || {
                Stream::new(seed).send(stream, bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
        }
        let reader = scope.spawn(|| Stream::new(4).receive_all(&client).unwrap());
        assert_eq!(Stream::new(3).receive_all(&server).unwrap(), there);
        assert_eq!(reader.join().unwrap(), back);
    });
    world.closed(address, there, back);
}

/// Each asks for a number of bytes in its first write, gets them, and closes.
fn five_hundred_at_once(path: Path, family: Family) {
    const MANY: u64 = 500;
    let size = |seed: u64| seed * seed % 20_011;
    let world = World::new(path, family);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..MANY {
                let mut server = accept(&world.target);
                scope.spawn(move || {
                    let mut asked = [0; 8];
                    server.read_exact(&mut asked).unwrap();
                    let seed = u64::from_be_bytes(asked);
                    Stream::new(seed).receive(&server, 1000);
                    Stream::new(seed).send(&server, size(seed)).unwrap();
                    expect_end(&server);
                });
            }
        });
        let clients: Vec<_> = world.hosts.client.enter(|| {
            let clients: Vec<_> = (0..MANY).map(|_| TcpStream::connect(world.listen).unwrap()).collect();
            (0..MANY).zip(clients).collect()
        });
        for (seed, client) in &clients {
            (&mut &*client).write_all(&seed.to_be_bytes()).unwrap();
            Stream::new(*seed).send(client, 1000).unwrap();
        }
        for (seed, client) in clients {
            client.set_read_timeout(Some(crate::kit::PATIENCE)).unwrap();
            Stream::new(seed).receive(&client, size(seed));
            let address = client.local_addr().unwrap();
            drop(client);
            world.closed(address, 1008, size(seed));
        }
    });
}
