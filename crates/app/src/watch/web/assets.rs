//! What the browser loads, and the database of countries: gzip in the binary.

// `FILES`: path, type, packed bytes. `COUNTRIES`: a packed database of the MaxMind format.
// Both are empty where the build found no npm.
include!(concat!(env!("OUT_DIR"), "/web_assets.rs"));

/// The file at a path.
pub fn find(path: &str) -> Option<(&'static str, &'static [u8])> {
    FILES.iter().find(|(name, ..)| *name == path).map(|(_, kind, packed)| (*kind, *packed))
}
