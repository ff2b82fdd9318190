//! The kernel objects that this binary carries, one per function.

use aya::{EbpfError, programs::ProgramError};

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
/// The same on another library, to measure beside it.
pub const PACKET_PEER: &[u8] = object!("packet_peer");
/// watch's programs.
pub const WATCH: &[u8] = object!("watch");
/// watch's programs for what passes through an interface.
pub const WATCH_GATEWAY: &[u8] = object!("watch_gateway");
/// The shortcut's programs.
pub const SHORTCUT: &[u8] = object!("shortcut");
/// dnsguard's programs.
pub const DNSGUARD: &[u8] = object!("dnsguard");

/// dnsguard for other loaders.
pub const DNSGUARD_EXPORT: &[u8] = object!("dnsguard_export");

/// Why an object could not be loaded: aya's errors say the same on each of their levels.
pub(crate) fn root(error: EbpfError) -> anyhow::Error {
    anyhow::anyhow!("{}", anyhow::Error::from(error).root_cause())
}

/// Why the kernel did not load a program: the verifier's last word, not its whole log.
pub(crate) fn refusal(error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return error.into() };
    let log = verifier_log.to_string();
    let is_figure = |line: &&str| {
        ["processed ", "verification time", "stack depth"].iter().any(|figure| line.starts_with(figure))
    };
    match log.lines().rev().find(|line| !line.trim().is_empty() && !is_figure(line)) {
        Some(word) if word.starts_with("unknown func") => {
            anyhow::anyhow!("{io_error}: {word}: it takes a newer kernel")
        }
        Some(word) => anyhow::anyhow!("{io_error}: {word}"),
        None => io_error.into(),
    }
}
