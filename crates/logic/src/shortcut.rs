//! Which way the bytes of a local connection go, so that they stay in order, stay
//! bounded, and are never slower than TCP.
//!
//! A redirected message is put into the reader's own queue, which the kernel hands
//! out before anything that came by TCP. So a message may be redirected only if the
//! reader has read all that went by TCP before; the other way round is always in
//! order. The reader's queue has no bound in the kernel: the cap is kept here.

use underpass_abi::shortcut::{BY_TCP, HABIT_BLOCKS, HABIT_URGENT, HABIT_WAITS_FOR_ALL, Rhythm};

/// What the policy is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes redirected in one direction and not read yet, at most.
    pub cap: u32,
    /// Messages shorter than this are small.
    pub small: u32,
    /// Small messages in a row that the reader did not catch up with, at most.
    pub streak: u32,
    /// Turns that look like request and response before a pair is accelerated.
    pub turns: u32,
    /// Reads in one turn, at most, for it to look like a request or a response.
    pub turn_reads: u32,
    /// Bytes in one turn, at most, likewise.
    pub turn_bytes: u32,
}

/// The policy in force.
pub const LIMITS: Limits =
    Limits { cap: 2 << 20, small: 4096, streak: 64, turns: 16, turn_reads: 256, turn_bytes: 1536 << 10 };

/// Why a pair is left to TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Too few turns so far: it is young, short, or streams.
    Turns = 0,
    /// The other end is not in scope, or not on this host.
    Unpaired = 1,
    /// A stream of small writes, which TCP batches better.
    Stream = 2,
    /// The reader fell behind by more than the cap.
    Behind = 3,
    /// An end waits inside of recv.
    Blocks = 4,
    /// An end reads with MSG_WAITALL.
    WaitsForAll = 5,
    /// An end reads out-of-band data.
    Urgent = 6,
    /// An end set SO_RCVLOWAT.
    LowWater = 7,
    /// The kernel would not have a socket in the map.
    Refused = 8,
    /// There was no room for the pair in the table.
    Full = 9,
    /// The shortcut is being detached.
    Closing = 10,
}

impl Reason {
    /// All of them, by number.
    pub const ALL: [Self; 11] = [
        Self::Turns,
        Self::Unpaired,
        Self::Stream,
        Self::Behind,
        Self::Blocks,
        Self::WaitsForAll,
        Self::Urgent,
        Self::LowWater,
        Self::Refused,
        Self::Full,
        Self::Closing,
    ];

    /// A word for `show`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Turns => "few-turns",
            Self::Unpaired => "unpaired",
            Self::Stream => "stream",
            Self::Behind => "behind",
            Self::Blocks => "blocking-recv",
            Self::WaitsForAll => "msg-waitall",
            Self::Urgent => "out-of-band",
            Self::LowWater => "so-rcvlowat",
            Self::Refused => "refused",
            Self::Full => "table-full",
            Self::Closing => "closing",
        }
    }
}

/// One direction of a pair, as its sender sees it before it sends a message.
#[derive(Debug, Clone, Copy)]
pub struct Direction {
    /// Bytes redirected.
    pub redirected: u64,
    /// Bytes given to TCP, modulo 2^32 (a difference of sequence numbers).
    pub tcp: u32,
    /// Bytes that the reader read; may lag behind the truth, never ahead.
    pub consumed: u64,
    /// Small messages redirected since the reader had read everything, or `BY_TCP`.
    pub streak: u32,
}

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Into the reader's queue.
    Redirect {
        /// The direction's streak from now on.
        streak: u32,
        /// Where in the stream the message will end.
        mark: u64,
    },
    /// By TCP, this time.
    Tcp,
    /// By TCP from now on.
    Leave(Reason),
}

impl Direction {
    /// Bytes sent and not read yet; right while they are fewer than 4 GiB.
    #[inline(always)]
    pub const fn unread(&self) -> u32 {
        (self.redirected as u32).wrapping_add(self.tcp).wrapping_sub(self.consumed as u32)
    }

    /// Decides about a message of `len` bytes.
    #[inline(always)]
    pub const fn way(&self, len: u32, limits: &Limits) -> Way {
        let unread = self.unread();
        let streak = if unread == 0 { 0 } else { self.streak };
        if streak == BY_TCP {
            return Way::Tcp;
        }
        // Not an addition: `unread` may be anything if a counter were wrong.
        if unread > limits.cap || len > limits.cap - unread {
            return Way::Leave(Reason::Behind);
        }
        let small = len < limits.small;
        if small && streak >= limits.streak {
            return Way::Leave(Reason::Stream);
        }
        let mark = self.consumed.wrapping_add(unread as u64).wrapping_add(len as u64);
        Way::Redirect { streak: streak + small as u32, mark }
    }
}

/// Whether all that was redirected to an end has been read, so that it may leave the map.
#[inline(always)]
pub const fn drained(mark: u64, consumed: u64) -> bool {
    consumed >= mark
}

/// What a pair's rhythm is after an end (0 or 1) read `bytes`.
#[inline(always)]
#[must_use]
pub const fn read(rhythm: Rhythm, end: u32, bytes: u32, limits: &Limits) -> Rhythm {
    let mut next = rhythm;
    if rhythm.reader == end + 1 {
        next.reads = rhythm.reads.saturating_add(1);
        next.bytes = rhythm.bytes.saturating_add(bytes);
    } else {
        next.reader = end + 1;
        next.reads = 1;
        next.bytes = bytes;
        next.turns = rhythm.turns.saturating_add(1);
    }
    if next.reads > limits.turn_reads || next.bytes > limits.turn_bytes {
        next.turns = 0;
    }
    next
}

