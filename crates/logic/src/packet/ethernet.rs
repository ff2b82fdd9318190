//! Ethernet II (RFC 894, IEEE 802.3) with up to two VLAN tags (IEEE 802.1Q, 802.1ad).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, network_endian::U16};

use super::{Packet, Short, header};

/// The Ethernet header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    /// What follows; a VLAN tag announces itself here too.
    pub ether_type: U16,
}
header!(Ethernet, 14);

/// A VLAN tag, as it follows the EtherType that announces it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct VlanTag {
    /// Priority (3 bits), drop eligibility (1) and VLAN identifier (12).
    pub control: U16,
    pub ether_type: U16,
}
header!(VlanTag, 4);

/// EtherTypes (IEEE 802 numbers).
pub mod ether_type {
    pub const IPV4: u16 = 0x0800;
    pub const VLAN: u16 = 0x8100;
    pub const IPV6: u16 = 0x86dd;
    pub const QINQ: u16 = 0x88a8;
    /// What some switches announced an outer tag with before 802.1ad.
    pub const QINQ_OLD: u16 = 0x9100;
}

/// The most VLAN tags that are followed.
pub const MAX_TAGS: usize = 2;

/// Where the Ethernet header and its VLAN tags end, and what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The EtherType behind the tags. With more than [`MAX_TAGS`] it is still a tag's.
    pub ether_type: u16,
    /// The offset of what it announces.
    pub payload: usize,
}

impl Frame {
    /// Parses the Ethernet header and the tags behind it.
    ///
    /// # Errors
    /// [`Short`] if the packet ends before they do.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(packet: &P) -> Result<Self, Short> {
        let mut frame =
            Self { ether_type: Ethernet::read(packet, 0)?.ether_type.get(), payload: Ethernet::LEN };
        for _ in 0..MAX_TAGS {
            if !matches!(frame.ether_type, ether_type::VLAN | ether_type::QINQ | ether_type::QINQ_OLD) {
                break;
            }
            frame.ether_type = VlanTag::read(packet, frame.payload)?.ether_type.get();
            frame.payload = packet.forget(frame.payload + VlanTag::LEN);
        }
        Ok(frame)
    }
}
