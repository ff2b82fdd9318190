//! Changing ports and addresses in place, with every checksum that covers them.
//!
//! Datagrams that are fragmented can be rewritten as well: ports in the first
//! fragment; addresses in every fragment, as only the first has the checksum.

use super::{
    PacketMut, Short,
    checksum::{self, Place},
    icmp::{self, Quote},
    ip::{Address, Fragment, Ip, Ipv4, Ipv6, Version, protocol},
    tcp::Tcp,
    udp::{Datagram, Udp},
};

/// Sets a datagram's source port.
///
/// # Errors
/// None, for a packet that `datagram` was parsed from.
#[inline(always)]
pub fn udp_source_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    datagram: &Datagram,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, datagram.udp.header + Udp::SOURCE_PORT, port, &udp_checksum(datagram))
}

/// Sets a datagram's destination port.
///
/// # Errors
/// None, for a packet that `datagram` was parsed from.
#[inline(always)]
pub fn udp_destination_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    datagram: &Datagram,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, datagram.udp.header + Udp::DESTINATION_PORT, port, &udp_checksum(datagram))
}

/// Sets a segment's source port.
///
/// # Errors
/// None, for a packet that `ip` and `tcp` were parsed from.
#[inline(always)]
pub fn tcp_source_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    ip: &Ip,
    tcp: &Tcp,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, tcp.header + Tcp::SOURCE_PORT, port, &tcp_checksum(ip, tcp))
}

/// Sets a segment's destination port.
///
/// # Errors
/// None, for a packet that `ip` and `tcp` were parsed from.
#[inline(always)]
pub fn tcp_destination_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    ip: &Ip,
    tcp: &Tcp,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, tcp.header + Tcp::DESTINATION_PORT, port, &tcp_checksum(ip, tcp))
}

/// Sets the source port of the datagram that an ICMP error quotes, in the quote.
/// The quoted checksum stays as it is: it is often cut off, and nobody checks it.
///
/// # Errors
/// None, for a packet that `ip` and `quote` were parsed from.
#[inline(always)]
pub fn quoted_source_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    ip: &Ip,
    quote: &Quote,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, quote.ip.payload + Udp::SOURCE_PORT, port, &icmp_checksum(ip, quote))
}

/// Sets the destination port of the datagram that an ICMP error quotes, in the
/// quote. The quoted checksum stays as it is.
///
/// # Errors
/// None, for a packet that `ip` and `quote` were parsed from.
#[inline(always)]
pub fn quoted_destination_port<P: PacketMut + ?Sized>(
    packet: &mut P,
    ip: &Ip,
    quote: &Quote,
    port: u16,
) -> Result<(), Short> {
    port_at(packet, quote.ip.payload + Udp::DESTINATION_PORT, port, &icmp_checksum(ip, quote))
}

/// Sets the source address, of the family that the packet has.
///
/// # Errors
/// [`Short`] if the transport header is cut; nothing is changed then.
#[inline(always)]
pub fn source_address<P: PacketMut + ?Sized>(packet: &mut P, ip: &Ip, to: Address) -> Result<(), Short> {
    match ip.version {
        Version::V4 => v4_address(packet, ip, ip.header + Ipv4::SOURCE, to),
        Version::V6 => v6_address(packet, ip, ip.header + Ipv6::SOURCE, to),
    }
}

/// Sets the destination address, of the family that the packet has.
///
/// # Errors
/// [`Short`] if the transport header is cut; nothing is changed then.
#[inline(always)]
pub fn destination_address<P: PacketMut + ?Sized>(packet: &mut P, ip: &Ip, to: Address) -> Result<(), Short> {
    match ip.version {
        Version::V4 => v4_address(packet, ip, ip.header + Ipv4::DESTINATION, to),
        Version::V6 => v6_address(packet, ip, ip.header + Ipv6::DESTINATION, to),
    }
}

#[inline(always)]
fn v4_address<P: PacketMut + ?Sized>(packet: &mut P, ip: &Ip, at: usize, to: Address) -> Result<(), Short> {
    let [.., a, b, c, d] = to.0;
    let new = [a, b, c, d];
    let old: [u8; 4] = packet.bytes(at)?;
    let header_checksum = u16::from_be_bytes(packet.bytes(ip.header + Ipv4::CHECKSUM)?);
    if let Some(place) = transport_checksum(ip) {
        packet.update_checksum(&place, old, new)?;
    }
    let header_checksum = checksum::update(header_checksum, old, new);
    packet.set_bytes(ip.header + Ipv4::CHECKSUM, header_checksum.to_be_bytes())?;
    packet.set_bytes(at, new)
}

#[inline(always)]
fn v6_address<P: PacketMut + ?Sized>(packet: &mut P, ip: &Ip, at: usize, to: Address) -> Result<(), Short> {
    let old: [u8; 16] = packet.bytes(at)?;
    if let Some(place) = transport_checksum(ip) {
        packet.update_checksum(&place, old, to.0)?;
    }
    packet.set_bytes(at, to.0)
}

/// The transport checksum that an address is part of, if this packet has it.
#[inline(always)]
fn transport_checksum(ip: &Ip) -> Option<Place> {
    if ip.fragment == Fragment::Later {
        return None;
    }
    let (offset, zero_is_none) = match ip.protocol {
        protocol::TCP => (Tcp::CHECKSUM, false),
        protocol::UDP => (Udp::CHECKSUM, true),
        protocol::ICMPV6 => (icmp::Header::CHECKSUM, false),
        _ => return None,
    };
    Some(Place { at: ip.payload + offset, zero_is_none, ip: *ip, pseudo_header: true })
}

#[inline(always)]
fn udp_checksum(datagram: &Datagram) -> Place {
    let at = datagram.udp.header + Udp::CHECKSUM;
    Place { at, zero_is_none: true, ip: datagram.ip, pseudo_header: false }
}

#[inline(always)]
fn tcp_checksum(ip: &Ip, tcp: &Tcp) -> Place {
    Place { at: tcp.header + Tcp::CHECKSUM, zero_is_none: false, ip: *ip, pseudo_header: false }
}

#[inline(always)]
fn icmp_checksum(ip: &Ip, quote: &Quote) -> Place {
    let at = quote.header + icmp::Header::CHECKSUM;
    Place { at, zero_is_none: false, ip: *ip, pseudo_header: false }
}

#[inline(always)]
fn port_at<P: PacketMut + ?Sized>(packet: &mut P, at: usize, port: u16, place: &Place) -> Result<(), Short> {
    let old: [u8; 2] = packet.bytes(at)?;
    let new = port.to_be_bytes();
    packet.update_checksum(place, old, new)?;
    packet.set_bytes(at, new)
}
