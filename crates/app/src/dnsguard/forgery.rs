//! Forged answers as injectors send them: what the demo, the tests and the benchmarks
//! are attacked with.

use std::net::IpAddr;

use underpass_logic::{
    dns,
    packet::{
        Packet as _, PacketMut as _, Unparsed,
        checksum::{self, compute},
        ip::{Address, Ip, Ipv4, Version},
        rewrite,
        udp::{Datagram, Udp},
    },
};

/// How an injector's packets look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injector {
    /// Who it is.
    pub name: &'static str,
    /// IPv4's identification.
    pub identification: u16,
    /// DF.
    pub dont_fragment: bool,
    /// TTL or hop limit on arrival.
    pub hop_limit: u8,
    /// The flags of the DNS header.
    pub flags: u16,
    /// Whether the answer repeats the name.
    pub full_name: bool,
}

/// The known ones. The first three are told apart by AA and DF in "Triplet Censors"
/// (FOCI 2020), the others by the flags seen in 2025.
pub const INJECTORS: [Injector; 6] = [
    Injector {
        name: "foci-2020-1",
        identification: 0x1234,
        dont_fragment: false,
        hop_limit: 57,
        flags: 0x8580,
        full_name: false,
    },
    Injector {
        name: "foci-2020-2",
        identification: 0x5a17,
        dont_fragment: true,
        hop_limit: 98,
        flags: 0x8180,
        full_name: false,
    },
    Injector {
        name: "foci-2020-3",
        identification: 0,
        dont_fragment: false,
        hop_limit: 64,
        flags: 0x8180,
        full_name: false,
    },
    Injector {
        name: "2025-8180-df",
        identification: 0,
        dont_fragment: true,
        hop_limit: 47,
        flags: 0x8180,
        full_name: false,
    },
    Injector {
        name: "2025-8180",
        identification: 0,
        dont_fragment: false,
        hop_limit: 51,
        flags: 0x8180,
        full_name: true,
    },
    Injector {
        name: "2025-8400",
        identification: 0x7fa0,
        dont_fragment: false,
        hop_limit: 112,
        flags: 0x8400,
        full_name: false,
    },
];

/// What a resolver such as Google's sends: no DF, an identification, EDNS if asked with.
pub const HONEST: Injector = Injector {
    name: "resolver",
    identification: 0x4242,
    dont_fragment: false,
    hop_limit: 118,
    flags: 0x8180,
    full_name: false,
};

/// The answer to the query in a frame, as a frame back to whom it came from; `None` if
/// the frame holds no query for an address of the family of `address`.
///
/// With `edns` the answer carries an OPT record if the query does.
pub fn answer(query: &[u8], injector: &Injector, address: IpAddr, edns: bool) -> Option<Vec<u8>> {
    build(query, injector, address, edns).ok().flatten()
}

fn build(
    query: &[u8],
    injector: &Injector,
    address: IpAddr,
    edns: bool,
) -> Result<Option<Vec<u8>>, Unparsed> {
    let datagram = Datagram::parse(query)?;
    let message = datagram.udp.payload_at();
    let header = dns::Header::read(query, message)?;
    if datagram.udp.destination_port != underpass_logic::dnsguard::PORT {
        return Ok(None);
    }
    let Ok(has_opt) = dns::query_has_opt(query, &header, message) else { return Ok(None) };
    let name = message + dns::Header::LEN;
    let name_length = query[name..].iter().position(|byte| *byte == 0).ok_or(Unparsed::Short)? + 1;
    let question_end = name + name_length + 4;
    let question = query.get(name..question_end).ok_or(Unparsed::Short)?;
    let (kind, data) = match address {
        IpAddr::V4(v4) => (dns::kind::A, v4.octets().to_vec()),
        IpAddr::V6(v6) => (dns::kind::AAAA, v6.octets().to_vec()),
    };
    if question[name_length..name_length + 2] != kind.to_be_bytes() {
        return Ok(None);
    }
    let opt = edns && has_opt;

    let mut payload = query[message..message + 2].to_vec();
    payload.extend(injector.flags.to_be_bytes());
    payload.extend([0, 1, 0, 1, 0, 0, 0, u8::from(opt)]);
    payload.extend(question);
    if injector.full_name {
        payload.extend(&question[..name_length]);
    } else {
        payload.extend([0xc0, dns::Header::LEN as u8]);
    }
    payload.extend(kind.to_be_bytes());
    payload.extend([0, 1, 0, 0, 0, 60]);
    payload.extend((data.len() as u16).to_be_bytes());
    payload.extend(data);
    if opt {
        payload.extend([0, 0, 41, 2, 0, 0, 0, 0, 0, 0, 0]);
    }
    reply(query, &datagram, injector, &payload).map(Some)
}

