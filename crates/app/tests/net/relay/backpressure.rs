//! A reader that stops has to stop its sender, within a bounded number of bytes, and
//! loses nothing when it goes on.

use std::{
    io::{ErrorKind, Write as _},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{Path, World, on_every_path_waiting};
use crate::kit::{Family, Stream, expect_end};

on_every_path_waiting!(stopped_readers, warm_readers_that_stop, many_stopped_readers);

const MIB: u64 = 1 << 20;
/// The most that a connection may take from a sender whose reader has stopped, in
/// the relay and in the relay's own sockets.
const MOST: u64 = 16 * MIB;
/// What the reader's and the sender's own sockets hold is limited to this, which the
/// kernel doubles for its own needs.
const OWN: usize = 128 << 10;

/// Sends until nothing has been taken for a while.
fn send_until_stopped(stream: &mut Stream, mut to: &TcpStream) {
    to.set_nonblocking(true).unwrap();
    let (begun, mut last) = (stream.count, Instant::now());
    while last.elapsed() < Duration::from_millis(500) {
        assert!(stream.count - begun < 20 * MOST, "nothing stops the sender");
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
