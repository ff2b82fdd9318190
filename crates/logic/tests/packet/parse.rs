//! Parsing: the same packets accepted, and the same fields found, as etherparse does.
//!
//! The library follows two VLAN tags and eight extension headers, treats a UDP length
//! of 0 as malformed, and does not look behind an IPv4 authentication header: there
//! alone they may differ.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use underpass_logic::packet::{
    Packet, Unparsed,
    ethernet::Frame,
    icmp::Quote,
    ip::{Address, Fragment, Ip, Ipv4, Version},
    tcp::Tcp,
    udp::{Datagram, Glance, Udp},
};

use crate::frames;

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, max_global_rejects: 200_000, ..ProptestConfig::default() })]

    #[test]
    fn whole_packets_have_etherparses_fields(frame in frames::frame()) {
        agree(&frame)?;
    }

    #[test]
    fn mutated_packets_have_etherparses_fields(frame in frames::mutated()) {
        agree(&frame)?;
    }

    #[test]
    fn anything_at_all_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        agree(&bytes)?;
    }

    #[test]
    fn icmp_errors_give_the_ports_that_they_quote(outer in frames::frame(), inner in frames::frame(), cut in 0..80usize) {
        quote(&outer, &inner, cut)?;
    }

    #[test]
    fn a_glance_tells_nothing_else_than_parsing_does(frame in prop_oneof![frames::frame(), frames::mutated()]) {
        glance(&frame)?;
    }
}

fn glance(bytes: &[u8]) -> Result<(), TestCaseError> {
    let glance = Glance::at(bytes);
    match Datagram::parse(bytes) {
        Ok(Datagram { udp: Udp { source_port, destination_port, .. }, .. }) => {
            let same = glance == Glance::Udp { source_port, destination_port };
            prop_assert!(
                same || glance == Glance::Unclear,
                "{glance:?}, not {source_port} to {destination_port}"
            );
        }
        Err(Unparsed::Fragment) => prop_assert_eq!(glance, Glance::Unclear),
        Err(Unparsed::OtherProtocol) => {
            let is_udp = matches!(glance, Glance::Udp { .. });
            prop_assert!(!is_udp);
        }
        Err(Unparsed::Short | Unparsed::Malformed | Unparsed::NotIp) => {}
    }
    Ok(())
}

fn agree(bytes: &[u8]) -> Result<(), TestCaseError> {
    let ours = Ip::parse(bytes);
    let theirs = SlicedPacket::from_ethernet(bytes);
    if differs_by_design(bytes) {
        return Ok(());
    }
    let ip = match (&ours, &theirs) {
        (Ok(ip), Ok(_)) => *ip,
        // Theirs goes on to the transport header, whose errors ours reports there.
        (Ok(ip), Err(_)) => {
            let no_transport = Udp::parse(bytes, ip).is_err() && Tcp::parse(bytes, ip).is_err();
            prop_assert!(no_transport, "they refuse {theirs:?}, we take {ip:?}");
            return Ok(());
        }
        (Err(Unparsed::NotIp), Ok(packet)) => {
            prop_assert!(!matches!(packet.net, Some(NetSlice::Ipv4(_) | NetSlice::Ipv6(_))));
            return Ok(());
        }
        (Err(_), Err(_)) => return Ok(()),
        (Err(why), Ok(packet)) => {
            prop_assert!(false, "we refuse as {why:?}, they take {packet:?}");
            return Ok(());
        }
    };
    let theirs = theirs.unwrap();
    same_ip(bytes, &ip, &theirs)?;
    same_transport(bytes, &ip, &theirs)
}

fn same_ip(bytes: &[u8], ip: &Ip, theirs: &SlicedPacket) -> Result<(), TestCaseError> {
    match theirs.net.as_ref().unwrap() {
        NetSlice::Ipv4(v4) => {
            let header = v4.header();
            prop_assert_eq!(ip.version, Version::V4);
            prop_assert_eq!(ip.hop_limit, header.ttl());
            prop_assert_eq!(ip.protocol, header.protocol().0);
            prop_assert_eq!(ip.source(bytes).unwrap(), Address::v4(header.source()));
            prop_assert_eq!(ip.destination(bytes).unwrap(), Address::v4(header.destination()));
            prop_assert_eq!(ip.fragment != Fragment::Whole, header.is_fragmenting_payload());
            let ours = Ipv4::read(bytes, ip.header).unwrap();
            prop_assert_eq!(ours.identification.get(), header.identification());
            prop_assert_eq!(ours.dont_fragment(), header.dont_fragment());
            prop_assert_eq!(ours.fragment_offset(), header.fragments_offset().value());
            prop_assert_eq!(ip.end, ip.header + usize::from(header.total_len()));
            same_payload(bytes, ip, v4.payload().payload)
        }
        NetSlice::Ipv6(v6) => {
            prop_assert_eq!(ip.version, Version::V6);
            prop_assert_eq!(ip.hop_limit, v6.header().hop_limit());
            prop_assert_eq!(ip.source(bytes).unwrap(), Address(v6.header().source()));
            prop_assert_eq!(ip.destination(bytes).unwrap(), Address(v6.header().destination()));
            prop_assert_eq!(ip.fragment != Fragment::Whole, v6.is_payload_fragmented());
            if ip.fragment == Fragment::Later {
                return Ok(());
            }
            prop_assert_eq!(ip.protocol, v6.payload().ip_number.0);
            same_payload(bytes, ip, v6.payload().payload)
        }
        NetSlice::Arp(_) => {
            prop_assert!(false, "ARP is not IP");
            Ok(())
        }
    }
}

