//! UDP (RFC 768; over IPv6 RFC 8200, 8.1 and RFC 6935).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, network_endian::U16};

use super::{
    Packet, Short, Unparsed, bytes_before,
    ethernet::{Ethernet, ether_type},
    header,
    ip::{Fragment, Ip, Ipv4, Ipv6, is_extension, protocol},
};

/// The UDP header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    pub source_port: U16,
    pub destination_port: U16,
    /// Of header and payload, in bytes.
    pub length: U16,
    pub checksum: U16,
}
header!(Header, 8);

/// A UDP header and where its parts are in the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Udp {
    /// The offset of the UDP header.
    pub header: usize,
    pub source_port: u16,
    pub destination_port: u16,
    /// The offset of the payload's end. In a first fragment it is where the
    /// fragment ends.
    pub end: usize,
}

impl Udp {
    /// Offset of the source port within the header.
    pub const SOURCE_PORT: usize = 0;
    /// Offset of the destination port within the header.
    pub const DESTINATION_PORT: usize = 2;
    /// Offset of the checksum within the header.
    pub const CHECKSUM: usize = 6;

    /// Parses the UDP header behind the IP headers.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way. A length of 0 (a jumbogram's, RFC 2675)
    /// is malformed here.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P, ip: &Ip) -> Result<Self, Unparsed> {
        ip.transport(protocol::UDP, Header::LEN)?;
        let header = Header::read(packet, ip.payload)?;
        let length = usize::from(header.length.get());
        if length < Header::LEN {
            return Err(Unparsed::Malformed);
        }
        let mut end = ip.payload + length;
        if end > ip.end {
            if ip.fragment == Fragment::Whole {
                return Err(Unparsed::Short);
            }
            end = ip.end;
        }
        Ok(Self {
            header: ip.payload,
            source_port: header.source_port.get(),
            destination_port: header.destination_port.get(),
            end,
        })
    }

    /// The offset of the payload.
    #[inline(always)]
    pub fn payload_at(&self) -> usize {
        self.header + Header::LEN
    }

    /// The payload's length in bytes.
    #[inline(always)]
    pub fn payload_length(&self) -> usize {
        self.end.saturating_sub(self.payload_at())
    }

    /// The `N` bytes of the payload from `offset` on, which may be any value that
    /// is known at run time only.
    ///
    /// # Errors
    /// [`Short`] if the payload ends before.
    #[inline(always)]
    pub fn payload<P: Packet + ?Sized, const N: usize>(
        &self,
        packet: &P,
        offset: usize,
    ) -> Result<[u8; N], Short> {
        bytes_before(packet, self.payload_at(), offset, self.end)
    }
}

/// What a look at the places where nearly every packet has its headers tells, for the
/// programs that meet all traffic and want little of it. Where it tells something,
/// [`Datagram::parse`] finds no other ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glance {
    /// No UDP.
    Other,
    /// UDP with these ports, if it is not cut or malformed behind them.
    Udp { source_port: u16, destination_port: u16 },
    /// It takes parsing: VLAN tags, options, extension headers, fragments but the first,
    /// or something else than IP.
    Unclear,
}

impl Glance {
    #[inline(always)]
    pub fn at<P: Packet + ?Sized>(packet: &P) -> Self {
        Self::read(packet).unwrap_or(Self::Unclear)
    }

    #[inline(always)]
    fn read<P: Packet + ?Sized>(packet: &P) -> Result<Self, Short> {
        let (protocol, transport) = match Ethernet::read(packet, 0)?.ether_type.get() {
            ether_type::IPV4 => {
                let ip = Ipv4::read(packet, Ethernet::LEN)?;
                if ip.header_length() != Ipv4::LEN || ip.fragment_offset() != 0 {
                    return Ok(Self::Unclear);
                }
                (ip.protocol, Ethernet::LEN + Ipv4::LEN)
            }
            ether_type::IPV6 => (Ipv6::read(packet, Ethernet::LEN)?.next_header, Ethernet::LEN + Ipv6::LEN),
            _ => return Ok(Self::Unclear),
        };
        if protocol != protocol::UDP {
            return Ok(if is_extension(protocol) { Self::Unclear } else { Self::Other });
        }
        let header = Header::read(packet, transport)?;
        Ok(Self::Udp {
            source_port: header.source_port.get(),
            destination_port: header.destination_port.get(),
        })
    }
}

/// A UDP datagram and what carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram {
    pub ip: Ip,
    pub udp: Udp,
}

impl Datagram {
    /// Parses everything down to UDP's payload.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P) -> Result<Self, Unparsed> {
        let ip = Ip::parse(packet)?;
        let udp = Udp::parse(packet, &ip)?;
        Ok(Self { ip, udp })
    }
}
