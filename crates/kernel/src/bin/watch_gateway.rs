//! watch's view of what passes through an interface: TC programs count flows, both
//! ways, on each CPU for itself. Nothing is told packet by packet unless asked for.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{BPF_RB_NO_WAKEUP, TC_ACT_UNSPEC},
    btf_maps::{LruPerCpuHashMap, PerCpuArray, RingBuf},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::{btf_map, classifier},
    programs::TcContext,
};
use underpass_abi::watch::{PacketNote, Passage, Passed, passing};
use underpass_kernel::packet::TcPacket;
use underpass_logic::packet::{ip::Ip, tcp::Tcp, udp::Udp};

underpass_kernel::license!();

/// 1 to tell of each packet.
#[unsafe(no_mangle)]
static EACH: u32 = 0;

#[btf_map]
static PASSAGES: LruPerCpuHashMap<Passage, Passed, 65536> = LruPerCpuHashMap::new();

#[btf_map]
static COUNTERS: PerCpuArray<u64, { passing::COUNT as usize }> = PerCpuArray::new();

#[btf_map]
static PACKETS: RingBuf<PacketNote, { 1 << 20 }> = RingBuf::new();

#[classifier]
pub fn watch_ingress(ctx: TcContext) -> i32 {
    count(ctx, false);
    TC_ACT_UNSPEC
}

#[classifier]
pub fn watch_egress(ctx: TcContext) -> i32 {
    count(ctx, true);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn count(ctx: TcContext, out: bool) {
    // SAFETY: the context of this program type. What is forwarded has no socket.
    let own = out && unsafe { !(*ctx.skb.skb).__bindgen_anon_2.sk.is_null() };
    let Some((passage, payload)) = passage(&TcPacket::new(ctx), out) else { return };
    // SAFETY: a helper without preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(passed) = PASSAGES.get_ptr_mut(&passage) {
        // SAFETY: this CPU's value.
        unsafe {
            // Another CPU may have made the entry.
            if (*passed).started == 0 {
                (*passed).started = now;
            }
            (*passed).seen = now;
            let bytes = if out { &mut (*passed).out_bytes } else { &mut (*passed).in_bytes };
            *bytes += payload;
            (*passed).own |= u64::from(own);
        }
    } else {
        let (in_bytes, out_bytes) = if out { (0, payload) } else { (payload, 0) };
        let passed = Passed { started: now, seen: now, in_bytes, out_bytes, own: u64::from(own) };
        const NOEXIST: u64 = 1;
        if PASSAGES.insert(&passage, &passed, NOEXIST).is_ok() {
            add(passing::ENTERED, 1);
        }
    }
    // SAFETY: a read of an initialised static, which the user side sets before the load.
    if unsafe { core::ptr::read_volatile(&raw const EACH) } == 1 {
        tell(PacketNote { at: now, passage, payload: payload as u32, out: u32::from(out) });
    }
}

/// RFC 768
const UDP_HEADER: usize = 8;

/// The flow of a packet, and how many bytes of payload it has.
#[inline(always)]
fn passage(packet: &TcPacket, out: bool) -> Option<(Passage, u64)> {
    let ip = Ip::parse(packet).ok()?;
    let (source, destination) = (ip.source(packet).ok()?.0, ip.destination(packet).ok()?.0);
    let (mut from, mut to, mut payload) = (0, 0, ip.payload);
    if let Ok(tcp) = Tcp::parse(packet, &ip) {
        (from, to, payload) = (tcp.source_port, tcp.destination_port, tcp.payload);
    } else if let Ok(udp) = Udp::parse(packet, &ip) {
        (from, to, payload) = (udp.source_port, udp.destination_port, ip.payload + UDP_HEADER);
    }
    let (beyond, behind) = if out { (destination, source) } else { (source, destination) };
    let (beyond_port, behind_port) = if out { (to, from) } else { (from, to) };
    let passage =
        Passage { beyond, behind, beyond_port, behind_port, protocol: ip.protocol, padding: [0; 3] };
    Some((passage, ip.end.saturating_sub(payload) as u64))
}

/// Tells of a packet, within bounds; what is beyond them is counted.
#[inline(always)]
fn tell(note: PacketNote) {
    const SECOND: u64 = 1_000_000_000;
    if note.at - value(passing::SINCE) > SECOND {
        set(passing::SINCE, note.at);
        set(passing::TOLD, 0);
    }
    if value(passing::TOLD) < passing::A_SECOND && PACKETS.output(&note, u64::from(BPF_RB_NO_WAKEUP)).is_ok()
    {
        add(passing::TOLD, 1);
    } else {
        add(passing::UNTOLD, 1);
    }
}

#[inline(always)]
fn value(index: u32) -> u64 {
    COUNTERS.get(index).copied().unwrap_or(0)
}

#[inline(always)]
fn set(index: u32, value: u64) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's value.
        unsafe { *counter = value };
    }
}

#[inline(always)]
fn add(index: u32, count: u64) {
    set(index, value(index) + count);
}
