//! A direction of the kernel path without a kernel: the rules are asked as the
//! program and the user side ask them, and every byte's place is checked. For
//! property tests and fuzzers.

use std::collections::VecDeque;

use underpass_abi::relay::{Credit, Progress};

use super::{News, OVERHEAD, SendQueue, Verdict, decide, is_drained, may_write, news, overlap, waiting};

/// One thing that happens to a direction, in any order.
#[derive(Debug, Clone)]
pub enum Step {
    /// A segment arrives.
    Arrive {
        /// Bytes that came before, again.
        old: u32,
        /// New bytes after them.
        new: u32,
    },
    /// The program judges the next segment.
    Judge {
        /// Bytes of memory that the other queue has room for.
        room: u32,
        /// The user side owes bytes that came in at the other socket.
        owed: bool,
        /// How many turns the user side has while the program is at it: after it has
        /// decided and before it has counted.
        meanwhile: u32,
    },
    /// The kernel puts so many redirected bytes into the other socket's queue.
    Queue(u32),
    /// The user side has its turn.
    Carry {
        /// It reads so many bytes at most,
        read: u32,
        /// and writes so many.
        write: u32,
    },
}

/// A direction without a kernel. Bytes are known by their place in the stream.
#[derive(Debug)]
pub struct Model {
    first_seq: u32,
    arrived: u64,
    segments: VecDeque<(u64, u32)>,
    redirected: VecDeque<(u64, u32)>,
    passed: VecDeque<(u64, u32)>,
    held: Option<(u64, u32)>,
    delivered: u64,
    told: bool,
    checked: Option<u64>,
    progress: Progress,
    credit: Credit,
}

impl Model {
    /// A stream whose first byte has this sequence number, and the credit's `cap`.
    pub fn new(first_seq: u32, cap: u64) -> Self {
        let progress = Progress { started: 1, base_seq: 7, last_end: first_seq, ..Progress::default() };
        Self {
            first_seq,
            arrived: 0,
            segments: VecDeque::new(),
            redirected: VecDeque::new(),
            passed: VecDeque::new(),
            held: None,
            delivered: 0,
            told: false,
            checked: None,
            progress,
            credit: Credit { cap, ..Credit::default() },
        }
    }

    /// Lets something happen.
    ///
    /// # Panics
    /// Where a rule does not hold.
    pub fn step(&mut self, step: &Step) {
        match *step {
            Step::Arrive { old, new } => {
                let start = self.arrived.saturating_sub(old.into());
                let old = (self.arrived - start) as u32;
                self.segments.push_back((start, old + new));
                self.arrived += u64::from(new);
            }
            Step::Judge { room, owed, meanwhile } => self.judge(room, owed, meanwhile),
            Step::Queue(most) => self.queue(most),
            Step::Carry { read, write } => self.carry(read, write),
        }
        // With the FIN, whose place is after the last byte.
        assert!(!self.is_drained(1) || self.delivered == self.arrived, "shut down with bytes on their way");
    }

    /// Whatever happened, nothing is stuck: it drains when all take their turns.
    ///
    /// # Panics
    /// Where it does not within `rounds`.
    pub fn settle(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.step(&Step::Judge { room: u32::MAX, owed: false, meanwhile: 0 });
            self.step(&Step::Queue(u32::MAX));
            self.step(&Step::Carry { read: u32::MAX, write: u32::MAX });
        }
        assert_eq!(self.delivered, self.arrived, "bytes are stuck");
        assert!(self.is_drained(1), "it is not shut down");
    }

    fn write_seq(&self) -> u32 {
        self.progress.base_seq.wrapping_add(self.delivered as u32)
    }

    fn judge(&mut self, room: u32, owed: bool, meanwhile: u32) {
        let Some((start, len)) = self.segments.pop_front() else { return };
        let seq = self.first_seq.wrapping_add(start as u32);
        let old = overlap(&self.progress, seq).expect("the model leaves no gap");
        if old >= len {
            return;
        }
        self.progress.last_end = seq.wrapping_add(len);
        let (start, len) = (start + u64::from(old), len - old);
        let queue = SendQueue { write_seq: self.write_seq(), room, owed };
        let verdict = decide(&self.progress, &self.credit, &queue, len);
        for _ in 0..meanwhile {
            self.carry(u32::MAX, u32::MAX);
        }
        match verdict {
            Verdict::Redirect => {
                let waiting = waiting(&self.progress, &self.credit, queue.write_seq) + len;
                assert!(!owed && waiting * OVERHEAD <= room, "{waiting} bytes do not fit into {room}");
                self.redirected.push_back((start, len));
                self.progress.redirected += u64::from(len);
            }
            Verdict::Pass => self.pass(start, len),
        }
        let waiting = waiting(&self.progress, &self.credit, self.write_seq());
        assert!(u64::from(waiting) <= self.credit.cap, "{waiting} bytes wait");
    }

    fn pass(&mut self, start: u64, len: u32) {
        self.passed.push_back((start, len));
        self.progress.passed += u64::from(len);
        self.told |= news(&self.progress, &self.credit, len) == News::Arrived;
        assert!(self.told, "bytes are passed and nobody knows");
    }

    fn queue(&mut self, most: u32) {
        let Some((start, len)) = self.redirected.pop_front() else { return };
        let now = len.min(most);
        self.deliver(start, now);
        if now < len {
            self.redirected.push_front((start + u64::from(now), len - now));
        }
    }

    fn carry(&mut self, read: u32, write: u32) {
        if self.held.is_none() {
            if self.progress.passed == self.credit.consumed {
                return;
            }
            if self.checked != Some(self.progress.redirected) {
                if !may_write(&self.progress, &self.credit, self.delivered) {
                    return;
                }
                self.checked = Some(self.progress.redirected);
            }
            let Some((start, len)) = self.passed.pop_front() else { return };
            let now = len.min(read.max(1));
            if now < len {
                self.passed.push_front((start + u64::from(now), len - now));
            }
            self.held = Some((start, now));
        }
        let Some((start, len)) = self.held.take() else { return };
        let now = len.min(write);
        self.deliver(start, now);
        self.credit.consumed += u64::from(now);
        if now < len {
            self.held = Some((start + u64::from(now), len - now));
        }
        if self.progress.passed == self.credit.consumed {
            self.told = false;
        }
    }

    fn deliver(&mut self, start: u64, len: u32) {
        assert_eq!(start, self.delivered, "bytes overtook others, were lost or came twice");
        self.delivered += u64::from(len);
    }

    fn is_drained(&self, fin: u64) -> bool {
        is_drained(&self.progress, &self.credit, self.arrived + fin, self.delivered)
    }
}
