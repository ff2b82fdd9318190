//! What happens to a datagram, on its way in and on its way back.

use underpass_abi::mux::{FALLBACK_DROP, FALLBACK_PASS, Flow, Table, counter};

use super::table::{find, halves};
use crate::packet::{Packet, PacketMut, Short, icmp::Quote, ip::Fragment, udp::Datagram};

/// What happens to a packet that comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It is none of this: not UDP, or not for this port.
    NotOurs,
    /// It goes to another port.
    Goes {
        /// What was parsed of it.
        datagram: Datagram,
        /// The port.
        port: u16,
        /// What to count it as.
        counter: u32,
    },
    /// It passes as it is.
    Passes,
    /// It is dropped.
    Dropped {
        /// What to count it as.
        counter: u32,
    },
}

/// Decides about a packet that comes in. `segment` is the size of the datagrams
/// that the kernel will cut it into, 0 if it is one datagram.
#[inline(always)]
pub fn arrival<P: PacketMut + ?Sized>(packet: &mut P, table: &Table, segment: usize) -> Arrival {
    let Ok(datagram) = Datagram::parse(packet) else { return Arrival::NotOurs };
    if datagram.udp.destination_port != table.port {
        return Arrival::NotOurs;
    }
    // A first fragment has less than its header says.
    let there = datagram.udp.payload_length();
    let length = match datagram.ip.fragment {
        Fragment::Whole => there,
        Fragment::First | Fragment::Later => match whole_length(packet, &datagram) {
            Ok(length) => length,
            Err(Short) => return Arrival::NotOurs,
        },
    };
    if segment != 0 && segment < length {
        return Arrival::Dropped { counter: counter::SEGMENTED };
    }
    if length < table.min_length as usize || length > table.max_length as usize {
        return Arrival::Dropped { counter: counter::WRONG_LENGTH };
    }
    let payload = packet.forget(datagram.udp.payload_at());
    let there = packet.forget(there);
    packet.gather(payload + usize::from(table.reach));
    let packet = &*packet;
    // It may be behind the payload, in a frame's padding: `window` sees to that.
    let byte = |at: usize| packet.bytes(packet.forget(payload + at)).ok().map(|[byte]: [u8; 1]| byte);
    let window = |end: usize| {
        if end > there {
            return None;
        }
        // Headers of 42 bytes and more are before the payload.
        packet.bytes(packet.forget(payload + end - 16)).ok().map(halves)
    };
    match find(table, byte, window, |value| packet.forget(value)) {
        Some(slot) => Arrival::Goes { datagram, port: slot.port, counter: u32::from(slot.counter) },
        None if there < length => Arrival::Dropped { counter: counter::FRAGMENT },
        None if table.fallback == FALLBACK_PASS => Arrival::Passes,
        None if table.fallback >= FALLBACK_DROP => Arrival::Dropped { counter: counter::NO_ROUTE },
        None => Arrival::Goes { datagram, port: table.fallback as u16, counter: counter::DEFAULT },
    }
}

/// The payload's length by the header, in bytes.
#[inline(always)]
fn whole_length<P: Packet + ?Sized>(packet: &P, datagram: &Datagram) -> Result<usize, Short> {
    let length = usize::from(u16::from_be_bytes(packet.bytes(datagram.udp.header + 4)?));
    Ok(length.saturating_sub(8))
}

/// The flow of a datagram that comes in and goes to a port.
///
/// # Errors
/// None, for a packet that `datagram` was parsed from.
#[inline(always)]
pub fn flow_in<P: Packet + ?Sized>(packet: &P, datagram: &Datagram, port: u16) -> Result<Flow, Short> {
    let (client, local) = datagram.ip.endpoints(packet)?;
    Ok(Flow { client, local, client_port: datagram.udp.source_port, service_port: port, zero: 0 })
}

/// The flow of a datagram that goes out.
///
/// # Errors
/// None, for a packet that `datagram` was parsed from.
#[inline(always)]
pub fn flow_out<P: Packet + ?Sized>(packet: &P, datagram: &Datagram) -> Result<Flow, Short> {
    let (local, client) = datagram.ip.endpoints(packet)?;
    Ok(Flow {
        client,
        local,
        client_port: datagram.udp.destination_port,
        service_port: datagram.udp.source_port,
        zero: 0,
    })
}

/// The flow of the datagram that an ICMP error is about, which came in.
///
/// # Errors
/// [`Short`] if the packet is cut.
#[inline(always)]
pub fn flow_quoted<P: Packet + ?Sized>(packet: &P, quote: &Quote) -> Result<Flow, Short> {
    let (client, local) = quote.ip.endpoints(packet)?;
    Ok(Flow { client, local, client_port: quote.source_port, service_port: quote.destination_port, zero: 0 })
}
