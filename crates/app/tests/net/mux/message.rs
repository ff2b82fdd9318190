//! TCP by message: whole, in order, bounded.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use underpass::lab::Namespace;

use super::{host, listen};
use crate::kit::{accept, connect, eventually, expect_end, expect_reset, fields};

/// A message with its length in front (16 bits, itself included), then a tag, a
/// number and filling.
fn message(tag: &str, number: u32, filling: usize) -> Vec<u8> {
    assert_eq!(tag.len(), 3);
    let length = 2 + 3 + 4 + filling;
    let mut message = (length as u16).to_be_bytes().to_vec();
    message.extend(tag.as_bytes());
    message.extend(number.to_be_bytes());
    message.extend((0..filling).map(|i| (i as u32 ^ number) as u8));
    message
}

/// The next message of a stream: its tag and its number. None at the end.
fn next(mut from: impl io::Read) -> Option<(String, u32)> {
    let mut length = [0; 2];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
        result => result.unwrap(),
    }
    let mut rest = vec![0; usize::from(u16::from_be_bytes(length)) - 2];
    from.read_exact(&mut rest).unwrap();
    let number = u32::from_be_bytes(rest[3..7].try_into().unwrap());
    assert!(
        rest[7..].iter().enumerate().all(|(i, byte)| *byte == (i as u32 ^ number) as u8),
        "a message is mixed up"
    );
    Some((String::from_utf8(rest[..3].to_vec()).unwrap(), number))
}

