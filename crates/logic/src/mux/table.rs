//! Tags, many at once: the lookup in a [`Table`] and its construction.

use underpass_abi::mux::{
    BUCKETS, FALLBACK_DROP, MAX_ROUTES, MAX_SHAPES, MAX_TAG, NO_ROUTE, SLOTS, Shape, Slot, Table,
};

/// A route by its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route<'a> {
    /// Bytes of payload before the tag.
    pub offset: u16,
    /// The tag: 1 to [`MAX_TAG`] bytes.
    pub tag: &'a [u8],
    /// What the lookup gives.
    pub port: u16,
    /// The index of its counter.
    pub counter: u16,
}

/// Why a route does not fit into a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit {
    /// It is one too many: there is room for [`MAX_ROUTES`].
    Routes,
    /// There are more than [`MAX_SHAPES`] distinct pairs of offset and length.
    Shapes,
    /// The tag is empty or longer than [`MAX_TAG`] bytes, or ends beyond 65,535 bytes.
    Tag,
    /// The same tag at the same place as another route.
    Twice,
}

/// Finds the route that is first in order among those whose tags the payload has.
///
/// `byte` gives the byte that many bytes after the payload's start (any or none if the
/// payload is shorter), and `window` the 16 bytes that end there (so they may begin
/// before it), or none if the payload is shorter. `forget` gives
/// its argument; in the kernel it makes the verifier forget what it knows of the
/// value ([`Packet::forget`](crate::packet::Packet::forget)). Otherwise each hit and
/// each miss in each shape would be followed on its own: "BPF program is too large".
#[inline(always)]
pub fn find(
    table: &Table,
    byte: impl Fn(usize) -> Option<u8>,
    window: impl Fn(usize) -> Option<[u64; 2]>,
    forget: impl Fn(usize) -> usize,
) -> Option<&Slot> {
    const NONE: usize = NO_ROUTE as usize;
    let mut candidates = candidates(table, byte, &forget);
    let mut order = forget(NONE);
    let mut found = forget(0);
    for _ in 0..MAX_SHAPES {
        if candidates == 0 {
            break;
        }
        let index = forget(candidates.trailing_zeros() as usize) & (MAX_SHAPES - 1);
        candidates &= candidates - 1;
        let shape = &table.shapes[index];
        if usize::from(shape.best) >= order {
            break; // shapes are sorted: nothing better follows
        }
        let Some(bytes) = window(usize::from(shape.end)) else { continue };
        let tag = [bytes[0] & shape.mask[0], bytes[1] & shape.mask[1]];
        let at = place(table, tag, index as u16);
        let slot = &table.slots[at];
        if slot.tag == tag && slot.shape == index as u16 && usize::from(slot.order) < order {
            order = forget(usize::from(slot.order));
            found = forget(at);
        }
    }
    (order != NONE).then(|| &table.slots[found & (SLOTS - 1)])
}

/// A bit for each shape that may have a route for the payload.
#[inline(always)]
fn candidates(table: &Table, byte: impl Fn(usize) -> Option<u8>, forget: impl Fn(usize) -> usize) -> u32 {
    let mut candidates = 0;
    for index in 0..MAX_SHAPES {
        if index >= usize::from(table.shape_count) {
            break;
        }
        // Known, it would be counted from the end, by a negative offset: "R8 unbounded memory access".
        let shape = &table.shapes[forget(index) & (MAX_SHAPES - 1)];
        let value = byte(usize::from(shape.probe)).unwrap_or(0);
        let may = shape.values[usize::from(value >> 6)] >> (value & 63) & 1;
        candidates |= may << index;
    }
    candidates as u32
}

/// [`find`] in a message that lies in memory.
pub fn find_in<'t>(table: &'t Table, payload: &[u8]) -> Option<&'t Slot> {
    let window = |end: usize| {
        if let Some(window) = payload.get(..end)?.last_chunk() {
            return Some(halves(*window));
        }
        let mut window = [0; MAX_TAG];
        let kept = end.min(MAX_TAG);
        window[MAX_TAG - kept..].copy_from_slice(payload.get(end - kept..end)?);
        Some(halves(window))
    };
    if table.shape_count == 1 {
        // The usual case: all tags in one place, which needs no choice among places.
        let shape = &table.shapes[0];
        let bytes = window(usize::from(shape.end))?;
        let tag = [bytes[0] & shape.mask[0], bytes[1] & shape.mask[1]];
        let slot = &table.slots[place(table, tag, 0)];
        return (slot.tag == tag && slot.shape == 0).then_some(slot);
    }
    find(table, |at| payload.get(at).copied(), window, |value| value)
}

