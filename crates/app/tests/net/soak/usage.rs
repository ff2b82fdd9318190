//! What processes hold.

use std::{collections::BTreeSet, fmt, fs, path::Path, process::Command};

use crate::kit::Daemon;

/// What a process holds.
#[derive(Debug, Clone)]
pub struct Usage {
    pub name: &'static str,
    /// Bytes in use.
    pub memory: u64,
    pub descriptors: usize,
    /// Sockets in its sockmaps.
    pub entries: u64,
}

impl Usage {
    pub fn of(name: &'static str, process: &Daemon) -> Self {
        let folder = format!("/proc/{}/fd", process.pid());
        let descriptors = fs::read_dir(folder).unwrap().count();
        Self { name, memory: process.memory(), descriptors, entries: entries(process.pid()) }
    }

    pub fn max(&self, other: Self) -> Self {
        Self {
            name: self.name,
            memory: self.memory.max(other.memory),
            descriptors: self.descriptors.max(other.descriptors),
            entries: self.entries.max(other.entries),
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, descriptors, entries, .. } = self;
        write!(f, "{:.1} MiB, {descriptors} descriptors", *memory as f64 / f64::from(1 << 20))?;
        if *entries > 0 { write!(f, ", {entries} sockets in maps") } else { Ok(()) }
    }
}

/// How many sockets are in the sockhashes that a process holds.
fn entries(pid: u32) -> u64 {
    const SOCKHASH: &str = "18";
    let mut maps = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap() {
        // A descriptor may be closed meanwhile.
        let info = fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        let field = |name| info.lines().find_map(|line: &str| line.strip_prefix(name)).map(str::trim);
        if field("map_type:") == Some(SOCKHASH) {
            maps.extend(field("map_id:").map(str::to_owned));
        }
    }
    maps.iter().map(|id| count(id)).sum()
}

fn count(map: &str) -> u64 {
    let output = Command::new("bpftool").args(["map", "dump", "id", map]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.trim_start().starts_with("key:")).count() as u64
}

/// The numbers of all programs of ours that are loaded.
pub fn programs() -> BTreeSet<u32> {
    let ours = |name: &str| {
        ["relay_", "mux_", "dnsguard_", "shortcut_", "watch_"].iter().any(|word| name.starts_with(word))
    };
    let loaded = aya::programs::loaded_programs().filter_map(Result::ok);
    loaded.filter(|program| program.name_as_str().is_some_and(ours)).map(|program| program.id()).collect()
}

/// The mounts are this run's own: whatever is pinned is its doing.
pub fn nothing_pinned() {
    let folder = Path::new("/sys/fs/bpf/underpass");
    let left = fs::read_dir(folder).map_or(0, Iterator::count);
    assert_eq!(left, 0, "{} is not empty", folder.display());
}
