//! Local connections that go from socket to socket.
//!
//! A connection is a [`Pair`] of ends. It is named by the [`Key`] of the end that
//! connected; the end that accepted has the mirrored key.

/// The end that connected, in [`Pair::ends`].
pub const CLIENT: u32 = 0;
/// The end that accepted.
pub const SERVER: u32 = 1;

/// Names one end of a TCP connection, unambiguously on the whole host.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The cookie of the network namespace.
    pub namespace: u64,
    /// The address of this end as IPv6; IPv4 is mapped (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2).
    pub local: [u8; 16],
    /// The address of the other end, likewise.
    pub remote: [u8; 16],
    /// The port of this end, big-endian.
    pub local_port: [u8; 2],
    /// The port of the other end, big-endian.
    pub remote_port: [u8; 2],
    zero: [u8; 4],
}

impl Key {
    /// The key of the end at `local`, whose other end is at `remote`.
    #[inline(always)]
    pub const fn new(namespace: u64, local: ([u8; 16], u16), remote: ([u8; 16], u16)) -> Self {
        Self {
            namespace,
            local: local.0,
            remote: remote.0,
            local_port: local.1.to_be_bytes(),
            remote_port: remote.1.to_be_bytes(),
            zero: [0; 4],
        }
    }

    /// The key of the other end.
    #[inline(always)]
    #[must_use]
    pub const fn mirrored(&self) -> Self {
        Self {
            namespace: self.namespace,
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
            zero: [0; 4],
        }
    }
}

/// An IPv4 address as [`Key`] holds it.
#[inline(always)]
pub const fn mapped(ip: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3]]
}

/// What is known of a socket in scope, kept in the socket itself.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// The name of its pair.
    pub pair: Key,
    /// [`CLIENT`] or [`SERVER`].
    pub side: u32,
    /// Room up to a multiple of eight bytes.
    pub zero: u32,
}

/// Both ends of a connection.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Pair {
    /// The end that connected, and the one that accepted.
    pub ends: [End; 2],
    /// The control group of the end that connected (its number in cgroup v2).
    pub cgroup: u64,
    /// How many of its sockets are closed.
    pub ended: u64,
    /// How reading alternates between the ends.
    pub rhythm: Rhythm,
    /// What is being done about the pair: `STAGE_*`.
    pub stage: u32,
    /// Why it is left alone: a number of `logic::shortcut::Reason`.
    pub reason: u32,
    /// The server's port.
    pub port: u16,
    /// Room up to a multiple of eight bytes.
    pub zero: [u8; 6],
}

/// Observed, and left to TCP.
pub const STAGE_WATCHED: u32 = 0;
/// Worth a shortcut: to be put into the map.
pub const STAGE_ASKED: u32 = 1;
/// To be taken out of the map, or not put in.
pub const STAGE_LEAVING: u32 = 2;

/// One end. Counts of bytes begin when the connection is established.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct End {
    /// Bytes it sent past TCP. Written under the socket's lock only.
    pub redirected: u64,
    /// Bytes it read.
    pub consumed: u64,
    /// Where in the stream of what it sends the last redirected byte ends.
    pub mark: u64,
    /// The sequence number of the first byte it sends.
    pub first: u32,
    /// The sequence number of the first byte it expects.
    pub expects: u32,
    /// Small messages it redirected since the other end last had read everything, or
    /// [`BY_TCP`].
    pub streak: u32,
    /// How often it read something.
    pub reads: u32,
    /// Whether its socket is in the map, and may be redirected to: `GATE_*`.
    pub gate: u32,
    /// The number of reads from which on it may be redirected to.
    pub opens_at: u32,
    /// How it was seen to read: bits `HABIT_*`.
    pub habits: u32,
    /// Room up to a multiple of eight bytes.
    pub zero: u32,
}

/// In [`End::streak`]: what it sent last went by TCP.
pub const BY_TCP: u32 = u32::MAX;

