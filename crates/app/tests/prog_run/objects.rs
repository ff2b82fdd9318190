//! The verifier takes every program, those included that no other test here runs. What is
//! exported is for other loaders: dnsguard's tests load it.

use underpass::object;

use crate::run;

#[test]
fn every_xdp_and_tc_program_loads() {
    for (name, object) in [
        ("packet", object::PACKET),
        ("packet_peer", object::PACKET_PEER),
        ("mux", object::MUX),
        ("dnsguard", object::DNSGUARD),
        ("watch_gateway", object::WATCH_GATEWAY),
    ] {
        println!("{name}");
        run::load(object);
    }
}