/// Whether a pair has earned the shortcut.
#[inline(always)]
pub const fn earned(rhythm: &Rhythm) -> bool {
    rhythm.turns >= rhythm.needed
}

/// The rhythm of a pair that lost the shortcut: to earn it again takes 16 times the turns.
#[inline(always)]
#[must_use]
pub const fn lost(rhythm: Rhythm) -> Rhythm {
    Rhythm { turns: 0, needed: rhythm.needed.saturating_mul(16), ..rhythm }
}

/// What forbids the shortcut to an end with these habits, other than the accepted ones.
#[inline(always)]
pub const fn forbids(habits: u32, accepted: u32) -> Option<Reason> {
    let habits = habits & !accepted;
    if habits & HABIT_BLOCKS != 0 {
        return Some(Reason::Blocks);
    }
    if habits & HABIT_WAITS_FOR_ALL != 0 {
        return Some(Reason::WaitsForAll);
    }
    if habits & HABIT_URGENT != 0 {
        return Some(Reason::Urgent);
    }
    None
}

#[cfg(any(test, fuzzing))]
pub mod model;

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;
    use underpass_abi::shortcut::{CLIENT, SERVER};

    use super::{
        model::{Model, SMALL, Step},
        *,
    };

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u32..40).prop_map(Step::Send),
            4 => (1usize..60).prop_map(Step::Read),
            3 => Just(Step::Count),
            1 => Just(Step::Leave),
            1 => Just(Step::Enter),
        ]
    }

    proptest! {
        #[test]
        fn bytes_stay_in_order_and_bounded(
            before in prop_oneof![Just(0), Just((1u64 << 32) - 50), any::<u32>().prop_map(u64::from)],
            steps in proptest::collection::vec(step(), 0..400),
        ) {
            let mut model = Model::new(before);
            for step in steps {
                model.step(step);
            }
            model.settle();
        }

        #[test]
        fn a_reader_that_keeps_up_is_always_accelerated(lens in proptest::collection::vec(1u32..100, 1..100)) {
            let mut model = Model::new(0);
            for len in &lens {
                model.step(Step::Send(*len));
                model.step(Step::Read(usize::MAX));
                model.step(Step::Count);
            }
            prop_assert_eq!(model.by_tcp, 0);
        }
    }

    #[test]
    fn unread_tcp_bytes_forbid_redirection() {
        let direction = Direction { redirected: 10, tcp: 5, consumed: 14, streak: BY_TCP };
        assert_eq!(direction.way(1, &SMALL), Way::Tcp);
        let direction = Direction { consumed: 15, ..direction };
        assert_eq!(direction.way(1, &SMALL), Way::Redirect { streak: 1, mark: 16 });
    }

    #[test]
    fn the_cap_counts_all_that_is_unread() {
        let direction = Direction { redirected: 90, tcp: 0, consumed: 0, streak: 0 };
        assert_eq!(direction.way(10, &SMALL), Way::Redirect { streak: 0, mark: 100 });
        assert_eq!(direction.way(11, &SMALL), Way::Leave(Reason::Behind));
        let lagging = Direction { consumed: 200, ..direction };
        assert_eq!(lagging.way(1, &SMALL), Way::Leave(Reason::Behind), "a wrong counter goes the safe way");
    }

    #[test]
    fn small_messages_that_pile_up_are_a_stream() {
        let direction = Direction { redirected: 3, tcp: 0, consumed: 0, streak: SMALL.streak };
        assert_eq!(direction.way(1, &SMALL), Way::Leave(Reason::Stream));
        assert!(matches!(direction.way(SMALL.small, &SMALL), Way::Redirect { .. }));
    }

    fn after(reads: &[(u32, u32)]) -> Rhythm {
        let new = Rhythm { needed: SMALL.turns, ..Rhythm::default() };
        reads.iter().fold(new, |rhythm, (end, bytes)| read(rhythm, *end, *bytes, &SMALL))
    }

    #[test]
    fn request_and_response_earn_the_shortcut_and_streams_do_not() {
        let exchange = [(SERVER, 1), (CLIENT, 1)];
        assert!(!earned(&after(&exchange)));
        assert!(earned(&after(&exchange.repeat(2))));
        assert!(!earned(&after(&[(SERVER, 1); 100])));
        assert!(!earned(&after(&[(SERVER, 1), (CLIENT, SMALL.turn_bytes + 1)].repeat(50))));
        let slow: Vec<_> = exchange.into_iter().chain([(CLIENT, 1); 3]).collect();
        assert!(!earned(&after(&slow.repeat(50))));
    }

    #[test]
    fn what_lost_the_shortcut_earns_it_harder() {
        let rhythm = lost(after(&[(SERVER, 1), (CLIENT, 1)].repeat(2)));
        assert!(!earned(&rhythm));
        let again = (0..16 * SMALL.turns).fold(rhythm, |rhythm, i| read(rhythm, (i + 1) % 2, 1, &SMALL));
        assert!(earned(&again));
    }

    #[test]
    fn habits_forbid_unless_accepted() {
        assert_eq!(forbids(0, 0), None);
        assert_eq!(forbids(HABIT_BLOCKS, 0), Some(Reason::Blocks));
        assert_eq!(forbids(HABIT_BLOCKS, HABIT_BLOCKS), None);
        assert_eq!(forbids(HABIT_BLOCKS | HABIT_WAITS_FOR_ALL, HABIT_BLOCKS), Some(Reason::WaitsForAll));
    }

    #[test]
    fn reasons_are_their_numbers() {
        for (number, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
        }
        assert!(Reason::ALL.len() <= underpass_abi::shortcut::REASONS);
    }
}
