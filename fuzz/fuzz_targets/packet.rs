//! Whatever the bytes: nothing panics, what is parsed lies within the packet, and what
//! etherparse finds too is the same.
#![no_main]

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use libfuzzer_sys::fuzz_target;
use underpass_logic::packet::{
    icmp::Quote,
    ip::{Address, Ip},
    rewrite,
    tcp::Tcp,
    udp::{Datagram, Udp},
};

fuzz_target!(|bytes: &[u8]| {
    let Ok(ip) = Ip::parse(bytes) else { return };
    assert!(ip.payload <= ip.end && ip.end <= bytes.len());
    let _ = Quote::parse(bytes, &ip);
    if let Ok(tcp) = Tcp::parse(bytes, &ip) {
        assert!(tcp.payload <= tcp.end && tcp.end <= bytes.len());
    }
    if let Ok(udp) = Udp::parse(bytes, &ip) {
        assert!(udp.payload_at() <= udp.end && udp.end <= bytes.len());
        let mut changed = bytes.to_vec();
        let datagram = Datagram { ip, udp };
        let packet = changed.as_mut_slice();
        rewrite::udp_destination_port(packet, &datagram, 4242).expect("it was parsed");
        rewrite::udp_destination_port(packet, &datagram, udp.destination_port).expect("it was parsed");
        assert_eq!(Datagram::parse(packet), Ok(datagram));
    }
    compare(bytes, &ip);
});

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
