//! What is logged about connections.

use std::{
    fmt,
    net::SocketAddr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use serde_json::json;
use tracing::{info, warn};
use underpass_logic::relay::Path;

use super::{
    End, Side,
    worker::{Bytes, Report},
};

/// Counts of a relay since it started.
#[derive(Debug, Default)]
pub struct Counts {
    pub open: AtomicUsize,
    pub finished: AtomicU64,
    pub failed: AtomicU64,
    pub refused: AtomicU64,
    bytes: [AtomicU64; 3],
}

impl Counts {
    /// Adds a finished connection.
    pub fn add(&self, report: &Report) {
        self.finished.fetch_add(1, Ordering::Relaxed);
        if report.end.is_a_failure() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        for Bytes { copy, splice, kernel } in report.bytes {
            for (sum, bytes) in self.bytes.iter().zip([copy, splice, kernel]) {
                sum.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    /// The summary that is logged now and then.
    pub fn log(&self) {
        info!(
            open = self.open.load(Ordering::Relaxed),
            finished = self.finished.load(Ordering::Relaxed),
            failed = self.failed.load(Ordering::Relaxed),
            refused = self.refused.load(Ordering::Relaxed),
            copy_bytes = self.bytes[0].load(Ordering::Relaxed),
            splice_bytes = self.bytes[1].load(Ordering::Relaxed),
            kernel_bytes = self.bytes[2].load(Ordering::Relaxed),
            "summary"
        );
    }

    /// The same for `underpass status`. Bytes are those of finished connections.
    pub fn describe(&self) -> serde_json::Value {
        json!({
            "open": self.open.load(Ordering::Relaxed),
            "finished": self.finished.load(Ordering::Relaxed),
            "failed": self.failed.load(Ordering::Relaxed),
            "refused": self.refused.load(Ordering::Relaxed),
            "copy_bytes": self.bytes[0].load(Ordering::Relaxed),
            "splice_bytes": self.bytes[1].load(Ordering::Relaxed),
            "kernel_bytes": self.bytes[2].load(Ordering::Relaxed),
        })
    }
}

/// Logs the line of a finished connection.
pub fn log(client: SocketAddr, target: &str, report: &Report, took: Duration) {
    let [sent, received] = report.bytes;
    let (path, why, end) = (word(report.path), &report.why, report.end.to_string());
    let paths = Paths(report.bytes);
    info!(
        %client, target, path, why, sent = sent.total(), received = received.total(), %paths,
        switches = report.switches, duration = ?took, end, "connection"
    );
}

/// Logs a connection that got no target.
pub fn log_unreached(client: SocketAddr, target: &str, error: &dyn fmt::Display, took: Duration) {
    warn!(%client, target, duration = ?took, end = error.to_string(), "connection");
}

/// The path's word on the command line.
pub fn word(path: Path) -> &'static str {
    match path {
        Path::Copy => "copy",
        Path::Splice => "splice",
        Path::Kernel => "kernel",
    }
}

/// Bytes by path, both ways together, those that moved any.
struct Paths([Bytes; 2]);

impl fmt::Display for Paths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.0;
        let all =
            [("copy", a.copy + b.copy), ("splice", a.splice + b.splice), ("kernel", a.kernel + b.kernel)];
        let mut first = true;
        for (word, bytes) in all.into_iter().filter(|(_, bytes)| *bytes > 0) {
            write!(f, "{}{word}:{bytes}", if first { "" } else { "," })?;
            first = false;
        }
        if first { f.write_str("none") } else { Ok(()) }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Failed(side, error) => write!(f, "{side}: {error}"),
            Self::Unreachable(error) => write!(f, "cannot connect: {error}"),
            Self::Idle => f.write_str("idle"),
            Self::Stopped => f.write_str("stopped"),
            Self::Broken(reason) => write!(f, "the kernel path could not go on (reason {reason})"),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Target => "target",
        })
    }
}
