//! The rules by which the relay's kernel path keeps every byte once and in order.
//!
//! A direction is carried by two parties: the program redirects a segment to the
//! other socket, or passes it to the user side, which writes it there. The
//! invariants:
//!
//! 1. While the user side owes bytes (`passed != consumed`) the program passes all
//!    that comes: nothing overtakes.
//! 2. The user side writes passed bytes only when all redirected before them are in
//!    the other socket's send queue ([`may_write`]): nothing is overtaken.
//! 3. At most `cap` redirected bytes wait outside the other socket's send queue: a
//!    reader that stops fills that, then the user side's socket, and then its
//!    sender is stopped by TCP itself.
//! 4. Where the user side owes more than a receive queue takes, it stops the sender
//!    ([`must_stop`]): some of that is charged to no socket, and TCP would not.
//! 5. A direction is shut down only when every byte is in the other socket's send
//!    queue ([`is_drained`]).
//! 6. The user side is told of passed bytes where it may have seen that it owes nothing
//!    and sleep ([`news`]): nothing waits for somebody who does not know.

use underpass_abi::relay::{Credit, Progress};

/// What becomes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// To the other socket, by the kernel.
    Redirect,
    /// To the user side.
    Pass,
}

/// What the user side has to hear of a segment that was passed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Nothing: it still owes earlier bytes, and will find these behind them.
    None,
    /// That there is something: it may have seen that it owes nothing.
    Arrived,
    /// That it owes so much that it should look whether to [stop the sender](must_stop).
    Much,
}

/// How many leading bytes of a segment arrived before, and whether it leaves a gap.
///
/// A sockmap shows a program whole segments. TCP's own reader skips what was read
/// before; a program has to, or bytes would be delivered twice. It happens to the
/// first segment, if the user side has read a part of it before the socket was
/// joined, and once in a while later: a retransmission that met a busy socket begins
/// before the previous segment's end (seen on 6.18).
///
/// `seq` is the sequence number of the segment's first byte, host byte order.
///
/// # Errors
/// [`Gap`] where the segment begins after the previous one's end.
#[inline(always)]
pub fn overlap(progress: &Progress, seq: u32) -> Result<u32, Gap> {
    // Sequence numbers wrap; the difference tells before from after (RFC 9293, 3.4).
    let ahead = progress.last_end.wrapping_sub(seq) as i32;
    if ahead < 0 { Err(Gap) } else { Ok(ahead as u32) }
}

/// A segment that begins after the previous one's end. TCP delivers in order, so
/// this means that the program does not see every segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap;

/// What is left free in a send queue, in bytes.
const SPARE: u32 = 64 << 10;
/// How many times its size a segment may take in a send queue: the kernel enters it
/// fragment by fragment, and each may begin a segment of its own, which takes 2 KiB more
/// than its bytes. Tiny ones take more, but then few are on their way at a time.
const OVERHEAD: u32 = 8;

/// The other socket's send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendQueue {
    /// The sequence number after its last byte.
    pub write_seq: u32,
    /// How many bytes of memory may still enter it.
    pub room: u32,
    /// What has come in at that socket is passed to the user side and not written yet.
    pub owed: bool,
}

/// Decides about a segment of `len` new bytes.
///
/// What is redirected has to fit into the send queue now, and nothing is redirected to a
/// socket of which the user side owes bytes. The kernel keeps what goes out of a socket
/// in one line with what the program passes from it, and charges neither to the socket
/// (seen on 6.18): bytes that cannot go out, or only slowly, hold up those that came in,
/// for ever if the server reads only once its answers are taken, and TCP goes on taking
/// from their sender whatever comes (200 MB a second were seen).
#[inline(always)]
pub fn decide(progress: &Progress, credit: &Credit, queue: &SendQueue, len: u32) -> Verdict {
    if progress.passed != credit.consumed {
        return Verdict::Pass;
    }
    let room = (queue.room.saturating_sub(SPARE) / OVERHEAD) as u64;
    let most = if room < credit.cap { room } else { credit.cap };
    if queue.owed || waiting(progress, credit, queue.write_seq) as u64 + len as u64 > most {
        return Verdict::Pass;
    }
    Verdict::Redirect
}

