//! dnsguard: what its programs are told, count, remember and show.

/// The built-in rules, in the order of their bits in a mask of rules.
pub const RULES: [&str; 8] = [
    "ip-id-zero",
    "dont-fragment",
    "authoritative",
    "full-name",
    "bogus-address",
    "ttl-deviates",
    "no-edns",
    "duplicate",
];
/// The most byte-pattern rules; their bits follow those of the built-in rules.
pub const MAX_PATTERNS: usize = 8;
/// The most rules of both kinds.
pub const MAX_RULES: usize = RULES.len() + MAX_PATTERNS;
/// The most resolvers that are guarded by their address.
pub const MAX_RESOLVERS: usize = 64;
/// The slots of the table of resolvers: a power of two.
pub const RESOLVER_SLOTS: usize = 256;
/// The slots of what is remembered of queries and of answers: a power of two.
pub const MEMORY_SLOTS: usize = 16384;
/// The most bogus addresses and networks.
pub const MAX_BOGUS: usize = 100_000;
/// The most ranges of bogus addresses in an exported object.
pub const MAX_RANGES: usize = 512;
/// How many samples each CPU keeps: a power of two.
pub const SAMPLES_PER_CPU: usize = 16;
/// The most bytes of a DNS message that a sample keeps: a multiple of 8.
pub const SAMPLE_BYTES: usize = 512;

/// Bits of masks of rules.
pub mod rule {
    /// IPv4 identification 0.
    pub const IP_ID_ZERO: u32 = 1 << 0;
    /// DF set.
    pub const DONT_FRAGMENT: u32 = 1 << 1;
    /// AA set, no authority records.
    pub const AUTHORITATIVE: u32 = 1 << 2;
    /// The answer repeats the name.
    pub const FULL_NAME: u32 = 1 << 3;
    /// The address is on the list.
    pub const BOGUS_ADDRESS: u32 = 1 << 4;
    /// The hop limit differs from what was learned.
    pub const TTL_DEVIATES: u32 = 1 << 5;
    /// The query had an OPT record, the answer has none.
    pub const NO_EDNS: u32 = 1 << 6;
    /// A second, different answer to the same query.
    pub const DUPLICATE: u32 = 1 << 7;
    /// The first byte pattern.
    pub const FIRST_PATTERN: u32 = 1 << 8;
}

/// What became of a packet; a counter each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// Not UDP from port 53, or not IP.
    NotDns = 0,
    /// UDP from port 53 of an address that is not guarded.
    OtherServer = 1,
    /// A fragment of a UDP datagram: passed unseen.
    Fragment = 2,
    /// From a guarded resolver, but no DNS answer that could be read: passed.
    Unparsed = 3,
    /// A truncated answer: passed.
    Truncated = 4,
    /// An answer without answer records: passed.
    Empty = 5,
    /// An answer with several answer records: passed.
    Several = 6,
    /// Judged, and passed.
    Passed = 7,
    /// Judged, and dropped; in a dry run it would have been.
    Dropped = 8,
}

/// Room for the classes: a power of two.
pub const CLASSES: usize = 16;

/// What the programs are told, in their read-only data.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Settings {
    /// Of [`settings_flag`].
    pub flags: u32,
    /// Mask of the rules that are on.
    pub enabled: u32,
    /// The first word of the hash of a resolver's address, chosen so that each has
    /// a slot of its own in `resolvers`.
    pub hash_seed: u64,
    /// The length of a tick of the kernel's clock, in nanoseconds. 0: it is not known,
    /// and the clock is read, which takes longer than all the rest.
    pub tick_ns: u64,
    /// How long a learned hop limit counts, in nanoseconds.
    pub ttl_remember_ns: u64,
    /// How long an answer is remembered for `duplicate`, in nanoseconds.
    pub duplicate_window_ns: u64,
    /// How far a hop limit may be from the learned one.
    pub ttl_tolerance: u32,
    /// How many of `patterns` there are.
    pub pattern_count: u32,
    /// How many of `ranges` there are.
    pub range_count: u32,
    /// Zero.
    pub padding: u32,
    /// The byte-pattern rules.
    pub patterns: [Pattern; MAX_PATTERNS],
    /// What goes for a resolver that is guarded without being named (`any`).
    pub any: Resolver,
    /// The guarded resolvers, by a hash of their address.
    pub resolvers: [Resolver; RESOLVER_SLOTS],
}

/// Bits of [`Settings::flags`].
pub mod settings_flag {
    /// Count and sample, but drop nothing.
    pub const DRY_RUN: u32 = 1 << 0;
    /// Every address that answers from port 53 is guarded.
    pub const ANY: u32 = 1 << 1;
    /// The list of bogus addresses is not empty.
    pub const BOGUS: u32 = 1 << 2;
}

/// A guarded resolver and its policy. A rule that is in neither mask only counts.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Resolver {
    /// The address in two words as they lie in memory; an IPv4 address is mapped into
    /// IPv6. All zero: the slot is empty.
    pub address: [u64; 2],
    /// Mask of the rules of which one hit suffices to drop.
    pub alone: u32,
    /// Mask of the rules that need a second one of either mask to hit.
    pub paired: u32,
}

