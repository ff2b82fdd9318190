//! IPv4 with options (RFC 791) and IPv6 with extension headers (RFC 8200), up to
//! where the transport header starts.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, network_endian::U16};

use super::{
    Packet, Short, Unparsed,
    ethernet::{Frame, ether_type},
    header,
};

/// The IPv4 header without options (RFC 791, 3.1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv4 {
    version_ihl: u8,
    pub type_of_service: u8,
    pub total_length: U16,
    pub identification: U16,
    flags_offset: U16,
    pub time_to_live: u8,
    pub protocol: u8,
    pub header_checksum: U16,
    pub source: [u8; 4],
    pub destination: [u8; 4],
}
header!(Ipv4, 20);

impl Ipv4 {
    /// Offset of the header checksum within the header.
    pub const CHECKSUM: usize = 10;
    /// Offset of the source address within the header.
    pub const SOURCE: usize = 12;
    /// Offset of the destination address within the header.
    pub const DESTINATION: usize = 16;

    #[inline(always)]
    pub fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// The header's length with its options, in bytes: 0 to 60, valid from 20 on.
    #[inline(always)]
    pub fn header_length(&self) -> usize {
        usize::from(self.version_ihl & 0x0f) * 4
    }

    /// The DF flag.
    #[inline(always)]
    pub fn dont_fragment(&self) -> bool {
        self.flags_offset.get() & 0x4000 != 0
    }

    /// The MF flag.
    #[inline(always)]
    pub fn more_fragments(&self) -> bool {
        self.flags_offset.get() & 0x2000 != 0
    }

    /// The fragment offset, in units of 8 bytes.
    #[inline(always)]
    pub fn fragment_offset(&self) -> u16 {
        self.flags_offset.get() & 0x1fff
    }
}

/// The IPv6 header (RFC 8200, 3).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ipv6 {
    version_class: u8,
    class_flow: u8,
    flow: U16,
    pub payload_length: U16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}
header!(Ipv6, 40);

impl Ipv6 {
    /// Offset of the source address within the header.
    pub const SOURCE: usize = 8;
    /// Offset of the destination address within the header.
    pub const DESTINATION: usize = 24;

    #[inline(always)]
    pub fn version(&self) -> u8 {
        self.version_class >> 4
    }
}

/// What the extension headers start with (RFC 8200, 4.2 to 4.6; RFC 4302, 2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Extension {
    next_header: u8,
    /// The length in a unit that depends on the header; reserved in a fragment header.
    length: u8,
    /// In a fragment header: the offset (13 bits), two reserved ones and the M flag.
    offset_flags: U16,
}
header!(Extension, 4);

/// Protocol numbers (RFC 5237), which are IPv6's next-header numbers too.
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION_OPTIONS: u8 = 60;
}

/// The most IPv6 extension headers that are followed.
pub const MAX_EXTENSIONS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V4,
    V6,
}

/// Which part of a datagram an IP packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first of several: the transport header is here, the end is not.
    First,
    /// Another: no transport header.
    Later,
}

/// An address of either family: an IPv4 address is mapped into IPv6 (RFC 4291, 2.5.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Address(pub [u8; 16]);

impl Address {
    #[inline(always)]
    pub const fn v4([a, b, c, d]: [u8; 4]) -> Self {
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// The address in two words.
    #[inline(always)]
    pub fn words(self) -> Words {
        zerocopy::transmute!(self.0)
    }
}

/// An address in two words, as they lie in memory: what is compared and hashed. In the
/// kernel programs sixteen bytes travel one by one, two words do not.
pub type Words = [u64; 2];

impl From<Words> for Address {
    fn from(words: Words) -> Self {
        Self(zerocopy::transmute!(words))
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(v4) => Self::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self(v6.octets()),
        }
    }
}

impl From<Address> for core::net::IpAddr {
    fn from(Address(bytes): Address) -> Self {
        core::net::Ipv6Addr::from(bytes).to_canonical()
    }
}

/// What both families have in common, and where its parts are in the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip {
    pub version: Version,
    /// The offset of the IP header.
    pub header: usize,
    /// The offset of what the packet carries, behind options and extension headers.
    pub payload: usize,
    /// The offset of the IP packet's end; a frame's padding comes behind it.
    pub end: usize,
    /// What the packet carries ([`protocol`]).
    pub protocol: u8,
    /// IPv4's time to live, IPv6's hop limit.
    pub hop_limit: u8,
    pub fragment: Fragment,
}