/// What the user side has to hear of a segment of `len` bytes that was passed to it and is
/// counted.
///
/// The credit must be read anew for it, behind a full barrier after the count; and the
/// user side must look what it owes behind one after it wrote. While the segment was judged
/// it may have written the last of what it owed before, and sleep: one of the two sees what
/// the other did. (Told by the credit of before, one connection of some thousands that met
/// a reader that had stopped went silent for ever.)
#[inline(always)]
pub fn news(progress: &Progress, credit: &Credit, len: u32) -> News {
    let owed = progress.passed.wrapping_sub(credit.consumed);
    let before = owed.wrapping_sub(len as u64);
    if before == 0 {
        News::Arrived
    } else if before / WARN_EVERY != owed / WARN_EVERY {
        News::Much
    } else {
        News::None
    }
}

/// After how many more owed bytes the user side is told again.
const WARN_EVERY: u64 = 4 << 20;
/// From how many owed bytes the sender is stopped: more than a receive queue takes, so
/// some of them are charged to no socket, and TCP will not stop it.
const TOO_MANY: u64 = 8 << 20;
/// At how many it may go on. Not a little fewer: each time it is let go it sends at once
/// what a receive queue takes.
const FEW: u64 = 4 << 20;

/// Whether the sender of a direction of which the user side owes so many bytes must be
/// stopped, or stay so.
pub fn must_stop(owed: u64, stopped: bool) -> bool {
    owed > if stopped { FEW } else { TOO_MANY }
}

/// Redirected bytes that are not in the other socket's send queue yet.
#[inline(always)]
pub fn waiting(progress: &Progress, credit: &Credit, write_seq: u32) -> u32 {
    let expected = progress.redirected.wrapping_add(credit.consumed) as u32;
    progress.base_seq.wrapping_add(expected).wrapping_sub(write_seq)
}

/// Whether the user side may write the bytes that were passed to it: all that was
/// redirected before is in the other socket's send queue.
///
/// `queued` is how many bytes entered that queue since the connection was joined.
pub fn may_write(progress: &Progress, credit: &Credit, queued: u64) -> bool {
    queued == progress.redirected + credit.consumed
}

/// Whether a direction whose sender has finished has nothing left to deliver.
///
/// `received` is how many bytes the source took since the connection was joined,
/// its FIN counted as one (as `tcp_info` does); `queued` as for [`may_write`].
pub fn is_drained(progress: &Progress, credit: &Credit, received: u64, queued: u64) -> bool {
    received.saturating_sub(progress.redirected + progress.passed) <= 1
        && progress.passed == credit.consumed
        && may_write(progress, credit, queued)
}

/// Which way a connection's bytes take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Read into memory, and written.
    Copy,
    /// Through a pipe, without copying.
    Splice,
    /// From socket to socket by the kernel.
    Kernel,
}

/// After how many visits a connection is judged: an exchange is two. A connection
/// that ends within its first exchanges is never moved.
const VISITS: u32 = 8;
/// From how many bytes on one way within a window a connection may be bulk.
const BULK: u64 = VISITS as u64 * BULK_VISIT;
/// The least that an average visit to a bulk connection moves.
const BULK_VISIT: u64 = 16 << 10;

/// What a connection did since it was last judged. A visit is one time that the
/// user side found bytes to move in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    visits: u32,
    /// How often a visit was for another direction than the one before.
    turns: u32,
    last_side: u32,
    bytes: [u64; 2],
}

impl Window {
    /// Notes that `bytes` were moved from `side` (0 or 1).
    pub fn note(&mut self, side: u32, bytes: u64) {
        if self.visits > 0 && side != self.last_side {
            self.turns += 1;
        }
        self.last_side = side;
        self.visits += 1;
        if let Some(sum) = self.bytes.get_mut(side as usize) {
            *sum += bytes;
        }
    }

    /// Bytes moved in both directions.
    pub fn moved(&self) -> u64 {
        self.bytes[0] + self.bytes[1]
    }

    fn is_bulk(&self) -> bool {
        let most = self.bytes[0].max(self.bytes[1]);
        most >= BULK && most / u64::from(self.visits.max(1)) >= BULK_VISIT
    }

    /// Nearly every visit answers the one before.
    fn is_interactive(&self) -> bool {
        self.turns * 4 >= self.visits * 3
    }
}

/// The path that suits a connection better than the one it is on, and why. Starts a
/// new window when it has judged one.
///
/// Nothing leaves the kernel path: a connection that turns into bulk there is passed
/// to the user side segment by segment, while its sockets stay joined.
pub fn better_path(now: Path, window: &mut Window, kernel: bool) -> Option<(Path, &'static str)> {
    let bulk = window.is_bulk();
    if now == Path::Kernel || !(bulk || window.visits >= VISITS) {
        return None;
    }
    let interactive = window.is_interactive();
    *window = Window::default();
    if interactive && kernel {
        Some((Path::Kernel, "interactive"))
    } else if bulk && now != Path::Splice {
        Some((Path::Splice, "bulk"))
    } else {
        None
    }
}

