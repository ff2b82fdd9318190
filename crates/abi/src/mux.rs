//! The route table of `mux attach`: which port a datagram's payload asks for.
//!
//! Routes are grouped by shape, the place and length of their tag. A packet is
//! looked at once per shape, however many routes share it: first at the one byte that
//! tells most, which ends it for most shapes; then the tag is cut out of
//! the 16 bytes that end where it ends, hashed, and found in one step, for
//! `displacements` is computed so that no two routes share a slot.

/// The most routes that a table holds.
pub const MAX_ROUTES: usize = 1024;
/// The most distinct pairs of offset and length that the tags of a table have.
pub const MAX_SHAPES: usize = 32;
/// The longest tag, in bytes.
pub const MAX_TAG: usize = 16;
/// Slots of the hash table, a power of two, at least twice [`MAX_ROUTES`].
pub const SLOTS: usize = 2048;
/// Displacements of the hash table, a power of two.
pub const BUCKETS: usize = 512;
/// An `order` that no route has: the slot is empty.
pub const NO_ROUTE: u16 = u16::MAX;

/// What happens to a datagram of the right length that no route takes: it goes to
/// this port, or is one of the two below.
pub type Fallback = u32;
/// It passes as it came.
pub const FALLBACK_PASS: Fallback = 0x1_0000;
/// It is dropped.
pub const FALLBACK_DROP: Fallback = 0x1_0001;

/// Where in the payload some routes have their tags.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Which of the 16 bytes that end at `end` belong to the tag, as
    /// [`Slot::tag`] has them: 0xff for each that does.
    pub mask: [u64; 2],
    /// Bytes from the start of the payload to the end of the tag.
    pub end: u16,
    /// The lowest [`Slot::order`] of this shape's routes. Shapes are sorted by it.
    pub best: u16,
    /// The length of the tag, 1 to [`MAX_TAG`] bytes.
    pub length: u16,
    /// Bytes from the start of the payload to the byte of the tag in which this
    /// shape's routes differ least: most other payloads differ from all of them there.
    pub probe: u16,
    /// A bit for each value that this byte has in one of the routes.
    pub values: [u64; 4],
}

/// One route, or an empty place for one.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The 16 bytes that end where the tag ends, zero where they are not the
    /// tag's, as two integers in the byte order of this machine.
    pub tag: [u64; 2],
    /// The index of the route's shape.
    pub shape: u16,
    /// The route's place on the command line: of several that match, the lowest wins.
    pub order: u16,
    /// The port that the datagram goes to.
    pub port: u16,
    /// The index of the route's counter.
    pub counter: u16,
}

/// All that decides about a datagram.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// The port that this is about.
    pub port: u16,
    /// How many of `shapes` are in use.
    pub shape_count: u16,
    /// Where the last tag ends, in bytes from the start of the payload.
    pub reach: u16,
    /// Zero.
    pub zero: [u16; 3],
    /// The shortest payload that is valid, in bytes.
    pub min_length: u32,
    /// The longest payload that is valid, in bytes.
    pub max_length: u32,
    /// What happens to what no route takes.
    pub fallback: Fallback,
    /// What makes the hash different if no displacements can be found.
    pub seed: u64,
    /// The shapes, by [`Shape::best`].
    pub shapes: [Shape; MAX_SHAPES],
    /// What is added to the hashes of each bucket so that nothing collides.
    pub displacements: [u16; BUCKETS],
    /// The routes.
    pub slots: [Slot; SLOTS],
}

impl Slot {
    /// A place without a route.
    pub const EMPTY: Self = Self { tag: [0; 2], shape: NO_ROUTE, order: NO_ROUTE, port: 0, counter: 0 };
}

/// Whose replies leave with another port: a client of a service behind the multiplexer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// The client's address in two words, as it lies in memory; IPv4 is mapped into IPv6
    /// (RFC 4291, section 2.5.5.2).
    pub client: [u64; 2],
    /// The address that the client spoke to.
    pub local: [u64; 2],
    /// The client's port.
    pub client_port: u16,
    /// The port of the service, where the datagrams went.
    pub service_port: u16,
    /// Zero: a key has no bytes that are not written.
    pub zero: u32,
}

/// The port that a client spoke to. The upper bits are zero.
pub type SpokenTo = u32;

/// Counters, one for each thing that can happen to a datagram. The first
/// [`MAX_ROUTES`] are the routes', by [`Slot::counter`].
pub mod counter {
    use super::MAX_ROUTES;

    /// No route took it, and it went to the default port.
    pub const DEFAULT: u32 = MAX_ROUTES as u32;
    /// No route took it, and it passed as it was.
    pub const PASSED: u32 = DEFAULT + 1;
    /// No route took it, and it was dropped.
    pub const NO_ROUTE: u32 = DEFAULT + 2;
    /// Dropped: its payload is too short or too long.
    pub const WRONG_LENGTH: u32 = DEFAULT + 3;
    /// Dropped: the tags cannot be read, as they are not in the first fragment.
    pub const FRAGMENT: u32 = DEFAULT + 4;
    /// Dropped: several datagrams in one, to be cut later, with different routes.
    pub const SEGMENTED: u32 = DEFAULT + 5;
    /// A reply that left with the port that the client spoke to.
    pub const REPLIES: u32 = DEFAULT + 6;
    /// An ICMP error about a datagram, made to speak of the port that the client spoke to.
    pub const ERRORS: u32 = DEFAULT + 7;
    /// A flow that was new.
    pub const NEW_FLOWS: u32 = DEFAULT + 8;
    /// A flow that could not be noted: its replies leave with the service's port.
    pub const LOST_FLOWS: u32 = DEFAULT + 9;
    /// How many there are.
    pub const COUNT: u32 = DEFAULT + 10;
}

crate::pod! {
    Flow = 40,
    Shape = 56,
    Slot = 24,
    Table = 32 + 56 * MAX_SHAPES + 2 * BUCKETS + 24 * SLOTS,
}
