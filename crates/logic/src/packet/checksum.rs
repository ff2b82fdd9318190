//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

use super::{
    Packet, PacketMut, Short,
    ip::{Ip, Ipv4, Ipv6, Version, protocol},
};

/// A transport checksum in a packet.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its offset in the packet.
    pub at: usize,
    /// Whether 0 stands for no checksum at all, and a sum of 0 is sent as 0xffff.
    /// That is so for UDP (RFC 768; over IPv6 RFC 6935).
    pub zero_is_none: bool,
    /// The IP packet that it is in, for the pseudo-header.
    pub ip: Ip,
    /// Whether what changes is in the pseudo-header: an address.
    pub pseudo_header: bool,
}

/// Adds 16-bit words in ones' complement, unfolded. An odd last byte counts as a
/// word's first.
#[inline(always)]
pub fn sum<const N: usize>(bytes: [u8; N]) -> u32 {
    let mut sum = 0;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8;
        if let Some(low) = word.get(1) {
            sum += u32::from(*low);
        }
    }
    sum
}

/// Folds a sum of at most 0xffff words into 16 bits.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    // One carry may be left, and no more than one.
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The checksum after bytes that it covers changed from `old` to `new`, which start
/// at an even offset: RFC 1624, equation 3.
#[inline(always)]
pub fn update<const N: usize>(checksum: u16, old: [u8; N], new: [u8; N]) -> u16 {
    !replace(!checksum, old, new)
}

/// A folded sum after some of its words changed from `old` to `new`.
#[inline(always)]
fn replace<const N: usize>(folded: u16, old: [u8; N], new: [u8; N]) -> u16 {
    let minus_old = !fold(sum(old));
    fold(u32::from(folded) + u32::from(minus_old) + u32::from(fold(sum(new))))
}

/// Updates a transport checksum by arithmetic alone.
///
/// Where a checksum may be partial ([`Packet::MAYBE_PARTIAL`]), one that equals the
/// pseudo-header's sum is taken for it: right for every partial checksum, and
/// wrong for one in 65,536 complete ones that end up equal by chance.
///
/// # Errors
/// [`Short`] if the checksum is beyond the packet's end.
#[inline(always)]
pub fn update_in_place<P: PacketMut + ?Sized, const N: usize>(
    packet: &mut P,
    place: &Place,
    old: [u8; N],
    new: [u8; N],
) -> Result<(), Short> {
    let before = u16::from_be_bytes(packet.bytes(place.at)?);
    if before == 0 && place.zero_is_none {
        return Ok(());
    }
    let after = if P::MAYBE_PARTIAL && before == pseudo_header(packet, &place.ip)? {
        if !place.pseudo_header {
            return Ok(());
        }
        replace(before, old, new)
    } else {
        match update(before, old, new) {
            0 if place.zero_is_none => 0xffff,
            after => after,
        }
    };
    packet.set_bytes(place.at, after.to_be_bytes())
}

/// The folded sum of the pseudo-header of what an IP packet carries
/// (RFC 768, RFC 9293 3.1, RFC 8200 8.1).
///
/// # Errors
/// None, for a packet that `ip` was parsed from.
#[inline(always)]
pub fn pseudo_header<P: Packet + ?Sized>(packet: &P, ip: &Ip) -> Result<u16, Short> {
    let addresses = match ip.version {
        Version::V4 => sum(packet.bytes::<8>(ip.header + Ipv4::SOURCE)?),
        Version::V6 => {
            sum(packet.bytes::<16>(ip.header + Ipv6::SOURCE)?)
                + sum(packet.bytes::<16>(ip.header + Ipv6::DESTINATION)?)
        }
    };
    let length = ip.end.saturating_sub(ip.payload) as u32;
    Ok(fold(addresses + (length >> 16) + (length & 0xffff) + u32::from(ip.protocol)))
}

/// The checksum of what an IP packet carries, computed from scratch as if its
/// checksum field were 0. For hosts: it reads every byte.
///
/// # Errors
/// [`Short`] if the packet is cut.
pub fn compute<P: Packet + ?Sized>(packet: &P, ip: &Ip) -> Result<u16, Short> {
    let field = match ip.protocol {
        protocol::TCP => Some(ip.payload + super::tcp::Tcp::CHECKSUM),
        protocol::UDP => Some(ip.payload + super::udp::Udp::CHECKSUM),
        protocol::ICMP | protocol::ICMPV6 => Some(ip.payload + super::icmp::Header::CHECKSUM),
        _ => None,
    };
    let mut total = match ip.protocol {
        protocol::ICMP => 0,
        _ => u32::from(pseudo_header(packet, ip)?),
    };
    let mut at = ip.payload;
    while at < ip.end {
        let word = if at + 1 < ip.end {
            u16::from_be_bytes(packet.bytes(at)?)
        } else {
            u16::from(packet.bytes::<1>(at)?[0]) << 8
        };
        if Some(at) != field {
            total = u32::from(fold(total + u32::from(word)));
        }
        at += 2;
    }
    Ok(match !fold(total) {
        0 if ip.protocol == protocol::UDP => 0xffff,
        checksum => checksum,
    })
}
