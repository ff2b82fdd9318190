//! dnsguard for loaders that know nothing of underpass, such as `ip link set dev X xdp
//! obj FILE`: its settings are written into the object, the program is in the section
//! that iproute2 takes by default, and there is nothing that somebody would have to fill.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS},
        xdp_md,
    },
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_ktime_get_ns,
    macros::btf_map,
    programs::XdpContext,
};
use underpass_abi::dnsguard::{Answered, Counters, Learned, MAX_RANGES, RESOLVER_SLOTS, Range, Settings};
use underpass_kernel::{
    dnsguard::guard,
    packet::{XdpPacket, forget, unknown_zero},
    settings,
};
use underpass_logic::{dnsguard::Memory, packet::ip::Address};

underpass_kernel::license!();

#[unsafe(no_mangle)]
static SETTINGS: Settings = Settings::EMPTY;

/// The bogus addresses: as many as [`Settings::range_count`] says.
#[unsafe(no_mangle)]
static RANGES: [Range; MAX_RANGES] = [Range::EMPTY; MAX_RANGES];

#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

#[btf_map]
static LEARNED: Array<Learned, RESOLVER_SLOTS> = Array::new();

/// In `prog`, where iproute2 looks if it is not told a section.
#[unsafe(no_mangle)]
#[unsafe(link_section = "prog")]
pub fn dnsguard(ctx: *mut xdp_md) -> u32 {
    let packet = XdpPacket::new(XdpContext::new(ctx));
    if guard(&packet, settings!(SETTINGS), &mut Alone, &COUNTERS, |_, _, _| ()) { XDP_DROP } else { XDP_PASS }
}

/// What is remembered without another program that sees queries.
struct Alone;

impl Memory for Alone {
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: no arguments, no memory.
        unsafe { bpf_ktime_get_ns() }
    }

    /// A binary search.
    #[inline(always)]
    fn is_bogus(&self, address: Address) -> bool {
        let address = u128::from_be_bytes(address.0);
        let zero = unknown_zero(address as u32);
        let ranges = settings!(RANGES);
        let (mut low, mut high) = (0, settings!(SETTINGS).range_count as usize);
        for _ in 0..=MAX_RANGES.ilog2() {
            if low >= high {
                break;
            }
            let middle = usize::midpoint(low, high);
            let range = &ranges[middle % MAX_RANGES];
            if address < join(range.first) {
                high = forget(middle, zero);
            } else if address > join(range.last) {
                low = forget(middle + 1, zero);
            } else {
                return true;
            }
        }
        false
    }

    #[inline(always)]
    fn query(&self, _slot: usize) -> u64 {
        0
    }

    #[inline(always)]
    fn set_query(&mut self, _slot: usize, _query: u64) {}

    #[inline(always)]
    fn learned(&mut self, slot: usize) -> Option<&mut Learned> {
        // SAFETY: a value of the map. Two CPUs may mix theirs: the next answers mend it.
        LEARNED.get_ptr_mut(slot as u32).map(|value| unsafe { &mut *value })
    }

    #[inline(always)]
    fn answered(&mut self, _slot: usize) -> Option<&mut Answered> {
        None
    }
}

#[inline(always)]
fn join([high, low]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}
