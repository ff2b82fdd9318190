//! The packet library in the kernel does what it does on the host, packet by packet.

use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use underpass::object;
use underpass_logic::packet::{Unparsed, rewrite, udp::Datagram};

use crate::run::{Outcome, load, run};

#[path = "../../../logic/tests/packet/frames.rs"]
mod frames;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const TC_ACT_OK: u32 = 0;
const TC_ACT_SHOT: u32 = 2;

/// What `packet_port_*` does, on the host.
fn move_port(packet: &mut [u8]) -> Result<(), Unparsed> {
    let datagram = Datagram::parse(packet)?;
    let port = datagram.udp.payload(packet, 0)?;
    rewrite::udp_destination_port(packet, &datagram, u16::from_be_bytes(port))?;
    Ok(())
}

#[test]
fn xdp_and_tc_agree_with_the_host_on_generated_and_mutated_packets() {
    let mut object = load(object::PACKET);
    let mut runner = TestRunner::deterministic();
    let (mut moved, mut refused) = (0, 0);
    for _ in 0..2000 {
        for packet in [
            frames::frame().new_tree(&mut runner).unwrap().current(),
            frames::mutated().new_tree(&mut runner).unwrap().current(),
        ] {
            // The kernel runs no program on less than an Ethernet header.
            if packet.len() <= 14 {
                continue;
            }
            let mut expected = packet.clone();
            let result = move_port(&mut expected);
            let (xdp, tc) = match result {
                Ok(()) => (XDP_PASS, TC_ACT_OK),
                Err(_) => (XDP_DROP, TC_ACT_SHOT),
            };
            *(if result.is_ok() { &mut moved } else { &mut refused }) += 1;
            let got = run(&mut object, "packet_port_xdp", &packet);
            assert_eq!(
                got,
                Outcome { verdict: xdp, packet: expected.clone() },
                "{result:?} of {packet:02x?}"
            );
            // TC cannot be given a packet whose IP header is cut.
            if packet.len() >= 14 + 40 {
                let got = run(&mut object, "packet_port_tc", &packet);
                assert_eq!(got, Outcome { verdict: tc, packet: expected }, "{result:?} of {packet:02x?}");
            }
        }
    }
    assert!(moved > 500 && refused > 500, "{moved} moved, {refused} refused");
}

#[test]
fn the_verifier_spends_little_on_the_parser() {
    let object = load(object::PACKET);
    for (name, most) in [
        ("packet_pass_xdp", 10_000),
        ("packet_port_xdp", 15_000),
        ("packet_pass_tc", 60_000),
        ("packet_port_tc", 60_000),
    ] {
        let info = object.program(name).unwrap().info().unwrap();
        // Linux 5.16 and up tell.
        let Some(count) = info.verified_instruction_count() else { continue };
        println!("{name}: {count} instructions verified");
        assert!(count < most, "{name}: {count} instructions verified, expected fewer than {most}");
    }
}
