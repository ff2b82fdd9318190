//! dnsguard's programs on built packets.

use underpass::object;

use crate::run::load;

#[test]
fn the_verifier_spends_little_on_the_guard() {
    let object = load(object::DNSGUARD);
    for (name, most) in [("dnsguard_xdp", 100_000), ("dnsguard_egress", 80_000), ("dnsguard_tc", 160_000)] {
        let info = object.program(name).unwrap().info().unwrap();
        // Linux 5.16 and up tell.
        let Some(count) = info.verified_instruction_count() else { continue };
        println!("{name}: {count} instructions verified");
        assert!(count < most, "{name}: {count} instructions verified, expected fewer than {most}");
    }
}
