//! A reader that stops has to stop its sender, within a bounded number of bytes, and
//! loses nothing when it goes on.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{Path, World, on_every_path_waiting};
use crate::kit::{Family, Hosts, Stream, exchange, expect_end};

on_every_path_waiting!(
    stopped_readers,
    warm_readers_that_stop,
    many_stopped_readers,
    far_away,
    an_echo_that_is_not_read
);

const MIB: u64 = 1 << 20;
/// The most that a connection may take from a sender whose reader has stopped, in
/// the relay and in the relay's own sockets.
const MOST: u64 = 16 * MIB;
/// What the reader's and the sender's own sockets hold is limited to this, which the
/// kernel doubles for its own needs.
const OWN: usize = 128 << 10;

/// Sends until nothing has been taken for a while.
fn send_until_stopped(stream: &mut Stream, to: &TcpStream) {
    assert!(sends_until_stopped(stream, to, 20 * MOST), "nothing stops the sender");
}

/// Sends until nothing has been taken for a while, or `most` bytes were: then false.
fn sends_until_stopped(stream: &mut Stream, mut to: &TcpStream, most: u64) -> bool {
    to.set_nonblocking(true).unwrap();
    let (begun, mut last) = (stream.count, Instant::now());
    while last.elapsed() < Duration::from_millis(500) && stream.count - begun < most {
        let chunk = stream.peek(64 << 10);
        match to.write(chunk) {
            Ok(count) => {
                stream.next(count);
                last = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
    }
    to.set_nonblocking(false).unwrap();
    stream.count - begun < most
}

/// Lets `fast` bytes through, stops reading, and goes on in the end; both ways.
fn stop_and_go(path: Path, family: Family, fast: u64) {
    let world = World::new(path, family);
    for by_client in [true, false] {
        let (client, server) = world.connect();
        let address = client.local_addr().unwrap();
        let (sender, reader) = if by_client { (&client, &server) } else { (&server, &client) };
        SockRef::from(sender).set_send_buffer_size(OWN).unwrap();
        SockRef::from(reader).set_recv_buffer_size(OWN).unwrap();
        let (mut sent, mut got) = (Stream::new(1), Stream::new(1));
        thread::scope(|scope| {
            scope.spawn(|| got.receive(reader, fast));
            sent.send(sender, fast).unwrap();
        });
        for _ in 0..if fast == 0 { 2 } else { 1 } {
            send_until_stopped(&mut sent, sender);
            let held = sent.count - got.count;
            assert!(held <= MOST, "{held} bytes were taken though nobody reads");
            // A little is read, then nothing again.
            got.receive(reader, MIB.min(held));
        }
        sender.shutdown(Shutdown::Write).unwrap();
        let rest = sent.count - got.count;
        got.receive(reader, rest);
        expect_end(reader);
        let (there, back) = if by_client { (sent.count, 0) } else { (0, sent.count) };
        drop((client, server));
        world.closed(address, there, back);
    }
}

fn stopped_readers(path: Path, family: Family) {
    stop_and_go(path, family, 0);
}

/// The buffers have grown with the speed before.
fn warm_readers_that_stop(path: Path, family: Family) {
    stop_and_go(path, family, 64 * MIB);
}

/// Many connections that are stopped for seconds at once, with others in between
/// that are not.
fn many_stopped_readers(path: Path, family: Family) {
    const EACH: u64 = 20 * MIB;
    let world = World::new(path, family);
    thread::scope(|scope| {
        for number in 0..12 {
            let (client, server) = world.connect();
            scope.spawn(move || {
                Stream::new(number).send(&client, EACH).unwrap();
                drop(client);
            });
            scope.spawn(move || {
                let mut got = Stream::new(number);
                if number % 3 > 0 {
                    thread::sleep(Duration::from_secs(2));
                    got.receive(&server, 3 * MIB);
                    thread::sleep(Duration::from_millis(100 * number));
                }
                assert_eq!(got.receive_all(&server).unwrap(), EACH);
            });
        }
    });
}

/// A client at the end of a long wire: acknowledgements come late, so much is on its way at
/// any time. Exchanges, bulk each way, then a reader that stops.
fn far_away(path: Path, family: Family) {
    let (hosts, _wire) = Hosts::far(Duration::from_millis(20));
    let world = World::on(hosts, path, family, &[]);
    let (client, server) = world.connect();
    let address = client.local_addr().unwrap();
    let (mut there, mut back) = (Stream::new(3), Stream::new(4));
    for size in [[64; 12].as_slice(), &[4 * MIB, 64, 64, 64]].concat() {
        exchange(&client, &server, &mut there, &mut back, size);
    }
    SockRef::from(&client).set_recv_buffer_size(OWN).unwrap();
    let before = back.count;
    let mut got = back.clone();
    send_until_stopped(&mut back, &server);
    let held = back.count - before;
    // The kernel lets sockets grow with what a long wire has on its way.
    assert!(held <= 2 * MOST, "{held} bytes were taken though nobody reads");
    server.shutdown(Shutdown::Write).unwrap();
    got.receive(&client, held);
    expect_end(&client);
    drop((client, server));
    world.closed(address, there.count, back.count);
}

/// An echo server that cannot send reads no more, so both directions stop; the way back
/// has to go on before the way there can. Again and again, with few bytes in between and
/// with many.
fn an_echo_that_is_not_read(path: Path, family: Family) {
    let world = World::new(path, family);
    let (mut client, mut server) = world.connect();
    let address = client.local_addr().unwrap();
    for socket in [&client, &server] {
        SockRef::from(socket).set_send_buffer_size(OWN).unwrap();
        SockRef::from(socket).set_recv_buffer_size(OWN).unwrap();
    }
    let echo = thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        while let count @ 1.. = server.read(&mut buffer).unwrap() {
            server.write_all(&buffer[..count]).unwrap();
        }
    });
    let (mut sent, mut got) = (Stream::new(7), Stream::new(7));
    for round in 0..8 {
        // Single exchanges are what the kernel carries; after many the buffers are wide.
        for _ in 0..20 * round {
            let chunk = sent.next(1000);
            client.write_all(chunk).unwrap();
            got.receive(&client, chunk.len() as u64);
        }
        // Both directions hold what one may, and on the kernel path what is on its way
        // when the relay finds that TCP does not stop the sender.
        let most = if matches!(path, Path::Kernel | Path::Auto) { 4 * MOST } else { 2 * MOST };
        assert!(sends_until_stopped(&mut sent, &client, most), "nothing stops the sender");
        let held = sent.count - got.count;
        println!("{} MiB were taken", held >> 20);
        got.receive(&client, held);
    }
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    echo.join().unwrap();
    let all = sent.count;
    drop(client);
    world.closed(address, all, all);
}
