//! The packet library at work, with nothing else: what its tests and benchmarks run.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    helpers::generated::bpf_redirect,
    macros::{classifier, map, xdp},
    maps::Array,
    programs::{TcContext, XdpContext},
};
use underpass_kernel::packet::{TcPacket, XdpPacket};
use underpass_logic::packet::{Packet, PacketMut, Unparsed, rewrite, udp::Datagram};

underpass_kernel::license!();

/// How often the last program came to a payload: a result that cannot be optimised away.
#[map]
static PAYLOADS: Array<u64> = Array::with_max_entries(1, 0);

#[xdp]
pub fn packet_pass_xdp(ctx: XdpContext) -> u32 {
    parse(&XdpPacket::new(ctx));
    XDP_PASS
}

#[classifier]
pub fn packet_pass_tc(ctx: TcContext) -> i32 {
    parse(&TcPacket::new(ctx));
    TC_ACT_OK
}

/// Drops what it could not move to the port that the payload's first two bytes name.
#[xdp]
pub fn packet_port_xdp(ctx: XdpContext) -> u32 {
    match move_port(&mut XdpPacket::new(ctx)) {
        Ok(()) => XDP_PASS,
        Err(_) => XDP_DROP,
    }
}

/// Drops what it could not move to the port that the payload's first two bytes name.
#[classifier]
pub fn packet_port_tc(ctx: TcContext) -> i32 {
    match move_port(&mut TcPacket::new(ctx)) {
        Ok(()) => TC_ACT_OK,
        Err(_) => TC_ACT_SHOT,
    }
}

/// Nothing but the verdict: what running a program costs at all.
#[xdp]
pub fn packet_bare_pass_xdp(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// Nothing but the verdict: what running a program costs at all.
#[xdp]
pub fn packet_bare_drop_xdp(_ctx: XdpContext) -> u32 {
    XDP_DROP
}

/// Nothing but the verdict: what running a program costs at all.
#[classifier]
pub fn packet_bare_tc(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[unsafe(no_mangle)]
static TARGET: u32 = 0;

/// Sends each packet out by the interface TARGET: what makes a stream of packets of one,
/// run on live frames.
#[xdp]
pub fn packet_send_xdp(_ctx: XdpContext) -> u32 {
    // SAFETY: the static is initialised; the volatile read keeps the loader's value.
    let target = unsafe { core::ptr::read_volatile(&raw const TARGET) };
    // SAFETY: no pointers.
    unsafe { bpf_redirect(target, 0) as u32 }
}

#[inline(always)]
fn parse<P: Packet>(packet: &P) {
    if let Ok(datagram) = Datagram::parse(packet)
        && let Ok([first]) = datagram.udp.payload(packet, 0)
        && let Some(count) = PAYLOADS.get_ptr_mut(0)
    {
        // SAFETY: the map's value; what is lost to a race does not matter here.
        unsafe { *count += u64::from(first) }
    }
}

#[inline(always)]
fn move_port<P: PacketMut>(packet: &mut P) -> Result<(), Unparsed> {
    let datagram = Datagram::parse(packet)?;
    let port = datagram.udp.payload(packet, 0)?;
    rewrite::udp_destination_port(packet, &datagram, u16::from_be_bytes(port))?;
    Ok(())
}
