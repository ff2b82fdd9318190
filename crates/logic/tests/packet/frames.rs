//! Frames of every shape that the library reads, as a proptest strategy.

use proptest::{collection::vec, prelude::*};

/// A frame, whole and with right checksums unless a mutation follows.
pub fn frame() -> impl Strategy<Value = Vec<u8>> {
    (tags(), any::<bool>(), transport(), vec(any::<u8>(), 0..60)).prop_flat_map(
        |(tags, six, transport, payload)| {
            let body = transport.bytes(&payload);
            if six { v6(tags, &transport, body).boxed() } else { v4(tags, &transport, body).boxed() }
        },
    )
}

/// A frame with some bytes changed, cut or appended.
pub fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (frame(), changes, any::<prop::sample::Index>(), 0..4usize, vec(any::<u8>(), 0..20)).prop_map(
        |(mut frame, changes, cut, kind, padding)| {
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            match kind {
                0 => frame.truncate(cut.index(frame.len() + 1)),
                1 => frame.extend(padding),
                _ => {}
            }
            frame
        },
    )
}

#[derive(Debug, Clone)]
pub enum Transport {
    Udp { checksum: bool },
    Tcp { options: usize },
    Icmp { kind: u8 },
    Other(u8),
}

impl Transport {
    fn protocol(&self, six: bool) -> u8 {
        match self {
            Self::Udp { .. } => 17,
            Self::Tcp { .. } => 6,
            Self::Icmp { .. } if six => 58,
            Self::Icmp { .. } => 1,
            Self::Other(protocol) => *protocol,
        }
    }

    /// Header and payload; a checksum of 1 asks for the right one.
    fn bytes(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0xc0, 0x01, 0x00, 0x35];
        match self {
            Self::Udp { checksum } => {
                bytes.extend(u16::try_from(payload.len() + 8).unwrap().to_be_bytes());
                bytes.extend(u16::from(*checksum).to_be_bytes());
            }
            Self::Tcp { options } => {
                bytes.extend([1, 2, 3, 4, 5, 6, 7, 8, ((5 + options) as u8) << 4, 0x18, 0x20, 0, 0, 1, 0, 0]);
                bytes.extend(vec![1; options * 4]);
            }
            Self::Icmp { kind } => bytes = vec![*kind, 0, 0, 1, 0, 0, 0, 0],
            Self::Other(_) => {}
        }
        bytes.extend(payload);
        bytes
    }
}

fn tags() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec![0x81, 0x00, 0x20, 0x05]),
        1 => Just(vec![0x88, 0xa8, 0x00, 0x07, 0x81, 0x00, 0x20, 0x05]),
    ]
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![
        4 => any::<bool>().prop_map(|checksum| Transport::Udp { checksum }),
        2 => (0..=10usize).prop_map(|options| Transport::Tcp { options }),
        2 => any::<u8>().prop_map(|kind| Transport::Icmp { kind }),
        1 => any::<u8>().prop_map(Transport::Other),
    ]
}

fn v4(tags: Vec<u8>, transport: &Transport, body: Vec<u8>) -> impl Strategy<Value = Vec<u8>> + use<> {
    let protocol = transport.protocol(false);
    let fragment = prop_oneof![6 => Just(0u16), 3 => Just(0x4000), 1 => Just(0x2000), 1 => 1..0x1fffu16];
    (0..=10usize, fragment, any::<u16>()).prop_map(move |(options, fragment, id)| {
        let mut frame = ethernet(&tags, 0x0800);
        let at = frame.len();
        frame.extend([0x40 | (5 + options) as u8, 0]);
        frame.extend(((20 + options * 4 + body.len()) as u16).to_be_bytes());
        frame.extend(id.to_be_bytes());
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
        frame.extend(vec![1; options * 4]);
        let header = frame[at..].to_vec();
        let sum = !ones(&header, 0);
        frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
        let payload = frame.len();
        frame.extend(&body);
        complete(&mut frame, at + 12..at + 20, payload, protocol);
        frame
    })
}

fn v6(tags: Vec<u8>, transport: &Transport, body: Vec<u8>) -> impl Strategy<Value = Vec<u8>> + use<> {
    let protocol = transport.protocol(true);
    // Any order, as a sender who means harm would.
    let extension = (prop_oneof![Just(0u8), Just(43), Just(60), Just(44), Just(51)], 0..3u8, 0..6u16);
    (vec(extension, 0..5), any::<bool>()).prop_map(move |(extensions, no_extensions)| {
        let extensions = if no_extensions { vec![] } else { extensions };
        let mut headers = vec![];
        for (i, (kind, length, fragment)) in extensions.iter().enumerate() {
            let next = extensions.get(i + 1).map_or(protocol, |next| next.0);
            match kind {
                44 => {
                    // Mostly atomic ones; else first or later.
                    let field = match fragment {
                        0 => 1u16,
                        1 => 8,
                        _ => 0,
                    };
                    headers.extend([next, 0]);
                    headers.extend(field.to_be_bytes());
                    headers.extend([0, 0, 0, 9]);
                }
                51 => {
                    headers.extend([next, length + 1]);
                    headers.extend(vec![0; (usize::from(*length) + 3) * 4 - 2]);
                }
                _ => {
                    headers.extend([next, *length]);
                    headers.extend(vec![0; (usize::from(*length) + 1) * 8 - 2]);
                }
            }
        }
        let mut frame = ethernet(&tags, 0x86dd);
        let at = frame.len();
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(((headers.len() + body.len()) as u16).to_be_bytes());
        frame.extend([extensions.first().map_or(protocol, |first| first.0), 64]);
        frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        frame.extend(headers);
        let payload = frame.len();
        frame.extend(&body);
        complete(&mut frame, at + 8..at + 40, payload, protocol);
        frame
    })
}

fn ethernet(tags: &[u8], ether_type: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(tags);
    frame.extend(ether_type.to_be_bytes());
    frame
}

/// Puts the right checksum where a 1 asks for it.
fn complete(frame: &mut [u8], addresses: std::ops::Range<usize>, payload: usize, protocol: u8) {
    let field = match protocol {
        17 => 6,
        6 => 16,
        1 | 58 => 2,
        _ => return,
    };
    if frame.len() < payload + field + 2 || frame[payload + field..payload + field + 2] != [0, 1] {
        return;
    }
    frame[payload + field + 1] = 0;
    let length = (frame.len() - payload) as u16;
    let pseudo = match protocol {
        1 => 0,
        _ => ones(&frame[addresses], ones(&length.to_be_bytes(), u16::from(protocol))),
    };
    let sum = match !ones(&frame[payload..], pseudo) {
        0 if protocol == 17 => 0xffff,
        sum => sum,
    };
    frame[payload + field..payload + field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// A ones' complement sum, the slow and obvious way.
fn ones(bytes: &[u8], start: u16) -> u16 {
    let mut sum = u64::from(start);
    for word in bytes.chunks(2) {
        sum += u64::from(word[0]) * 256 + u64::from(word.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