/// A rule by bytes at a place.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Pattern {
    /// From the start of `layer`, in bytes.
    pub offset: u16,
    /// Of [`layer`].
    pub layer: u8,
    /// How many bytes of `bytes` and `mask` count.
    pub length: u8,
    /// Zero.
    pub padding: u32,
    /// What is compared.
    pub bytes: [u8; 8],
    /// The bits that are compared.
    pub mask: [u8; 8],
}

/// What a [`Pattern::offset`] counts from.
pub mod layer {
    /// The IP header.
    pub const IP: u8 = 0;
    /// The UDP header.
    pub const UDP: u8 = 1;
    /// The DNS header.
    pub const DNS: u8 = 2;
}

/// The bogus addresses of an exported object: ascending ranges that do not overlap,
/// both ends included; an address is a number of two words, the higher first.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Range {
    /// The lowest address.
    pub first: [u64; 2],
    /// The highest.
    pub last: [u64; 2],
}

/// One CPU's counters.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Counters {
    /// Packets of each [`Class`].
    pub classes: [u64; CLASSES],
    /// Answers that each rule hit.
    pub hits: [u64; MAX_RULES],
    /// Dropped answers that each rule hit.
    pub drops: [u64; MAX_RULES],
    /// Queries to guarded resolvers that were seen leaving.
    pub queries: u64,
    /// Answers that a rule hit and that were not kept as a sample.
    pub unsampled: u64,
    /// When the last sample was taken, in jiffies.
    pub sampled_at: u64,
    /// How many samples were taken.
    pub samples: u64,
}

/// The hop limit that a resolver's trusted answers show.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Learned {
    /// The resolver, as in [`Resolver`].
    pub address: [u64; 2],
    /// When it was last seen, in nanoseconds of a clock that starts anywhere.
    pub at: u64,
    /// How many trusted answers in a row have shown it, within the tolerance.
    pub answers: u32,
    /// IPv4's time to live, IPv6's hop limit.
    pub hop_limit: u32,
}

/// An answer that was let pass, to know a second one by.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Answered {
    /// A hash of who asked whom under which identifier.
    pub key: u64,
    /// A hash of what was answered.
    pub answer: u64,
    /// When, in nanoseconds of a clock that starts anywhere.
    pub at: u64,
}

/// An answer that a rule hit, for people to look at.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Sample {
    /// When, in nanoseconds of CLOCK_MONOTONIC; 0: this slot is empty.
    pub at: u64,
    /// The resolver that it claims to come from.
    pub source: [u8; 16],
    /// Whom it goes to.
    pub destination: [u8; 16],
    /// Mask of the rules that hit.
    pub rules: u32,
    /// 1: dropped, or it would have been.
    pub dropped: u32,
    /// IPv4's time to live, IPv6's hop limit.
    pub hop_limit: u32,
    /// The bytes of `message` that count.
    pub length: u32,
    /// The DNS message, cut.
    pub message: [u8; SAMPLE_BYTES],
}

/// What `show` needs to know of the rules in force, for the user side alone.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Policy {
    /// Mask of the rules that are on.
    pub enabled: u32,
    /// 1: nothing is dropped.
    pub dry_run: u32,
    /// The names of the byte-pattern rules, each ended by zeros.
    pub patterns: [[u8; 32]; MAX_PATTERNS],
}

crate::pod!(
    Settings = 6416,
    Resolver = 24,
    Pattern = 24,
    Range = 32,
    Counters = 416,
    Learned = 32,
    Answered = 24,
    Sample = 568,
    Policy = 264,
);

impl Settings {
    /// Settings that guard nothing.
    pub const EMPTY: Self = Self {
        flags: 0,
        enabled: 0,
        hash_seed: 0,
        tick_ns: 0,
        ttl_remember_ns: 0,
        duplicate_window_ns: 0,
        ttl_tolerance: 0,
        pattern_count: 0,
        range_count: 0,
        padding: 0,
        patterns: [Pattern::EMPTY; MAX_PATTERNS],
        any: Resolver::EMPTY,
        resolvers: [Resolver::EMPTY; RESOLVER_SLOTS],
    };
}

impl Resolver {
    /// An empty slot.
    pub const EMPTY: Self = Self { address: [0; 2], alone: 0, paired: 0 };
}

impl Pattern {
    /// No pattern.
    pub const EMPTY: Self = Self { offset: 0, layer: 0, length: 0, padding: 0, bytes: [0; 8], mask: [0; 8] };
}

impl Range {
    /// No range.
    pub const EMPTY: Self = Self { first: [0; 2], last: [0; 2] };
}

impl Learned {
    /// Nothing learned.
    pub const EMPTY: Self = Self { address: [0; 2], at: 0, answers: 0, hop_limit: 0 };
}

impl Answered {
    /// No answer.
    pub const EMPTY: Self = Self { key: 0, answer: 0, at: 0 };
}

impl Counters {
    /// All zero.
    pub const EMPTY: Self = Self {
        classes: [0; CLASSES],
        hits: [0; MAX_RULES],
        drops: [0; MAX_RULES],
        queries: 0,
        unsampled: 0,
        sampled_at: 0,
        samples: 0,
    };
}
