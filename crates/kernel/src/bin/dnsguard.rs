//! dnsguard: drops forged DNS answers before the network stack sees them.
//!
//! Hooks: XDP or TC ingress for answers, TC egress for the queries before them.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    btf_maps::{Array, LpmTrie, PerCpuArray, lpm_trie::Key},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use underpass_abi::{
    attachment::Attachment,
    dnsguard::{
        Answered, Counters, Learned, MAX_BOGUS, MEMORY_SLOTS, Policy, RESOLVER_SLOTS, SAMPLES_PER_CPU,
        Sample, Settings,
    },
};
use underpass_kernel::{
    dnsguard::{Maps, guard, keep_sample},
    packet::{LinearPacket, XdpPacket},
    settings,
};
use underpass_logic::{
    dnsguard::{PORT, note_query},
    packet::{Packet, ip::Address, udp::Datagram},
};

underpass_kernel::license!();

#[unsafe(no_mangle)]
static SETTINGS: Settings = Settings::EMPTY;

/// The list of bogus addresses and networks, mapped into IPv6.
#[btf_map]
static BOGUS: LpmTrie<[u8; 16], u8, MAX_BOGUS> = LpmTrie::new();

#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

#[btf_map]
static SAMPLES: PerCpuArray<Sample, SAMPLES_PER_CPU> = PerCpuArray::new();

#[btf_map]
static LEARNED: Array<Learned, RESOLVER_SLOTS> = Array::new();

#[btf_map]
static QUERIES: Array<u64, MEMORY_SLOTS> = Array::new();

#[btf_map]
static ANSWERED: Array<Answered, MEMORY_SLOTS> = Array::new();

/// For the user side alone.
#[btf_map]
static ATTACHMENT: Array<Attachment, 1> = Array::new();

/// For the user side alone.
#[btf_map]
static POLICY: Array<Policy, 1> = Array::new();

#[xdp]
pub fn dnsguard_xdp(ctx: XdpContext) -> u32 {
    if is_forged(&XdpPacket::new(ctx)) { XDP_DROP } else { XDP_PASS }
}

#[classifier]
pub fn dnsguard_tc(ctx: TcContext) -> i32 {
    // What is not dropped goes on to the next program or filter.
    if is_forged(&dns_packet(ctx)) { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

/// Sees queries leave, so that an answer can be compared with its query.
#[classifier]
pub fn dnsguard_egress(ctx: TcContext) -> i32 {
    let packet = dns_packet(ctx);
    if note_query(&packet, settings!(SETTINGS), &mut memory())
        && let Some(counters) = COUNTERS.get_ptr_mut(0)
    {
        // SAFETY: this CPU's own value.
        unsafe { (*counters).queries += 1 };
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn is_forged<P: Packet>(packet: &P) -> bool {
    guard(packet, settings!(SETTINGS), &mut memory(), &COUNTERS, |packet, judgement, counters| {
        keep_sample(packet, judgement, counters, &SAMPLES);
    })
}

/// A packet of which all is linear that matters, if it is DNS.
#[inline(always)]
fn dns_packet(ctx: TcContext) -> LinearPacket {
    LinearPacket::new(ctx, MAX_DNS_PACKET, |packet| {
        Datagram::parse(packet)
            .is_ok_and(|datagram| datagram.udp.source_port == PORT || datagram.udp.destination_port == PORT)
    })
}

/// The most of a DNS packet that is made linear: what fits an Ethernet link.
const MAX_DNS_PACKET: u32 = 1522;

#[inline(always)]
fn memory() -> Maps {
    Maps {
        tick_ns: settings!(SETTINGS).tick_ns,
        queries: &QUERIES,
        answered: &ANSWERED,
        learned: &LEARNED,
        is_bogus,
    }
}

#[inline(always)]
fn is_bogus(address: Address) -> bool {
    BOGUS.get(&Key::new(128, address.0)).is_some()
}
