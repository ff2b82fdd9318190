//! What the shortcut did, for `show` and for whoever else asks.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Serialize;
use underpass_abi::shortcut::{Group, Pair, Totals};
use underpass_logic::shortcut::Reason;

use super::plane::{Tables, is_inside};

/// Connections and bytes since the attachment, all in all and by group.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Summary {
    /// Everything.
    #[serde(flatten)]
    pub total: Figures,
    /// By control group and the server's port.
    pub groups: Vec<GroupFigures>,
}

/// The figures of one group.
#[derive(Debug, Default, Clone, Serialize)]
pub struct GroupFigures {
    /// The control group of the end that connected; absent if it is gone.
    pub cgroup: Option<PathBuf>,
    /// The server's port.
    pub port: u16,
    /// The figures.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Connections and bytes.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Figures {
    /// Connections that go from socket to socket now.
    pub accelerated_now: u64,
    /// Connections that were accelerated at some time, those that have ended included.
    pub accelerated: u64,
    /// Connections that never were, by reason, those that have ended included.
    pub left_alone: BTreeMap<&'static str, u64>,
    /// Bytes that went from socket to socket.
    pub redirected_bytes: u64,
    /// Bytes that went by TCP and were read.
    pub tcp_bytes: u64,
}

impl Summary {
    pub(super) fn of(tables: &Tables) -> Self {
        let mut groups: BTreeMap<(u64, u16), Figures> = BTreeMap::new();
        for (Group { cgroup, port, .. }, totals) in tables.totals() {
            groups.entry((cgroup, port)).or_default().add_ended(&totals);
        }
        for (_, pair) in tables.pairs() {
            groups.entry((pair.cgroup, pair.port)).or_default().add_live(&pair);
        }
        let mut summary = Self::default();
        let paths = cgroup_paths(groups.keys().map(|(cgroup, _)| *cgroup));
        for ((cgroup, port), figures) in groups {
            summary.total.add(&figures);
            let cgroup = paths.get(&cgroup).cloned();
            summary.groups.push(GroupFigures { cgroup, port, figures });
        }
        summary
    }
}

impl Figures {
    fn add_ended(&mut self, totals: &Totals) {
        self.accelerated += totals.accelerated;
        self.redirected_bytes += totals.redirected_bytes;
        self.tcp_bytes += totals.tcp_bytes;
        for (reason, count) in Reason::ALL.iter().zip(totals.left_alone) {
            if count > 0 {
                *self.left_alone.entry(reason.word()).or_default() += count;
            }
        }
    }

    fn add_live(&mut self, pair: &Pair) {
        let redirected: u64 = pair.ends.iter().map(|end| end.redirected).sum();
        let read: u64 = pair.ends.iter().map(|end| end.consumed).sum();
        self.accelerated_now += u64::from(is_inside(pair));
        self.redirected_bytes += redirected;
        self.tcp_bytes += read.saturating_sub(redirected);
        if redirected > 0 || is_inside(pair) {
            self.accelerated += 1;
        } else if let Some(reason) = Reason::ALL.get(pair.reason as usize) {
            *self.left_alone.entry(reason.word()).or_default() += 1;
        }
    }

    fn add(&mut self, other: &Self) {
        self.accelerated_now += other.accelerated_now;
        self.accelerated += other.accelerated;
        self.redirected_bytes += other.redirected_bytes;
        self.tcp_bytes += other.tcp_bytes;
        for (reason, count) in &other.left_alone {
            *self.left_alone.entry(reason).or_default() += count;
        }
    }
}

/// Where control groups are, by their numbers, which are their folders' inodes.
pub(super) fn cgroup_paths(wanted: impl Iterator<Item = u64>) -> BTreeMap<u64, PathBuf> {
    let wanted: std::collections::BTreeSet<u64> = wanted.collect();
    let mut found = BTreeMap::new();
    let mut folders = super::cgroup::root().into_iter().collect::<Vec<_>>();
    while let Some(folder) = folders.pop() {
        if found.len() == wanted.len() {
            break;
        }
        if let Some(inode) = inode(&folder).filter(|inode| wanted.contains(inode)) {
            found.insert(inode, folder.clone());
        }
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    found
}

fn inode(path: &Path) -> Option<u64> {
    Some(fs::metadata(path).ok()?.ino())
}
