//! Packets in XDP and TC, for the parsing and rewriting of `underpass_logic::packet`.
//!
//! All raw access to packets is here. Offsets reach [`Packet::bytes`] as plain
//! numbers, so the verifier has to be shown, at each access, that the bytes are
//! within the packet. Three tricks do that, on 5.10 as on the newest kernel:
//! - The offset is masked, added to the packet's start and the end of the access is
//!   formed in one `asm!` block. In plain Rust, LLVM rewrites `p + 1 > end` to `p >= end`
//!   and then splits or hoists the comparison: "invalid access to packet, off=0
//!   size=1, R1(id=1,off=0,r=0)". Without the mask, 5.10 and 6.1 say "math between
//!   pkt pointer and register with unbounded min value is not allowed".
//! - [`Packet::forget`] makes an offset unknown again, by a 0 that the verifier does not
//!   know to be one. Without it the verifier follows every combination of header lengths
//!   on its own: "BPF program is too large. Processed 1000001 insn".
//! - Loads of 2, 4 and 8 bytes are `asm!` too: packets are not aligned, and from
//!   Rust LLVM would load byte by byte. They are `pure`, so what is not used is
//!   not loaded.

use core::{arch::asm, mem::MaybeUninit};

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::{TcContext, XdpContext},
};
use underpass_logic::packet::{Packet, PacketMut, Short, checksum};

/// The offsets at which a packet can be read: below 16 KiB. A mask of the offset
/// must not change it, and the verifier knows no packet pointer beyond 64 KiB.
const LIMIT: usize = 0x3fff;
/// `BPF_F_MARK_MANGLED_0`: a UDP checksum of 0 stays, one that becomes 0 is 0xffff.
const MARK_MANGLED_0: u64 = 1 << 5;
/// `BPF_F_PSEUDO_HDR`: the change is in the pseudo-header.
const PSEUDO_HDR: u64 = 1 << 4;

/// A packet in XDP.
pub struct XdpPacket {
    ctx: XdpContext,
    bytes: Linear,
}

impl XdpPacket {
    #[inline(always)]
    pub fn new(ctx: XdpContext) -> Self {
        let (data, data_end) = (ctx.data(), ctx.data_end());
        let bytes = Linear { data, data_end, zero: unknown_zero(ctx.rx_queue_index()) };
        Self { ctx, bytes }
    }

    /// The interface that the packet came in on.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }
}

impl Packet for XdpPacket {
    const MAYBE_PARTIAL: bool = true;

    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        self.bytes.load(at)
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.bytes.data_end - self.bytes.data
    }

    #[inline(always)]
    fn forget(&self, at: usize) -> usize {
        forget(at, self.bytes.zero)
    }
}

impl PacketMut for XdpPacket {
    #[inline(always)]
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short> {
        let to = pointer::<N>(self.bytes.data, self.bytes.data_end, at)?;
        // SAFETY: `pointer` has compared the access with the packet's end.
        unsafe { to.cast::<[u8; N]>().write(bytes) };
        Ok(())
    }
}

/// Where a packet's bytes are, as long as no helper moves them, and an [`unknown_zero`].
/// Read from the context once: it is read anew at each access otherwise.
struct Linear {
    data: usize,
    data_end: usize,
    zero: usize,
}

impl Linear {
    #[inline(always)]
    fn of(ctx: &TcContext) -> Self {
        Self { data: ctx.data(), data_end: ctx.data_end(), zero: unknown_zero(ctx.len()) }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        let from = pointer::<N>(self.data, self.data_end, at)?;
        // SAFETY: `pointer` has compared the access with the end of the bytes.
        Ok(unsafe { load(from) })
    }
}

/// A packet in TC, of which any part may be behind the linear one.
pub struct TcPacket {
    ctx: TcContext,
    zero: usize,
}

/// A packet in TC, of which the linear part alone is read: what is behind it counts as
/// cut. It costs the verifier a third of [`TcPacket`].
pub struct LinearPacket {
    ctx: TcContext,
    bytes: Linear,
}

impl LinearPacket {
    /// The packet, made linear up to `bytes` first if it is not and if `wanted` says so.
    #[inline(always)]
    pub fn new(ctx: TcContext, bytes: u32, wanted: impl FnOnce(&TcPacket) -> bool) -> Self {
        let packet = TcPacket::new(ctx);
        let linear = packet.ctx.data_end() - packet.ctx.data();
        if linear < packet.len().min(bytes as usize) && wanted(&packet) {
            // If it fails the packet stays as it is, and what is missing counts as cut.
            let _ = packet.ctx.pull_data(bytes.min(packet.ctx.len()));
        }
        Self { bytes: Linear::of(&packet.ctx), ctx: packet.ctx }
    }