fn listener(host: &Namespace) -> (TcpListener, String) {
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

const TAGS: [&str; 3] = ["600", "601", "602"];

/// Three backends and the multiplexer before them.
fn backends(host: &Namespace, more: &[&str]) -> (crate::kit::Daemon, std::net::SocketAddr, [TcpListener; 3]) {
    let listeners = TAGS.map(|_| listener(host));
    let routes: Vec<String> = TAGS
        .iter()
        .zip(&listeners)
        .flat_map(|(tag, (_, at))| ["--route".into(), format!("@2:{tag}={at}")])
        .collect();
    let mut arguments = vec!["--per", "message", "--frame", "u16be@0"];
    arguments.extend(routes.iter().map(String::as_str));
    arguments.extend(more);
    let (mux, to) = listen(host, &arguments);
    (mux, to, listeners.map(|(listener, _)| listener))
}

#[test]
fn messages_arrive_whole_and_in_order_and_so_do_replies() {
    const COUNT: u32 = 30_000;
    let host = host();
    let (mux, to, listeners) = backends(&host, &[]);
    // Each backend sends back what it gets, and finishes when its client has.
    let echoes = listeners.map(|listener| {
        thread::spawn(move || {
            let mut stream = accept(&listener);
            let mut reader = io::BufReader::new(stream.try_clone().unwrap());
            let (mut count, mut buffer) = (0_u64, vec![0; 7000]);
            loop {
                match reader.read(&mut buffer).unwrap() {
                    0 => return count,
                    read => {
                        stream.write_all(&buffer[..read]).unwrap();
                        count += read as u64;
                    }
                }
            }
        })
    });
    let stream = connect(&host, to).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(7);
        let mut pending = vec![];
        for number in 0..COUNT {
            let filling = if number % 500 == 0 { 65_000 } else { random.usize(..600) };
            pending.extend(message(random.choice(TAGS).unwrap(), number, filling));
            if random.u8(..9) == 0 {
                let cut = random.usize(..=pending.len());
                writer.write_all(&pending[..cut]).unwrap();
                pending.drain(..cut);
            }
        }
        writer.write_all(&pending).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = TAGS.map(|_| vec![]);
    let mut reader = io::BufReader::new(&stream);
    while let Some((tag, number)) = next(&mut reader) {
        got[TAGS.iter().position(|known| *known == tag).unwrap()].push(number);
    }
    sender.join().unwrap();
    let total: usize = got.iter().map(Vec::len).sum();
    assert_eq!(total, COUNT as usize);
    for (tag, got) in TAGS.iter().zip(&got) {
        assert!(got.is_sorted(), "{tag} is out of order");
        assert!(got.len() > 9000, "{tag} got {}", got.len());
    }
    let bytes: u64 = echoes.into_iter().map(|echo| echo.join().unwrap()).sum();
    let line = mux.line("duration");
    assert!(
        line.contains(&format!("messages: {COUNT}, bytes: {bytes}, replies: {COUNT}, reply bytes: {bytes}")),
        "{line}"
    );
}

#[test]
fn a_stopped_backend_stops_the_client_and_grows_no_memory() {
    let host = host();
    let (mux, to, [stopped, running, _]) = backends(&host, &["--when-full", "wait"]);
    let stream = connect(&host, to).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    (&stream).write_all(&message("600", 0, 9)).unwrap();
    let stopped = accept(&stopped);
    let before = mux.memory();
    let (mut sent, mut partial) = (1_u32, vec![]);
    loop {
        let mut next = message("600", sent, 1000);
        match (&stream).write(&next) {
            Ok(written) if written == next.len() => sent += 1,
            Ok(written) => {
                partial = next.split_off(written);
                sent += 1;
                break;
            }
            Err(_) => break,
        }
        assert!(sent < 200_000, "200 MB were taken for a backend that reads nothing");
    }
    assert!(mux.memory() < before + (4 << 20), "memory grew for a stopped backend");
    // It reads again: everything comes, and the other backends' messages as well.
    let mut writer = stream.try_clone().unwrap();
    writer.set_write_timeout(None).unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(&partial).unwrap();
        writer.write_all(&message("601", 0, 9)).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = io::BufReader::new(&stopped);
    for number in 0..sent {
        assert_eq!(next(&mut reader), Some(("600".into(), number)));
    }
    assert_eq!(next(&mut reader), None);
    assert_eq!(next(accept(&running)), Some(("601".into(), 0)));
    sender.join().unwrap();
}

#[test]
fn with_drop_a_stopped_backend_loses_messages_and_holds_nobody_up() {
    const COUNT: u32 = 30_000;
    let host = host();
    let (mux, to, [stopped, running, _]) = backends(&host, &["--when-full", "drop"]);
    let stream = connect(&host, to).unwrap();
    let before = mux.memory();
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        for number in 0..COUNT {
            let both = [message("600", number, 1000), message("601", number, 100)].concat();
            writer.write_all(&both).unwrap();
        }
    });
    let stopped = accept(&stopped);
    let mut running = io::BufReader::new(accept(&running));
    let mut count = 0;
    let mut last = None;
    // The running backend keeps up most of the time, so it gets about everything; what
    // matters is that it goes on although the other does not.
    while last != Some(COUNT - 1) {
        let (tag, number) = next(&mut running).unwrap();
        assert_eq!(tag, "601");
        assert!(last < Some(number), "out of order");
        last = Some(number);
        count += 1;
    }
    assert!(count > COUNT / 2, "the running backend got {count} of {COUNT}");
    sender.join().unwrap();
    assert!(mux.memory() < before + (8 << 20), "memory grew for a stopped backend");
    stream.shutdown(Shutdown::Write).unwrap();
    let mut reader = io::BufReader::new(&stopped);
    let (mut got, mut last) = (0_u32, None);
    while let Some((_, number)) = next(&mut reader) {
        assert!(last < Some(number), "out of order");
        last = Some(number);
        got += 1;
    }
    assert!(got < COUNT, "30 MB went to a backend that read nothing");
    drop(reader);
    drop((stream, stopped, running));
    let line = mux.line("duration");
    assert!(line.contains(&format!("backend full: {}", 2 * COUNT - got - count)), "{line}");
}

