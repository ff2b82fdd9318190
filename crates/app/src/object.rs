//! The kernel objects that this binary carries, one per function.

macro_rules! object {
    ($name:literal) => {
        aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/", $name, ".o"))
    };
}

/// The relay's verdict program.
pub const RELAY: &[u8] = object!("relay");
/// The UDP multiplexer's programs.
pub const MUX: &[u8] = object!("mux");
/// The packet library alone, for its tests and benchmarks.
pub const PACKET: &[u8] = object!("packet");
/// watch's programs.
pub const WATCH: &[u8] = object!("watch");
/// watch's programs for what passes through an interface.
pub const WATCH_GATEWAY: &[u8] = object!("watch_gateway");
/// The shortcut's programs.
pub const SHORTCUT: &[u8] = object!("shortcut");
/// dnsguard's programs.
pub const DNSGUARD: &[u8] = object!("dnsguard");