#[cfg(any(test, fuzzing))]
pub mod model;

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::{
        model::{Model, Step},
        *,
    };

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (prop_oneof![9 => Just(0u32), 1 => 0u32..100_000], 1u32..70_000)
                .prop_map(|(old, new)| Step::Arrive { old, new }),
            4 => (prop_oneof![Just(u32::MAX), 0u32..2_000_000], prop::bool::weighted(0.2), 0u32..4)
                .prop_map(|(room, owed, meanwhile)| Step::Judge { room, owed, meanwhile }),
            3 => (1u32..100_000).prop_map(Step::Queue),
            3 => (1u32..70_000, 0u32..70_000).prop_map(|(read, write)| Step::Carry { read, write }),
        ]
    }

    proptest! {
        #[test]
        fn every_byte_once_and_in_order(
            first_seq: u32,
            cap in prop_oneof![Just(0u64), 1u64..4096, 1u64..1_000_000],
            steps in prop::collection::vec(step(), 1..200),
        ) {
            let mut model = Model::new(first_seq, cap);
            for step in &steps {
                model.step(step);
            }
            model.settle(steps.len() * 200);
        }
    }

    #[test]
    fn a_gap_is_an_error() {
        let progress = Progress { started: 1, last_end: u32::MAX, ..Progress::default() };
        assert_eq!(overlap(&progress, u32::MAX), Ok(0));
        assert_eq!(overlap(&progress, u32::MAX - 9), Ok(9));
        // Sequence numbers wrap.
        assert_eq!(overlap(&progress, 0), Err(Gap));
    }

    #[test]
    fn a_sender_is_stopped_once_and_let_go_once() {
        let owed = [0, TOO_MANY, TOO_MANY + 1, TOO_MANY, FEW + 1, FEW, TOO_MANY, 0];
        let mut stopped = false;
        let told = owed.map(|owed| {
            stopped = must_stop(owed, stopped);
            stopped
        });
        assert_eq!(told, [false, false, true, true, true, false, false, false]);
    }

    #[test]
    fn who_owes_much_is_told_again() {
        let (mut progress, credit) = (Progress::default(), Credit::default());
        let (mut arrived, mut warnings) = (0, vec![]);
        for _ in 0..600 {
            progress.passed += 32 << 10;
            match news(&progress, &credit, 32 << 10) {
                News::Arrived => arrived += 1,
                News::Much => warnings.push(progress.passed >> 20),
                News::None => {}
            }
        }
        assert_eq!((arrived, warnings), (1, vec![4, 8, 12, 16]));
    }

    fn after(path: Path, kernel: bool, visits: &[(u32, u64)]) -> Vec<Path> {
        let (mut window, mut now, mut taken) = (Window::default(), path, vec![]);
        for (side, bytes) in visits {
            window.note(*side, *bytes);
            if let Some((path, _)) = better_path(now, &mut window, kernel) {
                now = path;
                taken.push(path);
            }
        }
        taken
    }

    #[test]
    fn exchanges_go_to_the_kernel_bulk_to_splice() {
        let exchanges: Vec<_> = (0..100).map(|i| (i % 2, 64)).collect();
        let bulk: Vec<_> = (0..100).map(|_| (1, 60_000)).collect();
        assert_eq!(after(Path::Copy, true, &exchanges), [Path::Kernel]);
        assert_eq!(after(Path::Splice, true, &exchanges), [Path::Kernel]);
        assert_eq!(after(Path::Copy, false, &exchanges), []);
        assert_eq!(after(Path::Copy, true, &bulk), [Path::Splice]);
        assert_eq!(after(Path::Kernel, true, &bulk), []);
    }

    #[test]
    fn a_short_connection_stays_where_it_began() {
        let short: Vec<_> = (0..6).map(|i| (i % 2, 4000)).collect();
        assert_eq!(after(Path::Copy, true, &short), []);
    }

    #[test]
    fn bulk_then_exchanges_follows_both() {
        let mut visits: Vec<_> = (0..40).map(|_| (1, 60_000)).collect();
        visits.extend((0..80).map(|i| (i % 2, 64)));
        assert_eq!(after(Path::Copy, true, &visits), [Path::Splice, Path::Kernel]);
    }
}
