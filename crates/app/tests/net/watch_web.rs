//! The page of `watch --web` in a real browser (ui/test/page.mjs), in network namespaces:
//! the world is another host, at addresses that a database made here has places for.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use underpass::lab::Namespace;

/// In the database, and beside it.
const LOCATED: Ipv4Addr = Ipv4Addr::new(81, 2, 69, 142);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

#[test]
fn the_page_shows_real_traffic() {
    let (host, world) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    host.join("eth0", &world, "eth0").unwrap();
    for (here, there) in [([81, 2, 69, 1], LOCATED), ([10, 77, 0, 2], PRIVATE)] {
        host.address("eth0", IpAddr::from(here), 24).unwrap();
        world.address("eth0", IpAddr::from(there), 24).unwrap();
    }
    let listener = world.enter(|| TcpListener::bind("0.0.0.0:80")).unwrap();
    thread::spawn(move || {
        listener.incoming().flatten().for_each(|client| drop(thread::spawn(|| serve(client))))
    });
    let resolver = world.enter(|| UdpSocket::bind("0.0.0.0:53")).unwrap();
    thread::spawn(move || resolve(&resolver));

    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("test.mmdb");
    std::fs::write(&database, city_database()).unwrap();
    let ui = Path::new(env!("CARGO_MANIFEST_DIR")).join("ui");
    let mut node = Command::new("node");
    node.arg(ui.join("test/page.mjs"))
        .env("UNDERPASS", env!("CARGO_BIN_EXE_underpass"))
        .env("LOCATED", LOCATED.to_string())
        .env("PRIVATE", PRIVATE.to_string())
        .env("GEO", database)
        .env("TMPDIR", folder.path())
        .stdout(Stdio::piped());
    let mut node = host.spawn(&mut node).unwrap();
    for line in BufReader::new(node.stdout.take().unwrap()).lines() {
        println!("{}", line.unwrap());
    }
    assert!(node.wait().unwrap().success(), "see above");
}

/// A server of HTTP/1.0: `/bytes` is 100,000 of them, anything else drips until nobody reads.
fn serve(client: TcpStream) {
    let mut request = String::new();
    let mut lines = BufReader::new(&client);
    lines.read_line(&mut request).unwrap();
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|read| read > 2) {
        line.clear();
    }
    let head = "HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n";
    let mut sent = (&client).write_all(head.as_bytes());
    if request.starts_with("GET /bytes ") {
        // With the head as much as the test expects to be shown: 97.7 KiB.
        sent = sent.and_then(|()| (&client).write_all(&[b'x'; 100_000]));
        sent.unwrap();
        return;
    }
    while sent.is_ok() {
        sent = (&client).write_all(&[b'x'; 2000]);
        thread::sleep(Duration::from_millis(100));
    }
}

/// Answers every question for an address with [`LOCATED`] (RFC 1035).
fn resolve(socket: &UdpSocket) {
    let mut packet = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut packet) {
        let question = &packet[..length];
        // The question's end: names end with an empty label, type and class follow.
        let name = question[12..].iter().position(|byte| *byte == 0).unwrap();
        let mut answer = question[..12 + name + 5].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(LOCATED.octets());
        socket.send_to(&answer, from).unwrap();
    }
}

/// A database of the MaxMind format (version 2.0) in which 81.2.69.0/24 is in London.
fn city_database() -> Vec<u8> {
    const BITS: u32 = 24;
    let prefix = LOCATED.to_bits() >> (32 - BITS);
    let record = map(&[
        ("country", map(&[("iso_code", text("GB"))])),
        ("city", map(&[("names", map(&[("en", text("London"))]))])),
        ("location", map(&[("latitude", double(51.51)), ("longitude", double(-0.09))])),
        ("autonomous_system_number", number(20712)),
        ("autonomous_system_organization", text("Andrews & Arnold Ltd")),
    ]);
    let mut database = vec![];
    for depth in 0..BITS {
        let bit = prefix >> (BITS - 1 - depth) & 1;
        // Behind the last bit is the first of the data, 16 bytes after the tree.
        let next = if depth + 1 == BITS { BITS + 16 } else { depth + 1 };
        let nowhere = BITS;
        for side in [0, 1] {
            database.extend(if side == bit { next } else { nowhere }.to_be_bytes());
        }
    }
    database.extend([0; 16]);
    database.extend(record);
    database.extend(b"\xab\xcd\xefMaxMind.com");
    database.extend(map(&[
        ("binary_format_major_version", number(2)),
        ("binary_format_minor_version", number(0)),
        ("build_epoch", number(1_700_000_000)),
        ("database_type", text("Test-City")),
        ("description", map(&[("en", text("made by a test"))])),
        ("ip_version", number(4)),
        ("languages", vec![0b0000_0000, 4]),
        ("node_count", number(BITS)),
        ("record_size", number(32)),
    ]));
    database
}

/// From 29 bytes on the rest of the length follows.
fn text(text: &str) -> Vec<u8> {
    let head = match text.len() as u8 {
        length @ 0..29 => vec![0b0100_0000 | length],
        length => vec![0b0101_1101, length - 29],
    };
    [&head, text.as_bytes()].concat()
}

fn number(number: u32) -> Vec<u8> {
    [&[0b1100_0100][..], &number.to_be_bytes()].concat()
}

fn double(number: f64) -> Vec<u8> {
    [&[0b0110_1000][..], &number.to_be_bytes()].concat()
}

fn map(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pairs_of = pairs.iter().flat_map(|(key, value)| [text(key), value.clone()]);
    [vec![0b1110_0000 | pairs.len() as u8], pairs_of.collect::<Vec<_>>().concat()].concat()
}
