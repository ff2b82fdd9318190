//! Rewriting: whatever was right before is right after, and nothing else changes.

use proptest::prelude::*;
use underpass_logic::packet::{
    Packet, PacketMut,
    checksum::{self, compute},
    icmp::Quote,
    ip::{Address, Fragment, Ip, Ipv4, Version},
    rewrite,
    tcp::Tcp,
    udp::{Datagram, Udp},
};

use crate::frames;

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, max_global_rejects: 500_000, ..ProptestConfig::default() })]

    #[test]
    fn udp_ports_keep_the_checksum_right(frame in frames::frame(), source: u16, destination: u16) {
        let before = Datagram::parse(&frame[..]);
        prop_assume!(before.is_ok());
        let before = before.unwrap();
        let mut packet = frame.clone();
        rewrite::udp_source_port(&mut packet[..], &before, source).unwrap();
        rewrite::udp_destination_port(&mut packet[..], &before, destination).unwrap();
        let after = Datagram::parse(&packet[..]).unwrap();
        prop_assert_eq!(after.udp.source_port, source);
        prop_assert_eq!(after.udp.destination_port, destination);
        same_but(&frame, &packet, &[before.udp.header..before.udp.header + 4, before.udp.header + 6..before.udp.header + 8])?;
        right(&frame, &packet, &after.ip, after.udp.header + Udp::CHECKSUM)?;
    }

    #[test]
    fn tcp_ports_keep_the_checksum_right(frame in frames::frame(), source: u16, destination: u16) {
        let ip = Ip::parse(&frame[..]);
        prop_assume!(ip.is_ok());
        let ip = ip.unwrap();
        let before = Tcp::parse(&frame[..], &ip);
        prop_assume!(before.is_ok());
        let before = before.unwrap();
        let mut packet = frame.clone();
        rewrite::tcp_source_port(&mut packet[..], &ip, &before, source).unwrap();
        rewrite::tcp_destination_port(&mut packet[..], &ip, &before, destination).unwrap();
        let after = Tcp::parse(&packet[..], &ip).unwrap();
        prop_assert_eq!((after.source_port, after.destination_port), (source, destination));
        right(&frame, &packet, &ip, before.header + Tcp::CHECKSUM)?;
    }

    #[test]
    fn addresses_keep_every_checksum_right(frame in frames::frame(), source: [u8; 16], destination: [u8; 16]) {
        let ip = Ip::parse(&frame[..]);
        prop_assume!(ip.is_ok());
        let ip = ip.unwrap();
        // A transport header that is cut has no checksum to keep right.
        prop_assume!(ip.fragment == Fragment::Later || ip.payload + 20 <= ip.end);
        let mut packet = frame.clone();
        let address = |bytes: [u8; 16]| match ip.version {
            Version::V4 => Address::v4(*bytes.first_chunk().unwrap()),
            Version::V6 => Address(bytes),
        };
        rewrite::source_address(&mut packet[..], &ip, address(source)).unwrap();
        rewrite::destination_address(&mut packet[..], &ip, address(destination)).unwrap();
        prop_assert_eq!(ip.source(&packet[..]).unwrap(), address(source));
        prop_assert_eq!(ip.destination(&packet[..]).unwrap(), address(destination));
        if ip.version == Version::V4 {
            let header = Ipv4::read(&packet[..], ip.header).unwrap();
            let mut sum = 0;
            for at in (ip.header..ip.header + header.header_length()).step_by(2) {
                sum += checksum::sum::<2>(packet.bytes(at).unwrap());
            }
            prop_assert_eq!(checksum::fold(sum), 0xffff);
        }
        let field = match ip.protocol {
            6 => Tcp::CHECKSUM,
            17 => Udp::CHECKSUM,
            58 => 2,
            _ => return Ok(()),
        };
        right(&frame, &packet, &ip, ip.payload + field)?;
    }

    #[test]
    fn a_quoted_port_keeps_the_icmp_checksum_right(inner in frames::frame(), port: u16) {
        let mut packet = vec![0; 12];
        packet.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend([3, 3, 0, 0, 0, 0, 0, 0]);
        packet.extend(&inner[Ip::parse(&inner[..]).map_or(inner.len(), |ip| ip.header)..]);
        let length = (packet.len() - 14) as u16;
        packet[16..18].copy_from_slice(&length.to_be_bytes());
        let ip = Ip::parse(&packet[..]).unwrap();
        let sum = compute(&packet[..], &ip).unwrap();
        packet[36..38].copy_from_slice(&sum.to_be_bytes());
        let quote = Quote::parse(&packet[..], &ip);
        prop_assume!(quote.is_ok());
        let before = packet.clone();
        rewrite::quoted_source_port(&mut packet[..], &ip, &quote.unwrap(), port).unwrap();
        prop_assert_eq!(Quote::parse(&packet[..], &ip).unwrap().source_port, port);
        right(&before, &packet, &ip, 36)?;
    }

    #[test]
    fn a_partial_checksum_is_left_or_follows_the_addresses(frame in frames::frame(), port: u16, source: [u8; 16]) {
        let before = Datagram::parse(&frame[..]);
        prop_assume!(before.is_ok_and(|datagram| datagram.ip.fragment == Fragment::Whole));
        let before = before.unwrap();
        let mut frame = frame;
        let partial = checksum::pseudo_header(&frame[..], &before.ip).unwrap();
        prop_assume!(partial != 0);
        let at = before.udp.header + Udp::CHECKSUM;
        frame[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        let mut packet = Partial(frame);
        rewrite::udp_destination_port(&mut packet, &before, port).unwrap();
        let address = match before.ip.version {
            Version::V4 => Address::v4(*source.first_chunk().unwrap()),
            Version::V6 => Address(source),
        };
        rewrite::source_address(&mut packet, &before.ip, address).unwrap();
        let after = checksum::pseudo_header(&packet, &before.ip).unwrap();
        prop_assert_eq!(u16::from_be_bytes(packet.bytes(at).unwrap()), after);
    }
}

