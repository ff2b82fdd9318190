//! UDP demultiplexed by what the payload says: `mux_xdp` or `mux_in` (TC) sends a
//! datagram on to its service, `mux_out` (TC) lets the replies leave with the port
//! that the client spoke to.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{
        TC_ACT_PIPE, TC_ACT_SHOT,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{classifier, map, xdp},
    maps::{Array, LruHashMap, PerCpuArray},
    programs::{TcContext, XdpContext},
};
use underpass_abi::{
    attachment::Attachment,
    mux::{Flow, SpokenTo, Table, counter},
};
use underpass_kernel::packet::{LinearPacket, TcPacket, XdpPacket};
use underpass_logic::{
    mux::datagram::{Arrival, arrival, flow_in, flow_out, flow_quoted},
    packet::{
        Packet, PacketMut, Short, Unparsed,
        icmp::Quote,
        ip::Ip,
        rewrite,
        udp::{Datagram, Udp},
    },
};

underpass_kernel::license!();

/// Headers end before this many bytes, or they are none that anybody means well with.
const HEAD: usize = 256;

/// The routes: the one that `ACTIVE` names is in use, the other is free to be written.
#[map]
static TABLES: Array<Table> = Array::with_max_entries(2, 0);

/// Which of the tables is in use.
#[map]
static ACTIVE: Array<u32> = Array::with_max_entries(1, 0);

/// Who spoke to which port. The user side sets its size.
#[map]
static FLOWS: LruHashMap<Flow, SpokenTo> = LruHashMap::with_max_entries(65_536, 0);

/// What happened to how many datagrams.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// For the user side alone: what `show` and `status` need to know.
#[map]
static ATTACHMENT: Array<Attachment> = Array::with_max_entries(1, 0);

#[xdp]
pub fn mux_xdp(ctx: XdpContext) -> u32 {
    match receive(&mut XdpPacket::new(ctx), 0) {
        Fate::Passes => XDP_PASS,
        Fate::Dropped => XDP_DROP,
    }
}

// PIPE, not OK: other filters on the interface have their say, too.
#[classifier]
pub fn mux_in(ctx: TcContext) -> i32 {
    let mut packet = LinearPacket::with_head(ctx, HEAD);
    let segment = packet.segment_size();
    match receive(&mut packet, segment) {
        Fate::Passes => TC_ACT_PIPE,
        Fate::Dropped => TC_ACT_SHOT,
    }
}

#[classifier]
pub fn mux_out(ctx: TcContext) -> i32 {
    // What cannot be rewritten leaves as it is.
    let _ = reply(&mut TcPacket::new(ctx));
    TC_ACT_PIPE
}

enum Fate {
    Passes,
    Dropped,
}

#[inline(always)]
fn receive<P: PacketMut>(packet: &mut P, segment: usize) -> Fate {
    let Some(table) = ACTIVE.get(0).and_then(|active| TABLES.get(*active)) else { return Fate::Passes };
    match arrival(packet, table, segment) {
        Arrival::NotOurs => Fate::Passes,
        Arrival::Passes => {
            count(counter::PASSED);
            Fate::Passes
        }
        Arrival::Dropped { counter } => {
            count(counter);
            Fate::Dropped
        }
        Arrival::Goes { datagram, port, counter } => {
            count(counter);
            match send_on(packet, &datagram, port) {
                Ok(()) => Fate::Passes,
                // The packet ends within its headers, which have been read: it cannot be.
                Err(Short) => Fate::Dropped,
            }
        }
    }
}

#[inline(always)]
fn send_on<P: PacketMut>(packet: &mut P, datagram: &Datagram, port: u16) -> Result<(), Short> {
    let spoken_to = datagram.udp.destination_port;
    if port == spoken_to {
        return Ok(());
    }
    note(&flow_in(packet, datagram, port)?, spoken_to);
    rewrite::udp_destination_port(packet, datagram, port)
}

/// Notes a flow that is new or was spoken to on another port before.
#[inline(always)]
fn note(flow: &Flow, spoken_to: u16) {
    let spoken_to = SpokenTo::from(spoken_to);
    // SAFETY: the value is one aligned integer, which nothing frees while a program runs.
    if unsafe { FLOWS.get(flow) }.is_some_and(|known| *known == spoken_to) {
        return;
    }
    match FLOWS.insert(flow, &spoken_to, 0) {
        Ok(()) => count(counter::NEW_FLOWS),
        Err(_) => count(counter::LOST_FLOWS),
    }
}

#[inline(always)]
fn reply<P: PacketMut>(packet: &mut P) -> Result<(), Unparsed> {
    let ip = forget(packet, Ip::parse(packet)?);
    match Udp::parse(packet, &ip) {
        Ok(udp) => {
            let datagram = Datagram { ip, udp };
            if let Some(port) = spoken_to(&flow_out(packet, &datagram)?) {
                rewrite::udp_source_port(packet, &datagram, port)?;
                count(counter::REPLIES);
            }
            Ok(())
        }
        Err(Unparsed::OtherProtocol) => error(packet, &ip),
        Err(other) => Err(other),
    }
}

/// An ICMP error that this host sends about a datagram, for instance as the service
/// is not running, must speak of the port that the client knows.
#[inline(always)]
fn error<P: PacketMut>(packet: &mut P, ip: &Ip) -> Result<(), Unparsed> {
    let mut quote = Quote::parse(packet, ip)?;
    quote.ip = forget(packet, quote.ip);
    if let Some(port) = spoken_to(&flow_quoted(packet, &quote)?) {
        rewrite::quoted_destination_port(packet, ip, &quote, port)?;
        count(counter::ERRORS);
    }
    Ok(())
}

/// Makes the verifier forget which of the many ways through the headers led here:
/// otherwise it follows what comes next for each of them.
#[inline(always)]
fn forget<P: Packet>(packet: &P, ip: Ip) -> Ip {
    Ip {
        header: packet.forget(ip.header),
        payload: packet.forget(ip.payload),
        end: packet.forget(ip.end),
        ..ip
    }
}

#[inline(always)]
fn spoken_to(flow: &Flow) -> Option<u16> {
    // SAFETY: the value is one aligned integer, which nothing frees while a program runs.
    unsafe { FLOWS.get(flow) }.map(|port| *port as u16)
}

#[inline(always)]
fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's value, and programs are not interrupted by their like.
        unsafe { *counter += 1 }
    }
}