/// Not in the map.
pub const GATE_OUT: u32 = 0;
/// In the map.
pub const GATE_IN: u32 = 1;
/// In the map until what was redirected is read.
pub const GATE_LEAVING: u32 = 2;

/// It waits inside of recv.
pub const HABIT_BLOCKS: u32 = 1;
/// It asks for MSG_WAITALL.
pub const HABIT_WAITS_FOR_ALL: u32 = 2;
/// It reads out-of-band data.
pub const HABIT_URGENT: u32 = 4;

/// How reading alternates between the ends of a pair. A turn begins when the end
/// reads that did not read last.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rhythm {
    /// Turns in a row that looked like a request or its response.
    pub turns: u32,
    /// The end that read last plus 1; 0 before the first read.
    pub reader: u32,
    /// Reads in this turn.
    pub reads: u32,
    /// Bytes in this turn.
    pub bytes: u32,
    /// Turns that it takes to earn the shortcut.
    pub needed: u32,
    /// Room up to a multiple of eight bytes.
    pub zero: u32,
}

/// What connections that ended did, by control group and port.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group {
    /// The control group's number in cgroup v2; 0 if unknown.
    pub cgroup: u64,
    /// The server's port.
    pub port: u16,
    /// Room up to a multiple of eight bytes.
    pub zero: [u8; 6],
}

/// Reasons that [`Totals::left_alone`] has room for.
pub const REASONS: usize = 16;

/// Sums over the ended connections of a [`Group`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Connections of which bytes were redirected.
    pub accelerated: u64,
    /// Connections that were left to TCP from beginning to end, by reason.
    pub left_alone: [u64; REASONS],
    /// Bytes that went from socket to socket.
    pub redirected_bytes: u64,
    /// Bytes that went by TCP and were read.
    pub tcp_bytes: u64,
}

/// What the user side tells the programs, and its other processes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Control {
    /// Not 0: nothing more is accelerated, and what is in the map leaves it.
    pub closing: u32,
    /// The process that puts sockets into the map and takes them out.
    pub helper: u32,
    /// When that process started, in clock ticks since the system did (field 22 of /proc/PID/stat).
    pub helper_started: u64,
    /// Habits that the user accepts, bits `HABIT_*`.
    pub accepted: u32,
    /// Room up to a multiple of eight bytes.
    pub zero: u32,
}

/// After a pass: sockets that could not enter the map yet, as they had bytes to read.
pub const LEFT_TO_ENTER: u32 = 0;
/// After a pass: sockets that could not leave the map yet, as they have redirected bytes to read.
pub const LEFT_TO_READ: u32 = 1;

crate::pod!(Key = 48, Member = 56, Pair = 168, End = 56, Rhythm = 24, Group = 16, Totals = 152, Control = 24,);

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 16] = mapped([127, 0, 0, 1]);

    #[test]
    fn ports_do_not_swap_their_bytes() {
        let low = Key::new(1, (A, 0x0001), (A, 0x0100));
        let high = Key::new(1, (A, 0x0100), (A, 0x0001));
        assert_ne!(low, high);
        assert_eq!(low.mirrored(), high);
        assert_eq!(low.local_port, [0, 1]);
    }

    #[test]
    fn mirroring_twice_is_nothing() {
        let key = Key::new(7, (A, 80), (mapped([127, 0, 0, 2]), 50_000));
        assert_eq!(key.mirrored().mirrored(), key);
        assert_ne!(key.mirrored(), key);
    }

    #[test]
    fn families_and_namespaces_are_told_apart() {
        let one = core::array::from_fn(|i| u8::from(i == 15));
        let v6 = Key::new(1, (one, 80), (one, 81));
        let v4 = Key::new(1, (mapped([0, 0, 0, 1]), 80), (mapped([0, 0, 0, 1]), 81));
        assert_ne!(v6, v4);
        assert_ne!(v6, Key::new(2, (one, 80), (one, 81)));
    }
}
