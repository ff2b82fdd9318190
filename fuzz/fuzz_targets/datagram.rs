//! Datagrams of mux: what is decided in a packet is what the rules say of its
//! payload, and the way back finds the flow of the way in.
#![no_main]

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use underpass_abi::mux::{FALLBACK_DROP, FALLBACK_PASS, counter};
use underpass_logic::{
    mux::{
        datagram::{Arrival, arrival, flow_in, flow_out},
        table::{EMPTY, Route, build},
    },
    packet::udp::Datagram,
};

#[derive(Debug, Arbitrary)]
struct Input {
    routes: Vec<(u8, [u8; 2], u16)>,
    min: u8,
    max: u8,
    fallback: Option<Option<u16>>,
    segment: u8,
    six: bool,
    tagged: bool,
    payload: Vec<u8>,
}

const PORT: u16 = 5000;

fuzz_target!(|input: Input| {
    let list = input.routes.iter().enumerate().map(|(index, (offset, tag, port))| Route {
        offset: u16::from(*offset),
        tag,
        port: *port,
        counter: index as u16,
    });
    let mut table = Box::new(EMPTY);
    if build(&mut table, list).is_err() {
        return;
    }
    table.port = PORT;
    (table.min_length, table.max_length) = (input.min.into(), input.max.into());
    table.fallback = match input.fallback {
        None => FALLBACK_DROP,
        Some(None) => FALLBACK_PASS,
        Some(Some(port)) => port.into(),
    };
    let payload = &input.payload[..input.payload.len().min(1000)];
    let mut packet = frame(&input, payload, (4000, PORT));
    let decided = arrival(&mut packet[..], &table, input.segment.into());
    assert_eq!(said(&decided), expected(&input, payload), "{decided:?}");
    if let Arrival::Goes { datagram, port, .. } = decided {
        let flow = flow_in(&packet[..], &datagram, port).unwrap();
        assert_eq!((flow.client_port, flow.service_port), (4000, port));
        // An answer to it, from where it went.
        let mut back = frame(&input, payload, (port, 4000));
        swap_addresses(&mut back, &input);
        let datagram = Datagram::parse(&back[..]).unwrap();
        assert_eq!(flow_out(&back[..], &datagram).unwrap(), flow);
    }
});

#[derive(Debug, PartialEq, Eq)]
enum Said {
    Goes(u16),
    Passes,
    Dropped(u32),
}

fn said(decided: &Arrival) -> Option<Said> {
    match *decided {
        Arrival::NotOurs => None,
        Arrival::Goes { port, .. } => Some(Said::Goes(port)),
        Arrival::Passes => Some(Said::Passes),
        Arrival::Dropped { counter } => Some(Said::Dropped(counter)),
    }
}

/// The rules, as docs/mux.md has them.
fn expected(input: &Input, payload: &[u8]) -> Option<Said> {
    let segment = usize::from(input.segment);
    if segment != 0 && segment < payload.len() {
        return Some(Said::Dropped(counter::SEGMENTED));
    }
    if !(usize::from(input.min)..=usize::from(input.max)).contains(&payload.len()) {
        return Some(Said::Dropped(counter::WRONG_LENGTH));
    }
    let first = input.routes.iter().find(|(offset, tag, _)| {
        let at = usize::from(*offset);
        payload.get(at..at + tag.len()) == Some(tag)
    });
    Some(match (first, input.fallback) {
        (Some((_, _, port)), _) => Said::Goes(*port),
        (None, Some(Some(port))) => Said::Goes(port),
        (None, Some(None)) => Said::Passes,
        (None, None) => Said::Dropped(counter::NO_ROUTE),
    })
}

/// A frame with IPv4 or IPv6 and UDP, without checksums, which nothing here reads.
fn frame(input: &Input, payload: &[u8], (from, to): (u16, u16)) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let mut frame = vec![0; 12];
    if input.tagged {
        frame.extend([0x81, 0, 0, 7]);
    }
    if input.six {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([17, 64]);
        frame.extend([1; 16]);
        frame.extend([2; 16]);
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((length + 20).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
    }
    frame.extend(from.to_be_bytes());
    frame.extend(to.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

fn swap_addresses(frame: &mut [u8], input: &Input) {
    let ip = if input.tagged { 18 } else { 14 };
    let (at, size) = if input.six { (ip + 8, 16) } else { (ip + 12, 4) };
    let (source, destination) = frame[at..at + 2 * size].split_at_mut(size);
    source.swap_with_slice(destination);
}