    /// The packet, of which so many bytes are made linear if they are not.
    #[inline(always)]
    pub fn with_head(ctx: TcContext, bytes: usize) -> Self {
        let mut packet = Self { bytes: Linear::of(&ctx), ctx };
        packet.gather(bytes);
        packet
    }

    /// See [`TcPacket::segment_size`].
    #[inline(always)]
    pub fn segment_size(&self) -> usize {
        segment_size(&self.ctx)
    }
}

impl Packet for LinearPacket {
    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        self.bytes.load(at)
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.len() as usize
    }

    #[inline(always)]
    fn forget(&self, at: usize) -> usize {
        forget(at, self.bytes.zero)
    }
}

impl PacketMut for LinearPacket {
    #[inline(always)]
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short> {
        let stored = store_bytes(&self.ctx, at, bytes);
        self.bytes = Linear::of(&self.ctx);
        stored
    }

    #[inline(always)]
    fn gather(&mut self, end: usize) {
        let end = end.min(self.len());
        if self.bytes.data_end - self.bytes.data < end {
            // If it fails the packet stays as it is, and what is missing counts as cut.
            let _ = self.ctx.pull_data(end as u32);
            self.bytes = Linear::of(&self.ctx);
        }
    }

    /// The helper knows whether the checksum is complete, so here nothing is guessed.
    #[inline(always)]
    fn update_checksum<const N: usize>(
        &mut self,
        place: &checksum::Place,
        old: [u8; N],
        new: [u8; N],
    ) -> Result<(), Short> {
        let replaced = replace_checksum(&self.ctx, place, old, new);
        self.bytes = Linear::of(&self.ctx);
        replaced
    }
}

impl TcPacket {
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        Self { zero: unknown_zero(ctx.len()), ctx }
    }

    /// The interface that the packet came in on or leaves by.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        // SAFETY: the kernel hands out a context that is valid during the program.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// The size of the segments that the kernel will cut this packet into later on,
    /// or has put it together from, in bytes of payload; 0 if it is none (Linux 5.7).
    #[inline(always)]
    pub fn segment_size(&self) -> usize {
        segment_size(&self.ctx)
    }

    #[cold]
    #[inline(always)]
    fn load_bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes N bytes, or fails.
        unsafe {
            if bpf_skb_load_bytes(self.ctx.as_ptr(), at as u32, bytes.as_mut_ptr().cast(), N as u32) != 0 {
                return Err(Short);
            }
            Ok(bytes.assume_init())
        }
    }
}

impl Packet for TcPacket {
    /// Bytes behind the linear part of the packet are fetched by a helper.
    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        match pointer::<N>(self.ctx.data(), self.ctx.data_end(), at) {
            // SAFETY: `pointer` has compared the access with the linear part's end.
            Ok(from) => Ok(unsafe { load(from) }),
            Err(Short) => self.load_bytes(at),
        }
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.len() as usize
    }

    #[inline(always)]
    fn forget(&self, at: usize) -> usize {
        forget(at, self.zero)
    }
}

impl PacketMut for TcPacket {
    #[inline(always)]
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short> {
        store_bytes(&self.ctx, at, bytes)
    }

    /// The helper knows whether the checksum is complete, so here nothing is guessed.
    #[inline(always)]
    fn update_checksum<const N: usize>(
        &mut self,
        place: &checksum::Place,
        old: [u8; N],
        new: [u8; N],
    ) -> Result<(), Short> {
        replace_checksum(&self.ctx, place, old, new)
    }
}

#[inline(always)]
fn segment_size(ctx: &TcContext) -> usize {
    // SAFETY: the kernel hands out a context that is valid during the program.
    unsafe { (*ctx.skb.skb).gso_size as usize }
}

#[inline(always)]
fn store_bytes<const N: usize>(ctx: &TcContext, at: usize, bytes: [u8; N]) -> Result<(), Short> {
    // SAFETY: the helper reads N bytes of `bytes`.
    let result =
        unsafe { bpf_skb_store_bytes(ctx.as_ptr().cast(), at as u32, bytes.as_ptr().cast(), N as u32, 0) };
    if result == 0 { Ok(()) } else { Err(Short) }
}