#[test]
fn messages_that_are_not_valid_are_skipped_and_counted_or_end_the_connection() {
    let host = host();
    let wrong = [message("600", 1, 10), message("999", 2, 9), message("600", 3, 300)];
    let (mux, to, listeners) = backends(&host, &["--length", "18..=200"]);
    let mut stream = connect(&host, to).unwrap();
    for message in &wrong[..2] {
        stream.write_all(message).unwrap();
    }
    stream.write_all(&message("600", 4, 9)).unwrap();
    // One that is too long comes in pieces.
    stream.write_all(&wrong[2][..100]).unwrap();
    thread::sleep(Duration::from_millis(50));
    stream.write_all(&wrong[2][100..]).unwrap();
    stream.write_all(&message("600", 5, 9)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut reader = accept(&listeners[0]);
    let numbers: Vec<u32> = std::iter::from_fn(|| next(&mut reader)).map(|(_, number)| number).collect();
    assert_eq!(numbers, [1, 4, 5]);
    drop(reader);
    let line = mux.line("duration");
    assert!(line.contains("wrong length: 1") && line.contains("no route: 1"), "{line}");
    assert_eq!(fields(&line)["end"], "closed");

    for wrong in &wrong[1..] {
        let (mux, to, listeners) = backends(&host, &["--length", "18..=200", "--invalid", "close"]);
        let mut stream = connect(&host, to).unwrap();
        stream.write_all(&message("600", 4, 9)).unwrap();
        assert_eq!(next(accept(&listeners[0])), Some(("600".into(), 4)));
        stream.write_all(wrong).unwrap();
        let _ = stream.read(&mut [0]);
        mux.line("a message");
    }
}

#[test]
fn hostile_lengths_take_no_memory_and_hold_nobody_up() {
    let host = host();
    let (_, at) = listener(&host);
    let route = format!("@4:a={at}");
    let (mux, to) = listen(&host, &["--per", "message", "--frame", "u32be@0", "--route", &route]);
    let before = mux.memory();
    let mut huge = connect(&host, to).unwrap();
    huge.write_all(&[0xff; 4]).unwrap();
    for _ in 0..64 {
        huge.write_all(&vec![0; 1 << 20]).unwrap();
    }
    eventually("64 MiB of a message of 4 GiB are skipped", || mux.memory() < before + (4 << 20));
    // A length that does not even cover itself: nothing can follow.
    let mut small = connect(&host, to).unwrap();
    small.write_all(&[0, 0, 0, 3]).unwrap();
    expect_end(&small);
    let line = mux.line("cannot be");
    assert!(line.contains("says that it has 3 bytes"), "{line}");
    drop(huge);
    assert!(mux.line("cut off: 1").contains("wrong length: 1"));
}

#[test]
fn a_backend_that_is_not_there_ends_the_connection_or_loses_its_messages() {
    let host = host();
    let (running, at) = listener(&host);
    let routes = ["--route", "@2:600=127.0.0.1:1", "--route", &format!("@2:601={at}")];
    let base = ["--per", "message", "--frame", "u16be@0"];
    let (_mux, to) = listen(&host, &[&base[..], &routes].concat());
    let mut stream = connect(&host, to).unwrap();
    stream.write_all(&message("600", 1, 9)).unwrap();
    expect_reset(&stream);

    let (mux, to) = listen(&host, &[&base[..], &routes, &["--when-full", "drop"]].concat());
    let mut stream = connect(&host, to).unwrap();
    stream.write_all(&[message("600", 1, 9), message("601", 2, 9)].concat()).unwrap();
    let backend = accept(&running);
    assert_eq!(next(&backend), Some(("601".into(), 2)));
    stream.shutdown(Shutdown::Write).unwrap();
    expect_end(&backend);
    drop(backend);
    assert!(mux.line("duration").contains("unreachable: 1"));
}

#[test]
fn a_backend_that_dies_resets_the_client() {
    let host = host();
    let (_mux, to, [listener, ..]) = backends(&host, &[]);
    let mut stream = connect(&host, to).unwrap();
    stream.write_all(&message("600", 1, 9)).unwrap();
    let backend = accept(&listener);
    next(&backend);
    crate::kit::reset(backend);
    expect_reset(&stream);
}

#[test]
fn a_client_that_dies_resets_its_backends() {
    let host = host();
    let (_mux, to, [listener, ..]) = backends(&host, &[]);
    let mut stream: TcpStream = connect(&host, to).unwrap();
    stream.write_all(&message("600", 1, 9)).unwrap();
    let backend = accept(&listener);
    next(&backend);
    crate::kit::reset(stream);
    expect_reset(&backend);
}