/// A window as the two integers that a table compares.
#[inline(always)]
pub fn halves(window: [u8; MAX_TAG]) -> [u64; 2] {
    let (first, second) = window.split_at(8);
    let half = |bytes: &[u8]| {
        let mut half = [0; 8];
        half.copy_from_slice(bytes);
        u64::from_ne_bytes(half)
    };
    [half(first), half(second)]
}

/// Puts routes into a table, in their order, in place of those that it had.
///
/// Only `shape_count`, `reach`, `seed`, `shapes`, `displacements` and `slots` are written.
///
/// # Errors
/// The index of a route that does not fit, and why.
pub fn build<'r>(
    table: &mut Table,
    routes: impl ExactSizeIterator<Item = Route<'r>> + Clone,
) -> Result<(), (usize, Misfit)> {
    if routes.len() > MAX_ROUTES {
        return Err((MAX_ROUTES, Misfit::Routes));
    }
    collect_shapes(table, routes.clone())?;
    choose_probes(table, routes.clone());
    // A seed fails only by chance, and not twice in a row: the table is half empty.
    for seed in 0..64_u64 {
        table.seed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if place_all(table, routes.clone())? {
            return Ok(());
        }
    }
    Err((0, Misfit::Routes))
}

/// An empty table that drops everything.
pub const EMPTY: Table = Table {
    port: 0,
    shape_count: 0,
    reach: 0,
    zero: [0; 3],
    min_length: 0,
    max_length: u16::MAX as u32,
    fallback: FALLBACK_DROP,
    seed: 0,
    shapes: [NO_SHAPE; MAX_SHAPES],
    displacements: [0; BUCKETS],
    slots: [Slot::EMPTY; SLOTS],
};

const NO_SHAPE: Shape = Shape { mask: [0; 2], end: 0, best: NO_ROUTE, length: 0, probe: 0, values: [0; 4] };

/// The routes of a table, in their order: what [`build`] was given.
pub fn routes(table: &Table) -> impl Iterator<Item = &Slot> {
    (0..MAX_ROUTES as u16).map_while(|order| table.slots.iter().find(|slot| slot.order == order))
}

/// A route's tag: its offset, and its bytes at the end of the window.
pub fn tag(table: &Table, slot: &Slot) -> (u16, [u8; MAX_TAG], usize) {
    let shape = &table.shapes[usize::from(slot.shape) % MAX_SHAPES];
    let mut window = [0; MAX_TAG];
    window[..8].copy_from_slice(&slot.tag[0].to_ne_bytes());
    window[8..].copy_from_slice(&slot.tag[1].to_ne_bytes());
    (shape.end - shape.length, window, usize::from(shape.length))
}

fn collect_shapes<'r>(
    table: &mut Table,
    routes: impl Iterator<Item = Route<'r>>,
) -> Result<(), (usize, Misfit)> {
    table.shapes = [NO_SHAPE; MAX_SHAPES];
    let mut count = 0;
    for (index, route) in routes.enumerate() {
        let shape = shape_of(&route, index).ok_or((index, Misfit::Tag))?;
        if table.shapes[..count].iter().any(|known| same(known, &shape)) {
            continue;
        }
        *table.shapes.get_mut(count).ok_or((index, Misfit::Shapes))? = shape;
        count += 1;
    }
    table.shape_count = count as u16;
    table.reach = table.shapes[..count].iter().map(|shape| shape.end).max().unwrap_or(0);
    Ok(())
}

/// Finds for each shape the byte that has the fewest values.
fn choose_probes<'r>(table: &mut Table, routes: impl Iterator<Item = Route<'r>> + Clone) {
    for shape in &mut table.shapes[..usize::from(table.shape_count)] {
        let offset = shape.end - shape.length;
        let tags = || {
            let same =
                |route: &Route<'_>| route.offset == offset && route.tag.len() == usize::from(shape.length);
            routes.clone().filter(same).map(|route| route.tag)
        };
        let mut fewest = u32::MAX;
        for at in 0..shape.length {
            let mut values = [0_u64; 4];
            for value in tags().filter_map(|tag| tag.get(usize::from(at))) {
                values[usize::from(value >> 6)] |= 1 << (value & 63);
            }
            let count = values.iter().map(|part| part.count_ones()).sum();
            if count < fewest {
                fewest = count;
                (shape.probe, shape.values) = (offset + at, values);
            }
        }
    }
}

