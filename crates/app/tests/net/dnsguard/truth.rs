//! No true answer is dropped: a hundred thousand of three servers, all kinds.

use std::{
    net::{SocketAddr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use super::{Lab, Server, address, knot, unbound, wait_for};

const ANSWERS: u64 = 100_000;
/// How many queries are under way at once.
const WINDOW: usize = 64;

#[test]
fn a_hundred_thousand_true_answers_pass() {
    let mut lab = Lab::new();
    let folder = tempfile::tempdir().unwrap();
    let _unbound = unbound(&lab.resolver, folder.path());
    for extra in ["8.8.8.20", "8.8.8.30"] {
        lab.resolver.address("eth0", address(extra), 24).unwrap();
    }
    let other = tempfile::tempdir().unwrap();
    let _knot = knot(&lab.resolver, other.path(), &["8.8.8.20@53"]);
    let mut dnsmasq = Command::new("dnsmasq");
    dnsmasq.args(["--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root"]);
    dnsmasq.args(["--bind-interfaces", "--listen-address=8.8.8.30", "--server=/example.org/127.0.0.1#5300"]);
    dnsmasq.args(["--address=/local.example.org/192.0.2.9", "--cache-size=1000", "--dns-forward-max=1000"]);
    let _dnsmasq = Server::start(&lab.resolver, &mut dnsmasq);
    let servers = ["8.8.8.8", "8.8.8.20", "8.8.8.30"];
    for server in servers {
        wait_for(server, || lab.dig(server, &["end.example.org", "A"]) == "192.0.2.2");
    }

    // 8.8.8.8 is judged by Google's rules, the others as resolvers of one's own.
    lab.guard(&["--resolver", servers[0], servers[1], servers[2]]);
    let mut answered = 0;
    for (nth, server) in servers.iter().enumerate() {
        let share = ANSWERS / 3 + 1;
        answered += lab.client.enter(|| ask(server, share, nth as u64));
    }
    let shown = lab.show();
    println!("{shown:#}");
    let packets = &shown["packets"];
    // One in 65,536 identifications is 0 by chance, which Google's rule takes for a forgery.
    let by_chance = shown["rules"][0]["dropped"].as_u64().unwrap();
    assert!(by_chance <= 5, "{shown}");
    assert_eq!(packets["dropped"].as_u64().unwrap(), by_chance, "{shown}");
    assert!(answered + by_chance >= ANSWERS, "only {answered} answers");
    let judged = packets["judged"].as_u64().unwrap();
    assert!(judged > ANSWERS / 4, "{shown}");
}

/// Asks all kinds of questions and counts the answers; a lost one is asked again.
fn ask(server: &str, count: u64, seed: u64) -> u64 {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
    socket.connect(SocketAddr::new(address(server), 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut answered = 0;
    let mut next = 0;
    let mut pending = std::collections::HashMap::new();
    let mut buffer = [0; 4096];
    let start = Instant::now();
    while answered < count {
        assert!(start.elapsed() < Duration::from_mins(2), "{answered} of {count} answers of {server}");
        while pending.len() < WINDOW && next < count {
            let query = question(next, seed);
            pending.insert(u16::from_be_bytes([query[0], query[1]]), query.clone());
            socket.send(&query).unwrap();
            next += 1;
        }
        match socket.recv(&mut buffer) {
            Ok(length) if length > 12 => {
                if pending.remove(&u16::from_be_bytes([buffer[0], buffer[1]])).is_some() {
                    answered += 1;
                }
            }
            _ => {
                for query in pending.values() {
                    socket.send(query).unwrap();
                }
            }
        }
    }
    answered
}

/// The `nth` query: kinds, names and EDNS in all combinations.
fn question(nth: u64, seed: u64) -> Vec<u8> {
    let number = nth % 500 + seed;
    let (name, kind) = match nth % 11 {
        0 => (format!("a{number}.w.example.org"), 1),
        1 => (format!("b{number}.w.example.org"), 28),
        2 => (format!("c{number}.w.example.org"), 16),
        3 => (format!("d{number}.missing.example.org"), 1),
        4 => (format!("e{number}.only.example.org"), 1),
        5 => (format!("f{number}.chain.example.org"), 1),
        6 => (format!("g{number}.large.example.org"), 16),
        7 => (format!("h{number}.many.example.org"), 1),
        8 => (format!("i{number}.chain.example.org"), 5),
        9 => ("example.org".to_owned(), if nth.is_multiple_of(2) { 6 } else { 48 }),
        _ => ("end.example.org".to_owned(), 1),
    };
    let edns = nth / 11 % 3;
    let mut message = (nth as u16).to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns > 0)]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend((kind as u16).to_be_bytes());
    message.extend([0, 1]);
    if edns > 0 {
        // The last asks for DNSSEC.
        message.extend([0, 0, 41, 4, 208, 0, 0, u8::from(edns == 2) << 7, 0, 0, 0]);
    }
    message
}