fn same_payload(bytes: &[u8], ip: &Ip, theirs: &[u8]) -> Result<(), TestCaseError> {
    prop_assert_eq!(&bytes[ip.payload..ip.end], theirs);
    Ok(())
}

fn same_transport(bytes: &[u8], ip: &Ip, theirs: &SlicedPacket) -> Result<(), TestCaseError> {
    let (udp, tcp) = (Udp::parse(bytes, ip), Tcp::parse(bytes, ip));
    // A fragment's transport header is of no interest to theirs.
    if ip.fragment != Fragment::Whole {
        if ip.fragment == Fragment::Later {
            prop_assert!(udp.is_err() && tcp.is_err());
        }
        return Ok(());
    }
    match &theirs.transport {
        Some(TransportSlice::Udp(their)) => {
            let our = udp.unwrap();
            prop_assert_eq!(our.source_port, their.source_port());
            prop_assert_eq!(our.destination_port, their.destination_port());
            prop_assert_eq!(&bytes[our.payload_at()..our.end], their.payload());
            for (i, byte) in their.payload().iter().enumerate() {
                prop_assert_eq!(our.payload(bytes, i), Ok([*byte]));
            }
            prop_assert!(our.payload::<_, 1>(bytes, their.payload().len()).is_err());
            prop_assert_eq!(Datagram::parse(bytes), Ok(Datagram { ip: *ip, udp: our }));
        }
        Some(TransportSlice::Tcp(their)) => {
            let our = tcp.unwrap();
            prop_assert_eq!(our.source_port, their.source_port());
            prop_assert_eq!(our.destination_port, their.destination_port());
            prop_assert_eq!(our.flags & 0x3f, their.slice()[13] & 0x3f);
            prop_assert_eq!(&bytes[our.payload..our.end], their.payload());
        }
        Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_)) | None => {
            prop_assert!(udp.is_err() && tcp.is_err());
        }
    }
    Ok(())
}

/// The cases that the module's comment names.
fn differs_by_design(bytes: &[u8]) -> bool {
    let Ok(frame) = Frame::parse(bytes) else { return false };
    if matches!(frame.ether_type, 0x8100 | 0x88a8 | 0x9100) {
        return true;
    }
    // MACsec and what else theirs follows on the link.
    if !matches!(frame.ether_type, 0x0800 | 0x86dd) {
        return SlicedPacket::from_ethernet(bytes).is_ok_and(|theirs| theirs.net.is_some());
    }
    match Ip::parse(bytes) {
        Ok(ip) => {
            let authenticated = ip.version == Version::V4 && ip.protocol == 51;
            let no_length = ip.protocol == 17
                && Packet::bytes::<2>(bytes, ip.payload + 4).is_ok_and(|length| length == [0, 0]);
            authenticated || no_length
        }
        // A ninth extension header.
        Err(Unparsed::Malformed) => {
            SlicedPacket::from_ethernet(bytes).is_ok_and(|theirs| {
                matches!(theirs.net, Some(NetSlice::Ipv6(v6)) if v6.extensions().clone().into_iter().count() > 8)
            })
        }
        Err(_) => false,
    }
}

/// Quotes `inner` (without its Ethernet header, cut) in an ICMP error in `outer`.
fn quote(outer: &[u8], inner: &[u8], cut: usize) -> Result<(), TestCaseError> {
    let (outer_ip, inner_ip) = (Ip::parse(outer), Ip::parse(inner));
    let (Ok(outer_ip), Ok(inner_ip)) = (outer_ip, inner_ip) else { return Ok(()) };
    prop_assume!(outer_ip.payload == outer_ip.header + if outer_ip.version == Version::V4 { 20 } else { 40 });
    prop_assume!(outer_ip.fragment == Fragment::Whole);
    let (protocol, kind) = if outer_ip.version == Version::V4 { (1, 3) } else { (58, 1) };
    let mut packet = outer[..outer_ip.payload].to_vec();
    packet.extend([kind, 4, 0, 0, 0, 0, 0, 0]);
    let quoted = &inner[inner_ip.header..];
    packet.extend(&quoted[..quoted.len().saturating_sub(cut)]);
    let length = packet.len() - outer_ip.header;
    match outer_ip.version {
        Version::V4 => {
            packet[outer_ip.header + 9] = protocol;
            packet[outer_ip.header + 2..outer_ip.header + 4].copy_from_slice(&(length as u16).to_be_bytes());
        }
        Version::V6 => {
            packet[outer_ip.header + 6] = protocol;
            packet[outer_ip.header + 4..outer_ip.header + 6]
                .copy_from_slice(&((length - 40) as u16).to_be_bytes());
        }
    }
    let ip = Ip::parse(&packet[..]).unwrap();
    let got = Quote::parse(&packet[..], &ip);
    let headers = inner_ip.payload - inner_ip.header;
    let fits = quoted.len().saturating_sub(cut) >= headers + 4;
    if fits && matches!(inner_ip.protocol, 6 | 17) && inner_ip.fragment != Fragment::Later {
        let got = got.unwrap();
        let ports = |at: usize| u16::from_be_bytes(Packet::bytes(inner, inner_ip.payload + at).unwrap());
        prop_assert_eq!((got.kind, got.code), (kind, 4));
        prop_assert_eq!((got.source_port, got.destination_port), (ports(0), ports(2)));
        prop_assert_eq!(got.ip.source(&packet[..]), inner_ip.source(inner));
    } else {
        prop_assert!(got.is_err());
    }
    Ok(())
}