fn shape_of(route: &Route<'_>, index: usize) -> Option<Shape> {
    let length = route.tag.len();
    let end = usize::from(route.offset) + length;
    if !(1..=MAX_TAG).contains(&length) || end > usize::from(u16::MAX) {
        return None;
    }
    let mut mask = [0; MAX_TAG];
    mask[MAX_TAG - length..].fill(0xff);
    Some(Shape { mask: halves(mask), end: end as u16, best: index as u16, length: length as u16, ..NO_SHAPE })
}

fn same(one: &Shape, other: &Shape) -> bool {
    (one.end, one.length) == (other.end, other.length)
}

/// Places all routes with the table's seed, the fullest buckets first. Gives
/// whether that was possible.
fn place_all<'r>(
    table: &mut Table,
    routes: impl ExactSizeIterator<Item = Route<'r>> + Clone,
) -> Result<bool, (usize, Misfit)> {
    table.displacements = [0; BUCKETS];
    table.slots = [Slot::EMPTY; SLOTS];
    let mut bucket_of = [NO_ROUTE; MAX_ROUTES];
    let mut sizes = [0_u16; BUCKETS];
    for (index, route) in routes.clone().enumerate() {
        let slot = slot_of(table, &route, index);
        let bucket = bucket(hash(table.seed, slot.tag, slot.shape));
        bucket_of[index] = bucket as u16;
        sizes[bucket] += 1;
    }
    let largest = sizes.iter().copied().max().unwrap_or(0);
    for size in (1..=largest).rev() {
        for full in (0..BUCKETS).filter(|bucket| sizes[*bucket] == size) {
            let of = &bucket_of;
            let members =
                || routes.clone().enumerate().filter(move |(index, _)| usize::from(of[*index]) == full);
            if !place_bucket(table, full, members)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn place_bucket<'r, I: Iterator<Item = (usize, Route<'r>)>>(
    table: &mut Table,
    bucket: usize,
    members: impl Fn() -> I,
) -> Result<bool, (usize, Misfit)> {
    for displacement in 0..4 * SLOTS as u16 {
        table.displacements[bucket] = displacement;
        let mut placed = 0;
        for (index, route) in members() {
            let slot = slot_of(table, &route, index);
            let at = place(table, slot.tag, slot.shape);
            let there = table.slots[at];
            if there.order != NO_ROUTE {
                if there.tag == slot.tag && there.shape == slot.shape {
                    return Err((index, Misfit::Twice));
                }
                break;
            }
            table.slots[at] = slot;
            placed += 1;
        }
        if placed == members().count() {
            return Ok(true);
        }
        for (index, _) in members().take(placed) {
            if let Some(slot) = table.slots.iter_mut().find(|slot| slot.order == index as u16) {
                *slot = Slot::EMPTY;
            }
        }
    }
    Ok(false)
}

fn slot_of(table: &Table, route: &Route<'_>, index: usize) -> Slot {
    let mut window = [0; MAX_TAG];
    window[MAX_TAG - route.tag.len()..].copy_from_slice(route.tag);
    let end = route.offset + route.tag.len() as u16;
    let length = route.tag.len() as u16;
    let shape = table.shapes.iter().position(|shape| (shape.end, shape.length) == (end, length));
    Slot {
        tag: halves(window),
        shape: shape.map_or(NO_ROUTE, |shape| shape as u16),
        order: index as u16,
        port: route.port,
        counter: route.counter,
    }
}

/// The slot where a tag must be, if it is in the table at all.
#[inline(always)]
fn place(table: &Table, tag: [u64; 2], shape: u16) -> usize {
    let hash = hash(table.seed, tag, shape);
    let displacement = u64::from(table.displacements[bucket(hash) & (BUCKETS - 1)]);
    // The factor is odd, so that each displacement leads to another slot.
    (hash.wrapping_add(displacement.wrapping_mul(hash >> 32 | 1)) & (SLOTS as u64 - 1)) as usize
}

#[inline(always)]
fn bucket(hash: u64) -> usize {
    const BITS: u32 = BUCKETS.trailing_zeros();
    (hash >> (u64::BITS - BITS)) as usize
}

#[inline(always)]
fn hash(seed: u64, tag: [u64; 2], shape: u16) -> u64 {
    let mut hash = seed ^ u64::from(shape);
    for half in tag {
        hash ^= half;
        // A short tag lies in the upper bits, which a multiplication does not bring down.
        hash ^= hash >> 32;
        hash = hash.wrapping_mul(0x9fb2_1c65_1e98_df25);
    }
    hash ^= hash >> 29;
    hash
}