#[inline(always)]
fn replace_checksum<const N: usize>(
    ctx: &TcContext,
    place: &checksum::Place,
    old: [u8; N],
    new: [u8; N],
) -> Result<(), Short> {
    let mut flags = 0;
    if place.zero_is_none {
        flags |= MARK_MANGLED_0;
    }
    if place.pseudo_header {
        flags |= PSEUDO_HDR;
    }
    let mut result = 0;
    if N == 2 {
        let word = |bytes: [u8; N]| u64::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        // SAFETY: the helper checks the offset.
        result |= unsafe {
            bpf_l4_csum_replace(ctx.as_ptr().cast(), place.at as u32, word(old), word(new), flags | 2)
        };
    } else {
        for (old, new) in old.as_chunks().0.iter().zip(new.as_chunks().0) {
            let word = |bytes: &[u8; 4]| u64::from(u32::from_ne_bytes(*bytes));
            // SAFETY: the helper checks the offset.
            result |= unsafe {
                bpf_l4_csum_replace(ctx.as_ptr().cast(), place.at as u32, word(old), word(new), flags | 4)
            };
        }
    }
    if result == 0 { Ok(()) } else { Err(Short) }
}

/// The address of `N` bytes at offset `at`, if they are before `data_end`.
#[inline(always)]
fn pointer<const N: usize>(data: usize, data_end: usize, at: usize) -> Result<*mut u8, Short> {
    if at > LIMIT {
        return Err(Short);
    }
    let mut start = at;
    let end: usize;
    // SAFETY: arithmetic on registers. The packet's start is a pointer in its low
    // bits and all others, so adding an offset of 14 bits cannot wrap.
    unsafe {
        asm!(
            "{start} &= {limit}",
            "{start} += {data}",
            "{end} = {start}",
            "{end} += {length}",
            start = inout(reg) start,
            data = in(reg) data,
            end = lateout(reg) end,
            limit = const LIMIT,
            length = const N,
            options(pure, nomem, nostack),
        );
    }
    if end > data_end {
        return Err(Short);
    }
    Ok(core::ptr::with_exposed_provenance_mut(start))
}

/// 0, which the verifier does not know of a number's XOR with a copy of itself, if it does
/// not know the number.
#[inline(always)]
pub fn unknown_zero(unknown: u32) -> usize {
    let zero;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!(
            "{zero} = {unknown}",
            "{zero} ^= {unknown}",
            zero = out(reg) zero,
            unknown = in(reg) u64::from(unknown),
            options(pure, nomem, nostack),
        );
    }
    zero
}

/// `at` itself, of which the verifier knows nothing any more.
#[inline(always)]
pub fn forget(at: usize, zero: usize) -> usize {
    let mut at = at;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!(
            "{at} ^= {zero}",
            at = inout(reg) at,
            zero = in(reg) zero,
            options(pure, nomem, nostack),
        );
    }
    at
}

/// Loads `N` bytes: addresses in the widest steps, anything else in steps of two,
/// as most fields have.
///
/// # Safety
/// The verifier must know them to be within the packet.
#[inline(always)]
unsafe fn load<const N: usize>(from: *const u8) -> [u8; N] {
    let mut bytes = [0; N];
    macro_rules! step {
        ($width:literal, $type:literal, $int:ty, $($at:literal)*) => {$(
            if $at + $width <= N {
                let value: u64;
                // SAFETY: within the N bytes, which the caller has vouched for.
                unsafe {
                    asm!(
                        concat!("{value} = *(", $type, " *)({from} + ", $at, ")"),
                        value = out(reg) value,
                        from = in(reg) from,
                        options(pure, readonly, nostack),
                    );
                }
                let value = (value as $int).to_ne_bytes();
                let mut i = 0;
                while i < $width {
                    bytes[$at + i] = value[i];
                    i += 1;
                }
            }
        )*};
    }
    if N == 16 || N == 32 {
        step!(8, "u64", u64, 0 8 16 24);
    } else if N == 8 {
        step!(8, "u64", u64, 0);
    } else if N == 4 {
        step!(4, "u32", u32, 0);
    } else {
        step!(2, "u16", u16, 0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34 36 38);
        if N % 2 == 1 {
            // SAFETY: within the N bytes, which the caller has vouched for.
            bytes[N - 1] = unsafe { *from.add(N - 1) };
        }
    }
    const { assert!(N <= 40, "no header is longer") };
    bytes
}
