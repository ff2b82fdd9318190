//! mux
use crate::run::load;
use underpass::object;
#[test]
fn the_verifier_spends_little_on_the_multiplexer() {
    let object = load(object::MUX);
    for (name, most) in [("mux_xdp", 100_000), ("mux_in", 300_000), ("mux_out", 180_000)] {
        let info = object.program(name).unwrap().info().unwrap();
        // Linux 5.16 and up tell.
        let Some(count) = info.verified_instruction_count() else { continue };
        println!("{name}: {count} instructions verified");
        assert!(count < most, "{name}: {count} instructions verified, expected fewer than {most}");
    }
}
