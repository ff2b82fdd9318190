//! The relay's kernel path: two sockets joined by a verdict program.
//!
//! Each direction of a connection has a slot: one [`Progress`], which only the
//! program writes, and one [`Credit`], which only the user side writes. Both lie
//! in arrays that the user side maps into its memory, so that reading the one and
//! writing the other takes no system call.

use crate::pod;

/// What the program did with the bytes of one direction. A zeroed value is a
/// direction at rest; every count is since then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Progress {
    /// Bytes handed to the other socket by the kernel.
    pub redirected: u64,
    /// Bytes handed to the user side, as the other socket's queue was at its limit.
    pub passed: u64,
    /// Bytes cut off as they had arrived before (see `logic::relay::overlap`).
    pub trimmed: u64,
    /// Segments that carried bytes.
    pub segments: u64,
    /// The other socket's `write_seq` when the first byte came.
    pub base_seq: u32,
    /// The sequence number after the last byte seen; at first, after the last byte
    /// that the user side has read.
    pub last_end: u32,
    /// 1 once `base_seq` and `last_end` hold.
    pub started: u32,
    /// Not 0 where the stream cannot go on: one of the `BROKEN_*`.
    pub broken: u32,
    /// Keeps the size a multiple of the alignment without implicit padding.
    pub reserved: [u64; 2],
}

/// What the user side allows in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Credit {
    /// How many of the passed bytes the user side has written to the other socket.
    pub consumed: u64,
    /// How many redirected bytes may wait for room in the other socket's send
    /// buffer before the program passes what comes to the user side.
    pub cap: u64,
    /// Keeps the size a multiple of the alignment without implicit padding.
    pub reserved: [u64; 6],
}

/// A segment skipped bytes that had not arrived.
pub const BROKEN_GAP: u32 = 1;
/// The kernel refused to cut off repeated bytes.
pub const BROKEN_TRIM: u32 = 2;
/// The kernel refused to redirect.
pub const BROKEN_REDIRECT: u32 = 3;

/// Set in the ring buffer's events beside the slot where the direction broke;
/// without it bytes were passed to the user side.
pub const EVENT_BROKEN: u32 = 1 << 31;

pod!(Progress = 64, Credit = 64);
