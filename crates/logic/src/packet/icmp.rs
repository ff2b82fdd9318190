//! ICMP errors (RFC 792; for IPv6 RFC 4443), for the datagram that they quote.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, network_endian::U16};

use super::{
    Packet, Unparsed, header,
    ip::{Fragment, Ip, Version, protocol},
};

/// What every ICMP message of both families starts with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    pub kind: u8,
    pub code: u8,
    pub checksum: U16,
    /// An error's unused word, pointer, gateway or MTU.
    pub rest: [u8; 4],
}
header!(Header, 8);

impl Header {
    /// Offset of the checksum within the header.
    pub const CHECKSUM: usize = 2;
}

/// The ports of a TCP or UDP header, which is as much as an error must quote.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ports {
    source: U16,
    destination: U16,
}
header!(Ports, 4);

/// The start of a TCP segment or UDP datagram that an ICMP error quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quote {
    /// The offset of the ICMP header.
    pub header: usize,
    /// The error's type.
    pub kind: u8,
    /// The error's code.
    pub code: u8,
    /// What was quoted. Its `end` may lie beyond the packet's.
    pub ip: Ip,
    pub source_port: u16,
    pub destination_port: u16,
}

impl Quote {
    /// Parses an ICMP error behind the IP headers, and what it quotes of a TCP
    /// segment or UDP datagram.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way. An ICMP message that is not an error
    /// and a quote of another protocol are [`Unparsed::OtherProtocol`].
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P, ip: &Ip) -> Result<Self, Unparsed> {
        let expected = match ip.version {
            Version::V4 => protocol::ICMP,
            Version::V6 => protocol::ICMPV6,
        };
        if ip.protocol != expected {
            return Err(Unparsed::OtherProtocol);
        }
        if ip.fragment == Fragment::Later {
            return Err(Unparsed::Fragment);
        }
        let header = Header::read(packet, ip.payload)?;
        if !is_error(ip.version, header.kind) {
            return Err(Unparsed::OtherProtocol);
        }
        let quoted = Ip::parse_quoted(packet, packet.forget(ip.payload + Header::LEN))?;
        if !matches!(quoted.protocol, protocol::TCP | protocol::UDP) {
            return Err(Unparsed::OtherProtocol);
        }
        if quoted.fragment == Fragment::Later {
            return Err(Unparsed::Fragment);
        }
        if quoted.payload + Ports::LEN > ip.end {
            return Err(Unparsed::Short);
        }
        let ports = Ports::read(packet, quoted.payload)?;
        Ok(Self {
            header: ip.payload,
            kind: header.kind,
            code: header.code,
            ip: quoted,
            source_port: ports.source.get(),
            destination_port: ports.destination.get(),
        })
    }
}

/// Whether a message of this type is an error, which quotes what caused it.
#[inline(always)]
fn is_error(version: Version, kind: u8) -> bool {
    match version {
        // Unreachable, source quench, redirect, time exceeded, parameter problem.
        Version::V4 => matches!(kind, 3 | 4 | 5 | 11 | 12),
        // Unreachable, too big, time exceeded, parameter problem.
        Version::V6 => matches!(kind, 1..=4),
    }
}
