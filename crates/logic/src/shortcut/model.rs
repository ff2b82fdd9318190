//! One direction of a shortcut without a kernel: the policy is asked as the program
//! asks it, and the order of every byte is checked. For property tests and fuzzers.

use std::collections::VecDeque;

use underpass_abi::shortcut::BY_TCP;

use super::{Direction, Limits, Way, drained};

/// One direction of a connection as the kernel has it: two queues, of which the
/// reader's own is served first, and a counter that lags behind the reader.
#[derive(Debug)]
pub struct Model {
    own: VecDeque<u64>,
    tcp: VecDeque<u64>,
    /// Bytes sent, by either way.
    pub sent: u64,
    /// Bytes read.
    pub read: u64,
    /// Bytes sent by TCP.
    pub by_tcp: u64,
    first: u32,
    mark: u64,
    direction: Direction,
    open: bool,
}

/// One thing that happens to it, in any order.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// A message of that many bytes is sent.
    Send(u32),
    /// The reader reads at most that many bytes.
    Read(usize),
    /// The counter of what was read catches up.
    Count,
    /// The pair loses the shortcut.
    Leave,
    /// The pair gets it again.
    Enter,
}

/// Limits that are met soon.
pub const SMALL: Limits = Limits { cap: 100, small: 8, streak: 3, turns: 4, turn_reads: 3, turn_bytes: 50 };

impl Model {
    /// As far into a connection as `before` bytes that went by TCP and were read.
    pub fn new(before: u64) -> Self {
        let direction = Direction { redirected: 0, tcp: before as u32, consumed: before, streak: BY_TCP };
        Self {
            own: VecDeque::new(),
            tcp: VecDeque::new(),
            sent: before,
            read: before,
            by_tcp: before,
            first: 0,
            mark: 0,
            direction,
            open: true,
        }
    }

    fn send(&mut self, len: u32) {
        let bytes = self.sent..self.sent + u64::from(len);
        self.sent = bytes.end;
        self.direction.tcp = (self.by_tcp as u32).wrapping_sub(self.first);
        let way = if self.open { self.direction.way(len, &SMALL) } else { Way::Tcp };
        if let Way::Redirect { streak, mark } = way {
            assert_eq!(mark, bytes.end, "the mark is where the message ends");
            self.mark = mark;
            self.direction.streak = streak;
            self.direction.redirected += u64::from(len);
            self.own.extend(bytes);
            return;
        }
        self.open &= way == Way::Tcp;
        self.direction.streak = BY_TCP;
        self.by_tcp += u64::from(len);
        self.tcp.extend(bytes);
    }

    fn read(&mut self, len: usize) {
        let queue = if self.own.is_empty() { &mut self.tcp } else { &mut self.own };
        for byte in queue.drain(..len.min(queue.len())) {
            assert_eq!(byte, self.read, "bytes are read in the order they were sent");
            self.read += 1;
        }
    }

    /// Lets something happen.
    ///
    /// # Panics
    /// Where a rule does not hold.
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Send(len) => self.send(len),
            Step::Read(len) => self.read(len),
            Step::Count => self.direction.consumed = self.read,
            Step::Leave => {
                self.open = false;
                if drained(self.mark, self.direction.consumed) {
                    assert!(self.own.is_empty(), "what leaves the map has nothing to lose");
                }
            }
            // As the kernel side does when it puts the sender into the map.
            Step::Enter => {
                if !self.open {
                    self.direction.streak = BY_TCP;
                    self.open = true;
                }
            }
        }
        assert!(self.own.len() <= SMALL.cap as usize, "the reader's queue is bounded");
    }

    /// The reader reads all that is left.
    ///
    /// # Panics
    /// Where that is out of order.
    pub fn settle(&mut self) {
        while self.read < self.sent {
            self.read(usize::MAX);
        }
    }
}
