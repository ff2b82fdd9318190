//! Whatever the bytes: nothing panics, what is parsed lies within the packet and is
//! what etherparse finds, and a rewrite changes what it says and keeps a right
//! checksum right.
#![no_main]

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use libfuzzer_sys::fuzz_target;
use underpass_logic::packet::{
    checksum::compute,
    icmp::{Header, Quote},
    ip::{Address, Fragment, Ip},
    rewrite,
    tcp::Tcp,
    udp::{Datagram, Udp},
};

fuzz_target!(|bytes: &[u8]| {
    // The ports to rewrite to come last, so that frames may be seeds as they are.
    let Some((frame, ports)) = bytes.split_last_chunk::<4>() else { return };
    let [a, b, c, d] = *ports;
    let (source, destination) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let Ok(ip) = Ip::parse(frame) else { return };
    assert!(ip.payload <= ip.end && ip.end <= frame.len());
    udp(frame, source, destination);
    tcp(frame, &ip, source, destination);
    quote(frame, &ip, source, destination);
    compare(frame, &ip);
});

fn udp(frame: &[u8], source: u16, destination: u16) {
    let Ok(before) = Datagram::parse(frame) else { return };
    let field = before.udp.header + Udp::CHECKSUM;
    assert!(before.udp.payload_at() <= before.udp.end && before.udp.end <= before.ip.end);
    let mut packet = right(frame, &before.ip, field);
    rewrite::udp_source_port(&mut packet[..], &before, source).unwrap();
    rewrite::udp_destination_port(&mut packet[..], &before, destination).unwrap();
    let after = Datagram::parse(&packet[..]).unwrap();
    assert_eq!((after.udp.source_port, after.udp.destination_port), (source, destination));
    assert_eq!(after.udp.end, before.udp.end);
    expect_right(&packet, &before.ip, field);
    // And back again to what it was.
    rewrite::udp_source_port(&mut packet[..], &before, before.udp.source_port).unwrap();
    rewrite::udp_destination_port(&mut packet[..], &before, before.udp.destination_port).unwrap();
    assert_eq!(Datagram::parse(&packet[..]), Ok(before));
}

fn tcp(frame: &[u8], ip: &Ip, source: u16, destination: u16) {
    let Ok(before) = Tcp::parse(frame, ip) else { return };
    let field = before.header + Tcp::CHECKSUM;
    assert!(before.payload <= before.end && before.end <= ip.end);
    let mut packet = right(frame, ip, field);
    rewrite::tcp_source_port(&mut packet[..], ip, &before, source).unwrap();
    rewrite::tcp_destination_port(&mut packet[..], ip, &before, destination).unwrap();
    let after = Tcp::parse(&packet[..], ip).unwrap();
    assert_eq!((after.source_port, after.destination_port), (source, destination));
    expect_right(&packet, ip, field);
}

fn quote(frame: &[u8], ip: &Ip, source: u16, destination: u16) {
    let Ok(before) = Quote::parse(frame, ip) else { return };
    let field = before.header + Header::CHECKSUM;
    let mut packet = right(frame, ip, field);
    rewrite::quoted_source_port(&mut packet[..], ip, &before, source).unwrap();
    rewrite::quoted_destination_port(&mut packet[..], ip, &before, destination).unwrap();
    let after = Quote::parse(&packet[..], ip).unwrap();
    assert_eq!((after.source_port, after.destination_port), (source, destination));
    expect_right(&packet, ip, field);
}

/// The same packet with the right checksum, which random bytes never have.
fn right(frame: &[u8], ip: &Ip, field: usize) -> Vec<u8> {
    let mut packet = frame.to_vec();
    if let Ok(checksum) = compute(frame, ip) {
        packet[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

fn expect_right(packet: &[u8], ip: &Ip, field: usize) {
    // A fragment's checksum covers what is elsewhere.
    if ip.fragment == Fragment::Whole {
        let checksum = compute(packet, ip).unwrap();
        assert_eq!(packet[field..field + 2], checksum.to_be_bytes());
    }
}

fn compare(bytes: &[u8], ip: &Ip) {
    let Ok(theirs) = SlicedPacket::from_ethernet(bytes) else { return };
    match &theirs.net {
        Some(NetSlice::Ipv4(v4)) => {
            assert_eq!(ip.source(bytes), Ok(Address::v4(v4.header().source())));
            assert_eq!(ip.hop_limit, v4.header().ttl());
        }
        Some(NetSlice::Ipv6(v6)) => {
            assert_eq!(ip.source(bytes), Ok(Address(v6.header().source())));
            assert_eq!(ip.hop_limit, v6.header().hop_limit());
        }
        Some(NetSlice::Arp(_)) | None => return,
    }
    if let (Some(TransportSlice::Udp(theirs)), Ok(ours)) = (&theirs.transport, Udp::parse(bytes, ip)) {
        assert_eq!(ours.source_port, theirs.source_port());
        assert_eq!(&bytes[ours.payload_at()..ours.end], theirs.payload());
    }
}
