//! `underpass relay`: a TCP port forwarded to a target, directly or through a SOCKS5
//! proxy, or two clients paired with each other.
//!
//! - `front`: the port, who is let in, refused, told of, stopped; shared with mux;
//! - `origin`: who a client is by the PROXY protocol;
//! - `serve`: dials, pairs;
//! - `dial`: reaches a target;
//! - `worker`: threads that carry connections, by copy, splice or the kernel;
//! - `kernel`, `shared`: the kernel path's program and maps;
//! - `probe`: proves at start that the kernel path is sound here.

mod demo;
pub(crate) mod dial;
mod doctor;
pub(crate) mod engine;
pub(crate) mod front;
mod kernel;
pub(crate) mod origin;
mod pipe;
mod probe;
pub(crate) mod report;
mod serve;
pub(crate) mod settings;
mod shared;
pub(crate) mod tcp;
pub(crate) mod worker;

use std::io;

use crate::{
    live::{self, Told, text},
    status::Item,
};

pub(crate) use demo::scene;
pub(crate) use doctor::doctor;
pub(crate) use serve::run;
pub use settings::Args;

/// The relays that run, for `underpass status`.
pub(crate) fn status() -> anyhow::Result<Vec<Item>> {
    live::items("relay", |pid, told| Told {
        on: format!("{} -> {}", text(told, "listen"), text(told, "to")),
        why: format!("pid {pid}, {} open; kernel path {}", told["counts"]["open"], text(told, "kernel")),
    })
}

/// The data paths that a connection may use, as the user chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// What suits the connection; the kernel path only where it is proven.
    Auto {
        /// Whether the kernel path may be used.
        kernel: bool,
        /// For tests: change to any path each time so many bytes have moved.
        switch_every: Option<u64>,
    },
    /// The kernel path, and copy for what the kernel refuses.
    Kernel,
    /// Splice.
    Splice,
    /// Copy.
    Copy,
}

impl Choice {
    /// The same where the kernel path cannot be used.
    fn without_kernel(self) -> Self {
        match self {
            Self::Auto { switch_every, .. } => Self::Auto { kernel: false, switch_every },
            Self::Kernel | Self::Copy => Self::Copy,
            Self::Splice => Self::Splice,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Auto { .. } => "auto",
            Self::Kernel => "kernel",
            Self::Splice => "splice",
            Self::Copy => "copy",
        }
    }

    fn why(self) -> &'static str {
        match self {
            Self::Auto { .. } => "as all begin",
            Self::Kernel => "--path kernel",
            Self::Splice => "--path splice",
            Self::Copy => "--path copy",
        }
    }
}

/// Which side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that connected to the relay; of a pair, the first.
    Client,
    /// The one that the relay connected to; of a pair, the second.
    Target,
}

impl Side {
    fn of_slot(slot: u32) -> Self {
        if slot.is_multiple_of(2) { Self::Client } else { Self::Target }
    }
}

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// Both sides finished, and every byte was delivered.
    Closed,
    /// A side's socket failed, most often as it was reset; the other one was reset.
    Failed(Side, io::Error),
    /// The target could not be reached.
    Unreachable(io::Error),
    /// Nothing moved for the idle timeout.
    Idle,
    /// The relay was stopped.
    Stopped,
    /// The kernel path could not go on; both sides were reset. One of
    /// `abi::relay::BROKEN_*`.
    Broken(u32),
}

impl End {
    /// Whether both sides have to be told by a reset.
    fn is_a_failure(&self) -> bool {
        match self {
            Self::Failed(..) | Self::Unreachable(_) | Self::Broken(_) => true,
            Self::Closed | Self::Idle | Self::Stopped => false,
        }
    }
}
