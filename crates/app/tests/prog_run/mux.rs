//! The multiplexer's programs: every match and validation, hit and just missed.

use aya::{Ebpf, maps::PerCpuArray};
use underpass::{
    mux::{
        attach::put_table,
        datagram::{Default, Plan},
    },
    object,
};
use underpass_abi::mux::counter;
use underpass_logic::packet::{checksum, udp::Datagram};

use crate::run::{load, run};

const XDP: (&str, u32, u32) = ("mux_xdp", 2, 1);
/// `TC_ACT_PIPE` and `TC_ACT_SHOT`.
const TC: (&str, u32, u32) = ("mux_in", 3, 2);

fn plan(routes: &[&str], default: Default, length: &str) -> Plan {
    let routes: Vec<String> = routes.iter().map(|&route| route.to_owned()).collect();
    Plan::new(5000, &routes, default, Some(length.parse().unwrap())).unwrap()
}

fn loaded(plan: &Plan) -> Ebpf {
    let mut object = load(object::MUX);
    put_table(&mut object, plan, None).unwrap();
    object
}

/// A frame with a complete checksum, through this many VLAN tags.
fn frame(six: bool, tags: usize, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for _ in 0..tags {
        frame.extend([0x81, 0, 0, 7]);
    }
    let length = 8 + payload.len() as u16;
    if six {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([17, 64]);
        frame.extend([0xfd; 15].iter().chain(&[1]));
        frame.extend([0xfd; 15].iter().chain(&[2]));
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + length).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    frame.extend([0x9c, 0x40]);
    frame.extend(port.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    let (at, sum) = right_checksum(&frame);
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// Where the checksum is, and what it has to be.
fn right_checksum(frame: &[u8]) -> (usize, u16) {
    let datagram = Datagram::parse(frame).unwrap();
    let at = datagram.udp.header + 6;
    let mut blank = frame.to_vec();
    blank[at..at + 2].fill(0);
    match checksum::compute(blank.as_slice(), &datagram.ip).unwrap() {
        0 => (at, 0xffff),
        sum => (at, sum),
    }
}

fn port_of(frame: &[u8]) -> u16 {
    Datagram::parse(frame).unwrap().udp.destination_port
}

fn counted(object: &mut Ebpf, index: u32) -> u64 {
    let counters: PerCpuArray<_, u64> = object.map_mut("COUNTERS").unwrap().try_into().unwrap();
    counters.get(&index, 0).unwrap().iter().sum()
}

fn payload(tag: &str, offset: usize, length: usize) -> Vec<u8> {
    let mut payload: Vec<u8> = (0..length).map(|i| i as u8 | 0x80).collect();
    let end = length.min(offset + tag.len());
    payload[offset..end].copy_from_slice(&tag.as_bytes()[..end - offset]);
    payload
}

#[test]
fn hits_move_and_near_misses_do_not() {
    let plan = plan(
        &["@20:600=5001", "@20:601=5002", "@0:0x00ff=5003", "@286:last=5004"],
        Default::Drop,
        "290..=294",
    );
    let cases = [
        (payload("600", 20, 290), Ok(5001), 0),
        (payload("601", 20, 294), Ok(5002), 1),
        (payload("\0\u{ff}", 0, 290), Err(()), counter::NO_ROUTE),
        ([&[0, 0xff][..], &payload("", 0, 290)].concat(), Ok(5003), 2),
        (payload("last", 286, 290), Ok(5004), 3),
        (payload("last", 287, 291), Err(()), counter::NO_ROUTE),
        (payload("600", 19, 290), Err(()), counter::NO_ROUTE),
        (payload("600", 21, 290), Err(()), counter::NO_ROUTE),
        (payload("602", 20, 290), Err(()), counter::NO_ROUTE),
        (payload("600", 20, 289), Err(()), counter::WRONG_LENGTH),
        (payload("600", 20, 295), Err(()), counter::WRONG_LENGTH),
    ];
    for (program, pass, drop) in [XDP, TC] {
        let mut object = loaded(&plan);
        for six in [false, true] {
            for tags in 0..=2 {
                for (payload, expected, count) in &cases {
                    let packet = frame(six, tags, 5000, payload);
                    let before = counted(&mut object, *count);
                    let got = run(&mut object, program, &packet);
                    let what = format!("{program}, IPv6 {six}, {tags} tags, {expected:?}");
                    assert_eq!(counted(&mut object, *count), before + 1, "{what}");
                    match expected {
                        Ok(port) => {
                            assert_eq!((got.verdict, port_of(&got.packet)), (pass, *port), "{what}");
                            let (at, right) = right_checksum(&got.packet);
                            assert_eq!(got.packet[at..at + 2], right.to_be_bytes(), "{what}");
                        }
                        Err(()) => assert_eq!((got.verdict, got.packet == packet), (drop, true), "{what}"),
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_not_for_the_port_passes_untouched() {
    for (program, pass, _) in [XDP, TC] {
        let mut object = loaded(&plan(&["@0:a=5001"], Default::Drop, ".."));
        let mut tcp = frame(false, 0, 5000, b"a----------------");
        tcp[23] = 6;
        let mut later = frame(false, 0, 5000, b"a");
        later[20..22].copy_from_slice(&[0, 9]); // a fragment that is not the first
        for packet in [frame(false, 0, 4999, b"a"), frame(true, 0, 5001, b"a")] {
            let got = run(&mut object, program, &packet);
            assert_eq!((got.verdict, got.packet == packet), (pass, true), "{program}");
        }
        for packet in [tcp, later] {
            let got = run(&mut object, program, &packet);
            assert_eq!((got.verdict, got.packet == packet), (pass, true), "{program}");
        }
        let total: u64 = (0..counter::COUNT).map(|index| counted(&mut object, index)).sum();
        assert_eq!(total, 0);
    }
}

#[test]
fn the_default_passes_drops_or_sends_on() {
    for (program, pass, drop) in [XDP, TC] {
        for (default, verdict, port, count) in [
            (Default::Pass, pass, 5000, counter::PASSED),
            (Default::Drop, drop, 5000, counter::NO_ROUTE),
            (Default::Port(5009), pass, 5009, counter::DEFAULT),
        ] {
            let mut object = loaded(&plan(&["@0:a=5001"], default, ".."));
            let got = run(&mut object, program, &frame(false, 0, 5000, b"b"));
            assert_eq!((got.verdict, port_of(&got.packet)), (verdict, port), "{program} {default}");
            assert_eq!(counted(&mut object, count), 1);
        }
    }
}

#[test]
fn a_first_fragment_is_judged_by_the_whole_length_and_dropped_if_it_lacks_the_tag() {
    for (program, pass, drop) in [XDP, TC] {
        let mut object = loaded(&plan(&["@4:tag=5001", "@3000:tag=5002"], Default::Drop, "2900..=3100"));
        let mut first = frame(false, 0, 5000, &payload("tag", 4, 1000));
        first[20] = 0x20; // more fragments follow
        first[38..40].copy_from_slice(&3058_u16.to_be_bytes());
        let got = run(&mut object, program, &first);
        assert_eq!((got.verdict, port_of(&got.packet)), (pass, 5001), "{program}");
        first[34 + 8 + 4] = b'-';
        assert_eq!(run(&mut object, program, &first).verdict, drop);
        assert_eq!(counted(&mut object, counter::FRAGMENT), 1);
    }
}

#[test]
fn a_zero_checksum_stays_zero() {
    for (program, pass, _) in [XDP, TC] {
        let mut object = loaded(&plan(&["@0:a=5001"], Default::Drop, ".."));
        let mut packet = frame(false, 0, 5000, b"a");
        packet[40..42].fill(0);
        let got = run(&mut object, program, &packet);
        assert_eq!((got.verdict, port_of(&got.packet)), (pass, 5001));
        assert_eq!(got.packet[40..42], [0, 0], "{program}");
    }
}

#[test]
fn routes_of_many_shapes_are_found_in_their_order() {
    let routes: Vec<String> = (0..1024)
        .map(|i| format!("@{}:{}{i:04}={}", i % 32 * 3, "x".repeat(i % 2 * 9), 10_000 + i))
        .collect();
    let plan = Plan::new(5000, &routes, Default::Drop, None).unwrap();
    for (program, pass, drop) in [XDP, TC] {
        let mut object = loaded(&plan);
        for i in (0..1024).step_by(7) {
            let tag = format!("{}{i:04}", "x".repeat(i % 2 * 9));
            let got = run(&mut object, program, &frame(i % 3 == 0, 0, 5000, &payload(&tag, i % 32 * 3, 150)));
            assert_eq!((got.verdict, usize::from(port_of(&got.packet))), (pass, 10_000 + i));
            let got = run(&mut object, program, &frame(false, 0, 5000, &payload(&tag, i % 32 * 3 + 1, 150)));
            assert_eq!(got.verdict, drop);
        }
    }
}

#[test]
fn replies_leave_with_the_port_that_was_spoken_to() {
    for six in [false, true] {
        let mut object = loaded(&plan(&["@0:a=5001"], Default::Drop, ".."));
        let there = run(&mut object, "mux_in", &frame(six, 0, 5000, b"a")).packet;
        // The answer: addresses and ports the other way round.
        let (ip, each) = if six { (22, 16) } else { (26, 4) };
        let mut back = there.clone();
        back[ip..ip + each].copy_from_slice(&there[ip + each..ip + 2 * each]);
        back[ip + each..ip + 2 * each].copy_from_slice(&there[ip..ip + each]);
        let udp = ip + 2 * each;
        back[udp..udp + 2].copy_from_slice(&there[udp + 2..udp + 4]);
        back[udp + 2..udp + 4].copy_from_slice(&there[udp..udp + 2]);
        let got = run(&mut object, "mux_out", &back).packet;
        let datagram = Datagram::parse(got.as_slice()).unwrap();
        assert_eq!((datagram.udp.source_port, datagram.udp.destination_port), (5000, 40_000), "IPv6 {six}");
        let (at, right) = right_checksum(&got);
        assert_eq!(got[at..at + 2], right.to_be_bytes(), "IPv6 {six}");
        assert_eq!(counted(&mut object, counter::REPLIES), 1);
        // Another client's is nobody's business.
        back[udp + 3] ^= 1;
        assert_eq!(run(&mut object, "mux_out", &back).packet, back);
    }
}

#[test]
fn the_verifier_spends_little_on_the_multiplexer() {
    let object = load(object::MUX);
    for (name, most) in [("mux_xdp", 150_000), ("mux_in", 120_000), ("mux_out", 180_000)] {
        let info = object.program(name).unwrap().info().unwrap();
        // Linux 5.16 and up tell.
        let Some(count) = info.verified_instruction_count() else { continue };
        println!("{name}: {count} instructions verified");
        assert!(count < most, "{name}: {count} instructions verified, expected fewer than {most}");
    }
}
