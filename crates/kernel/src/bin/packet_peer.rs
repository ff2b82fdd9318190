//! The yardstick of `./dev bench packet` in Rust: what `packet_pass_xdp` does, written as
//! programs on network-types are, with an unchecked pointer a header.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    macros::{map, xdp},
    maps::Array,
    programs::XdpContext,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

underpass_kernel::license!();

#[map]
static PAYLOADS: Array<u64> = Array::with_max_entries(1, 0);

#[xdp]
pub fn peer_pass_xdp(ctx: XdpContext) -> u32 {
    parse(&ctx);
    XDP_PASS
}

/// As its examples do: no VLAN tags, no extension headers, no fragments, no lengths.
#[inline(always)]
#[expect(clippy::wildcard_enum_match_arm, reason = "of all kinds of frames two carry UDP")]
fn parse(ctx: &XdpContext) -> Option<()> {
    let ethernet: *const EthHdr = pointer(ctx, 0)?;
    // SAFETY: `pointer` has compared the header with the packet's end.
    let (at, protocol) = match unsafe { (*ethernet).ether_type } {
        EtherType::Ipv4 => {
            let ip: *const Ipv4Hdr = pointer(ctx, EthHdr::LEN)?;
            // SAFETY: as above.
            let (length, protocol) = unsafe { (usize::from((*ip).ihl()) * 4, (*ip).proto) };
            (EthHdr::LEN + length, protocol)
        }
        EtherType::Ipv6 => {
            let ip: *const Ipv6Hdr = pointer(ctx, EthHdr::LEN)?;
            // SAFETY: as above.
            (EthHdr::LEN + Ipv6Hdr::LEN, unsafe { (*ip).next_hdr })
        }
        _ => return None,
    };
    if !matches!(protocol, IpProto::Udp) {
        return None;
    }
    let _: *const UdpHdr = pointer(ctx, at)?;
    let payload: *const u8 = pointer(ctx, at + UdpHdr::LEN)?;
    let count = PAYLOADS.get_ptr_mut(0)?;
    // SAFETY: the map's value, and a byte within the packet.
    unsafe { *count += u64::from(*payload) }
    Some(())
}

#[inline(always)]
fn pointer<T>(ctx: &XdpContext, at: usize) -> Option<*const T> {
    let start = ctx.data() + at;
    (start + size_of::<T>() <= ctx.data_end()).then_some(start as *const T)
}