impl Ip {
    /// Parses a packet's headers up to and with those of IP.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way; a fragment is not.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P) -> Result<Self, Unparsed> {
        let frame = Frame::parse(packet)?;
        let ip = match frame.ether_type {
            ether_type::IPV4 => Self::v4(packet, frame.payload)?,
            ether_type::IPV6 => Self::v6(packet, frame.payload)?,
            _ => return Err(Unparsed::NotIp),
        };
        if ip.end > packet.len() {
            return Err(Unparsed::Short);
        }
        Ok(ip)
    }

    /// Parses the IP headers at `at`, of the family that their first bits tell.
    /// `end` is as the header says, even beyond the packet: what an ICMP error
    /// quotes is cut.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way.
    #[inline(always)]
    pub fn parse_quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Result<Self, Unparsed> {
        let [first] = packet.bytes(at)?;
        match first >> 4 {
            4 => Self::v4(packet, at),
            6 => Self::v6(packet, at),
            _ => Err(Unparsed::NotIp),
        }
    }

    #[inline(always)]
    fn v4<P: Packet + ?Sized>(packet: &P, at: usize) -> Result<Self, Unparsed> {
        let header = Ipv4::read(packet, at)?;
        let total = usize::from(header.total_length.get());
        let length = header.header_length();
        if header.version() != 4 || length < Ipv4::LEN || total < length {
            return Err(Unparsed::Malformed);
        }
        let fragment = match (header.fragment_offset(), header.more_fragments()) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            version: Version::V4,
            header: at,
            payload: packet.forget(at + length),
            end: at + total,
            protocol: header.protocol,
            hop_limit: header.time_to_live,
            fragment,
        })
    }

    #[inline(always)]
    fn v6<P: Packet + ?Sized>(packet: &P, at: usize) -> Result<Self, Unparsed> {
        let header = Ipv6::read(packet, at)?;
        if header.version() != 6 {
            return Err(Unparsed::Malformed);
        }
        // 0 is a jumbogram (RFC 2675), whose length is in an option. No link that
        // this meets carries one; the kernel makes them when it merges segments.
        let end = match usize::from(header.payload_length.get()) {
            0 => packet.len(),
            length => at + Ipv6::LEN + length,
        };
        let mut ip = Self {
            version: Version::V6,
            header: at,
            payload: packet.forget(at + Ipv6::LEN),
            end,
            protocol: header.next_header,
            hop_limit: header.hop_limit,
            fragment: Fragment::Whole,
        };
        ip.skip_extensions(packet)?;
        Ok(ip)
    }

    /// Follows IPv6's extension headers (RFC 8200, 4) and an authentication header
    /// (RFC 4302). What comes behind an encrypted payload header stays unknown.
    #[inline(always)]
    fn skip_extensions<P: Packet + ?Sized>(&mut self, packet: &P) -> Result<(), Unparsed> {
        for nth in 0..MAX_EXTENSIONS {
            // The hop-by-hop header may only come first.
            if self.protocol == protocol::HOP_BY_HOP && nth > 0 {
                return Err(Unparsed::Malformed);
            }
            if !is_extension(self.protocol) {
                return Ok(());
            }
            let extension = Extension::read(packet, self.payload)?;
            let length = match self.protocol {
                protocol::FRAGMENT => {
                    self.fragment = match extension.offset_flags.get() {
                        field if field & 0xfff8 != 0 => Fragment::Later,
                        field if field & 1 != 0 => Fragment::First,
                        _ => self.fragment,
                    };
                    8
                }
                // In units of 4 bytes, less two.
                protocol::AUTHENTICATION if extension.length == 0 => return Err(Unparsed::Malformed),
                protocol::AUTHENTICATION => (usize::from(extension.length) + 2) * 4,
                // In units of 8 bytes, less one.
                _ => (usize::from(extension.length) + 1) * 8,
            };
            self.protocol = extension.next_header;
            self.payload = packet.forget(self.payload + length);
            if self.payload > self.end {
                return Err(Unparsed::Short);
            }
            if self.fragment == Fragment::Later {
                return Ok(());
            }
        }
        if is_extension(self.protocol) { Err(Unparsed::Malformed) } else { Ok(()) }
    }

    /// Whether a transport header of this protocol and length is here.
    #[inline(always)]
    pub(super) fn transport(&self, protocol: u8, length: usize) -> Result<(), Unparsed> {
        if self.protocol != protocol {
            return Err(Unparsed::OtherProtocol);
        }
        if self.fragment == Fragment::Later {
            return Err(Unparsed::Fragment);
        }
        if self.payload + length > self.end { Err(Unparsed::Short) } else { Ok(()) }
    }

    /// The source address.
    ///
    /// # Errors
    /// None, for a packet that this was parsed from.
    #[inline(always)]
    pub fn source<P: Packet + ?Sized>(&self, packet: &P) -> Result<Address, Short> {
        Ok(match self.version {
            Version::V4 => Address::v4(packet.bytes(self.header + Ipv4::SOURCE)?),
            Version::V6 => Address(packet.bytes(self.header + Ipv6::SOURCE)?),
        })
    }

    /// The destination address.
    ///
    /// # Errors
    /// None, for a packet that this was parsed from.
    #[inline(always)]
    pub fn destination<P: Packet + ?Sized>(&self, packet: &P) -> Result<Address, Short> {
        Ok(match self.version {
            Version::V4 => Address::v4(packet.bytes(self.header + Ipv4::DESTINATION)?),
            Version::V6 => Address(packet.bytes(self.header + Ipv6::DESTINATION)?),
        })
    }

    /// The source and the destination address, in two words each.
    ///
    /// # Errors
    /// None, for a packet that this was parsed from.
    #[inline(always)]
    pub fn endpoints<P: Packet + ?Sized>(&self, packet: &P) -> Result<(Words, Words), Short> {
        Ok(match self.version {
            Version::V4 => {
                let [source, destination] =
                    zerocopy::transmute!(packet.bytes::<8>(self.header + Ipv4::SOURCE)?);
                (mapped(source), mapped(destination))
            }
            Version::V6 => {
                let [source, destination] =
                    zerocopy::transmute!(packet.bytes::<32>(self.header + Ipv6::SOURCE)?);
                (source, destination)
            }
        })
    }
}

#[inline(always)]
fn mapped([a, b, c, d]: [u8; 4]) -> Words {
    [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
}

#[inline(always)]
pub(super) fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION_OPTIONS
    )
}
