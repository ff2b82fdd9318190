//! TCP with options (RFC 9293).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    network_endian::{U16, U32},
};

use super::{
    Packet, Short, Unparsed, bytes_before, header,
    ip::{Ip, protocol},
};

/// The TCP header without options (RFC 9293, 3.1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    pub source_port: U16,
    pub destination_port: U16,
    pub sequence_number: U32,
    pub acknowledgment_number: U32,
    offset_reserved: u8,
    /// The control bits ([`flags`]).
    pub flags: u8,
    pub window: U16,
    pub checksum: U16,
    pub urgent_pointer: U16,
}
header!(Header, 20);

/// TCP's control bits.
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
}

/// A TCP header and where its parts are in the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// The offset of the TCP header.
    pub header: usize,
    pub source_port: u16,
    pub destination_port: u16,
    pub flags: u8,
    /// The offset of the payload, behind the options.
    pub payload: usize,
    /// The offset of the payload's end.
    pub end: usize,
}

impl Tcp {
    /// Offset of the source port within the header.
    pub const SOURCE_PORT: usize = 0;
    /// Offset of the destination port within the header.
    pub const DESTINATION_PORT: usize = 2;
    /// Offset of the checksum within the header.
    pub const CHECKSUM: usize = 16;

    /// Parses the TCP header behind the IP headers.
    ///
    /// # Errors
    /// [`Unparsed`] says what is in the way.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P, ip: &Ip) -> Result<Self, Unparsed> {
        ip.transport(protocol::TCP, Header::LEN)?;
        let header = Header::read(packet, ip.payload)?;
        let length = usize::from(header.offset_reserved >> 4) * 4;
        if length < Header::LEN {
            return Err(Unparsed::Malformed);
        }
        let payload = packet.forget(ip.payload + length);
        if payload > ip.end {
            return Err(Unparsed::Short);
        }
        Ok(Self {
            header: ip.payload,
            source_port: header.source_port.get(),
            destination_port: header.destination_port.get(),
            flags: header.flags,
            payload,
            end: ip.end,
        })
    }

    /// The payload's length in bytes.
    #[inline(always)]
    pub fn payload_length(&self) -> usize {
        self.end.saturating_sub(self.payload)
    }

    /// The `N` bytes of the payload from `offset` on.
    ///
    /// # Errors
    /// [`Short`] if the payload ends before.
    #[inline(always)]
    pub fn payload<P: Packet + ?Sized, const N: usize>(
        &self,
        packet: &P,
        offset: usize,
    ) -> Result<[u8; N], Short> {
        bytes_before(packet, self.payload, offset, self.end)
    }
}