#[test]
fn the_example_of_rfc_1624_comes_out() {
    // Section 4: HC = 0xdd2f, m = 0x5555, m' = 0x3285 gives 0x0000, not 0xffff.
    assert_eq!(checksum::update(0xdd2f, [0x55, 0x55], [0x32, 0x85]), 0x0000);
}

/// A packet as XDP sees it: its checksum may be partial.
struct Partial(Vec<u8>);

impl Packet for Partial {
    const MAYBE_PARTIAL: bool = true;
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], underpass_logic::packet::Short> {
        self.0.bytes(at)
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl PacketMut for Partial {
    fn set_bytes<const N: usize>(
        &mut self,
        at: usize,
        bytes: [u8; N],
    ) -> Result<(), underpass_logic::packet::Short> {
        self.0[..].as_mut().set_bytes(at, bytes)
    }
}

/// The checksum at `at` is right if it was, and absent if it was.
fn right(before: &[u8], after: &[u8], ip: &Ip, at: usize) -> Result<(), TestCaseError> {
    // A fragment's checksum covers what is elsewhere.
    if ip.fragment != Fragment::Whole || at + 2 > ip.end {
        return Ok(());
    }
    let field = |packet: &[u8]| u16::from_be_bytes(packet.bytes(at).unwrap());
    let ip_before = Ip::parse(before).unwrap();
    if ip.protocol == 17 && field(before) == 0 {
        prop_assert_eq!(field(after), 0);
    } else if field(before) == compute(before, &ip_before).unwrap() {
        prop_assert_eq!(field(after), compute(after, ip).unwrap());
    }
    Ok(())
}

fn same_but(before: &[u8], after: &[u8], changed: &[std::ops::Range<usize>]) -> Result<(), TestCaseError> {
    for (at, (old, new)) in before.iter().zip(after).enumerate() {
        prop_assert!(old == new || changed.iter().any(|range| range.contains(&at)), "byte {} changed", at);
    }
    Ok(())
}
