//! What processes hold.

use std::{collections::BTreeSet, fmt, fs, path::Path, process::Command};

use crate::kit::Daemon;

/// What a process holds.
#[derive(Debug, Clone)]
pub struct Usage {
    pub name: &'static str,
    /// Bytes in use.
    pub memory: u64,
    /// All but pipes.
    pub descriptors: usize,
    /// The relay keeps some for its next connections.
    pub pipes: usize,
    /// Sockets in its sockmaps.
    pub entries: u64,
}

impl Usage {
    pub fn of(name: &'static str, process: &Daemon) -> Self {
        let folder = fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
        let links = folder.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let (pipes, others): (Vec<_>, Vec<_>) =
            links.partition(|link| link.to_string_lossy().starts_with("pipe:"));
        let (descriptors, pipes) = (others.len(), pipes.len());
        Self { name, memory: process.memory(), descriptors, pipes, entries: entries(process.pid()) }
    }

    /// As many pipes as workers may keep, at two descriptors each.
    pub fn few_pipes(&self) -> bool {
        const KEPT: usize = 64;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        self.pipes <= 2 * KEPT * workers + 8
    }

    pub fn max(&self, other: Self) -> Self {
        Self {
            name: self.name,
            memory: self.memory.max(other.memory),
            descriptors: self.descriptors.max(other.descriptors),
            pipes: self.pipes.max(other.pipes),
            entries: self.entries.max(other.entries),
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, descriptors, pipes, entries, .. } = self;
        write!(
            f,
            "{:.1} MiB, {descriptors} descriptors and {pipes} of pipes",
            *memory as f64 / f64::from(1 << 20)
        )?;
        if *entries > 0 { write!(f, ", {entries} sockets in maps") } else { Ok(()) }
    }
}

/// How many sockets are in the sockhashes that a process holds.
fn entries(pid: u32) -> u64 {
    const SOCKHASH: &str = "18";
    let sockhashes = |info: &str| field(info, "map_type:").is_some_and(|kind| kind == SOCKHASH);
    let maps: BTreeSet<String> = descriptors(pid)
        .iter()
        .filter(|info| sockhashes(info))
        .filter_map(|info| field(info, "map_id:"))
        .collect();
    maps.iter().map(|id| count(id)).sum()
}

/// The numbers of the programs that a process holds, by themselves or by their links.
pub fn programs(process: &Daemon) -> BTreeSet<u32> {
    let infos = descriptors(process.pid());
    infos.iter().filter_map(|info| field(info, "prog_id:")).filter_map(|id| id.parse().ok()).collect()
}

/// Which of these programs the kernel still has.
pub fn still_loaded(programs: &BTreeSet<u32>) -> Vec<u32> {
    let loaded = aya::programs::loaded_programs().filter_map(Result::ok).map(|program| program.id());
    loaded.filter(|id| programs.contains(id)).collect()
}

/// What the kernel tells of each descriptor. One may be closed meanwhile.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    entries.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap_or_default()).collect()
}

fn field(info: &str, name: &str) -> Option<String> {
    info.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

fn count(map: &str) -> u64 {
    let output = Command::new("bpftool").args(["map", "dump", "id", map]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.trim_start().starts_with("key:")).count() as u64
}

/// The mounts are this run's own: whatever is pinned is its doing.
pub fn nothing_pinned() {
    let folder = Path::new("/sys/fs/bpf/underpass");
    let left = fs::read_dir(folder).map_or(0, Iterator::count);
    assert_eq!(left, 0, "{} is not empty", folder.display());
}