/// A frame with the payload, from where the query went to back to where it came from.
fn reply(
    query: &[u8],
    datagram: &Datagram,
    injector: &Injector,
    payload: &[u8],
) -> Result<Vec<u8>, Unparsed> {
    let Datagram { ip, udp } = datagram;
    let mut frame = query[..udp.payload_at()].to_vec();
    frame.extend(payload);
    let (destination, source) = (query[..6].to_vec(), query[6..12].to_vec());
    frame[..6].copy_from_slice(&source);
    frame[6..12].copy_from_slice(&destination);
    let length = (udp.payload_at() - udp.header + payload.len()) as u16;
    let total = (frame.len() - ip.header) as u16;
    let packet = &mut frame[..];
    match ip.version {
        Version::V4 => {
            packet.set_bytes(ip.header + 2, total.to_be_bytes())?;
            packet.set_bytes(ip.header + 4, injector.identification.to_be_bytes())?;
            packet.set_bytes(ip.header + 6, [u8::from(injector.dont_fragment) << 6, 0])?;
            packet.set_bytes(ip.header + 8, [injector.hop_limit])?;
        }
        Version::V6 => {
            packet.set_bytes(ip.header + 4, (total - 40).to_be_bytes())?;
            packet.set_bytes(ip.header + 7, [injector.hop_limit])?;
        }
    }
    packet.set_bytes(udp.header + Udp::SOURCE_PORT, udp.destination_port.to_be_bytes())?;
    packet.set_bytes(udp.header + Udp::DESTINATION_PORT, udp.source_port.to_be_bytes())?;
    packet.set_bytes(udp.header + 4, length.to_be_bytes())?;
    let (from, to): (Address, Address) = (ip.source(query)?, ip.destination(query)?);
    let now = Ip { end: ip.header + usize::from(total), ..*ip };
    rewrite::source_address(packet, &now, to)?;
    rewrite::destination_address(packet, &now, from)?;
    set_checksums(packet, &now)?;
    Ok(frame)
}

/// Computes a datagram's checksums from scratch.
///
/// # Errors
/// Where the packet is cut.
pub fn set_checksums(packet: &mut [u8], ip: &Ip) -> Result<(), Unparsed> {
    if ip.version == Version::V4 {
        packet.set_bytes(ip.header + Ipv4::CHECKSUM, [0, 0])?;
        let mut sum = 0;
        for at in (ip.header..ip.payload).step_by(2) {
            sum += checksum::sum(packet.bytes::<2>(at)?);
        }
        packet.set_bytes(ip.header + Ipv4::CHECKSUM, (!checksum::fold(sum)).to_be_bytes())?;
    }
    let sum = compute(packet, ip)?;
    packet.set_bytes(ip.payload + Udp::CHECKSUM, sum.to_be_bytes())?;
    Ok(())
}

/// A frame with a query, as a host sends it: `kind` of `name` (without a final dot),
/// with an OPT record if `edns`.
///
/// # Panics
/// If the addresses are of different families or a label is longer than 63 bytes.
pub fn query(
    (client, port): (IpAddr, u16),
    resolver: IpAddr,
    (name, kind): (&str, u16),
    id: u16,
    edns: bool,
) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        assert!(label.len() < 64, "a label of {} bytes", label.len());
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    if edns {
        message.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    }
    let length = (8 + message.len()) as u16;
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    match (client, resolver) {
        (IpAddr::V4(client), IpAddr::V4(resolver)) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + length).to_be_bytes());
            frame.extend([0x12, 0x34, 0, 0, 64, 17, 0, 0]);
            frame.extend(client.octets());
            frame.extend(resolver.octets());
        }
        (IpAddr::V6(client), IpAddr::V6(resolver)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([17, 64]);
            frame.extend(client.octets());
            frame.extend(resolver.octets());
        }
        _ => panic!("{client} and {resolver} are of different families"),
    }
    frame.extend(port.to_be_bytes());
    frame.extend([0, 53]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(message);
    let ip = Ip::parse(&frame[..]).expect("a frame that was just built");
    set_checksums(&mut frame[..], &ip).expect("a frame that was just built");
    frame
}
