//! What a relay spends, and how it ends: itself and the connections on it.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use nix::sys::signal::Signal;

use super::{Path, World, line_of, on_every_path, on_every_path_waiting, to};
use crate::kit::{Family, Hosts, Stream, connect, exchange, expect_end, expect_reset, many_descriptors};

on_every_path!(thousands_idle);
on_every_path_waiting!(stop_with_grace, idle_timeout, connect_timeout);

/// Connections that do nothing cost the relay little memory of its own.
fn thousands_idle(path: Path, family: Family) {
    let many = if family == Family::V4 && matches!(path, Path::Kernel | Path::Splice) { 5000 } else { 1000 };
    let _descriptors = many_descriptors();
    let world = World::new(path, family);
    let open = || {
        let (client, mut server) = world.connect();
        (&client).write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        (client, server)
    };
    // What is needed once, for whatever connections there are.
    drop((0..64).map(|_| open()).collect::<Vec<_>>());
    let before = world.relay.memory();
    let all: Vec<_> = (0..many).map(|_| open()).collect();
    let each = world.relay.memory().saturating_sub(before) / many;
    println!("{path:?}: {each} bytes for an idle connection");
    let most = match path {
        Path::Kernel | Path::Splice => 4 << 10,
        // Not promised, but nothing speaks for more.
        Path::Copy | Path::Auto => 4 << 10,
    };
    assert!(each <= most, "an idle connection takes {each} bytes");
    // All of them work.
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    for (client, server) in &all {
        exchange(client, server, &mut there, &mut back, 100);
    }
    let address = all[0].0.local_addr().unwrap();
    drop(all);
    world.closed(address, 101, 100);
}

/// A relay that is told to stop accepts nothing, lets connections finish, and ends
/// those that do not.
fn stop_with_grace(path: Path, family: Family) {
    let mut world = World::with(path, family, &["--grace", "2s"]);
    let [(a, of_a), (b, of_b)] = [world.connect(), world.connect()];
    let [a_address, b_address] = [&a, &b].map(|stream| stream.local_addr().unwrap());
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    exchange(&a, &of_a, &mut there, &mut back, 100);
    world.relay.signal(if family == Family::V4 { Signal::SIGTERM } else { Signal::SIGINT });
    world.relay.line(" stopping ");
    assert!(connect(&world.hosts.client, world.listen).is_err(), "a stopping relay accepts nobody");
    exchange(&a, &of_a, &mut there, &mut back, 100_000);
    drop(a);
    expect_end(&of_a);
    drop(of_a);
    world.closed(a_address, 100_100, 100_100);
    // The other one does not finish.
    assert!(world.relay.wait().success());
    assert_eq!(line_of(&world.relay, b_address)["end"], "stopped");
    expect_end(&b);
    expect_end(&of_b);
}

/// Ends what is idle, and not what moves bytes one way only.
fn idle_timeout(path: Path, family: Family) {
    let world = World::with(path, family, &["--idle-timeout", "2s"]);
    let [(idle, of_idle), (busy, of_busy)] = [world.connect(), world.connect()];
    let [idle_address, busy_address] = [&idle, &busy].map(|stream| stream.local_addr().unwrap());
    (&idle).write_all(b"x").unwrap();
    (&of_idle).read_exact(&mut [0]).unwrap();
    let (mut sent, mut seen) = (Stream::new(1), Stream::new(1));
    for _ in 0..40 {
        sent.send(&busy, 10).unwrap();
        seen.receive(&of_busy, 10);
        std::thread::sleep(Duration::from_millis(100));
    }
    let line = line_of(&world.relay, idle_address);
    assert_eq!([&line["end"], &line["sent"]], ["idle", "1"], "{line:?}");
    expect_end(&idle);
    expect_end(&of_idle);
    drop((busy, of_busy));
    world.closed(busy_address, 400, 0);
}

/// A target that never answers.
fn connect_timeout(path: Path, family: Family) {
    let hosts = Hosts::new();
    let stuck = hosts.listen_stuck(family);
    let (relay, listen) = to(&hosts, path, family, stuck.address(), &["--connect-timeout", "500ms"]);
    let client = connect(&hosts.client, listen).unwrap();
    (&client).write_all(b"x").unwrap();
    expect_reset(&client);
    let line = line_of(&relay, client.local_addr().unwrap());
    assert_eq!(line["end"], "cannot connect: timed out", "{line:?}");
    refused(&hosts, path, family);
}

/// A target where nobody listens.
fn refused(hosts: &Hosts, path: Path, family: Family) {
    let nobody = SocketAddr::new(Hosts::server_address(family), 1);
    let (relay, listen) = to(hosts, path, family, nobody, &[]);
    match connect(&hosts.client, listen) {
        Ok(client) => expect_reset(&client),
        // It came at once.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    relay.line("cannot connect: Connection refused");
}
