//! Packets, read and rewritten by the same code in XDP, in TC, on the host and in
//! a fuzzer.
//!
//! A [`Packet`] is anything that gives out bytes at an offset: a slice here, an
//! XDP or TC context in the kernel programs. All parsing is written on it, so
//! nothing above it has `unsafe`, a bounds check of its own, or a byte-order call.
//! Every offset counts from the first byte of the Ethernet header.
//!
//! A port multiplexer that sends datagrams on to another port by the text at byte
//! 20 of their payload is all of this:
//!
//! ```
//! use underpass_logic::packet::{Packet, PacketMut, Short, Unparsed, rewrite, udp::Datagram};
//!
//! enum Verdict {
//!     Moved,
//!     NotOurs,
//!     Unparsed(Unparsed),
//! }
//!
//! const PORT: u16 = 5000;
//! const ROUTES: [([u8; 3], u16); 2] = [(*b"600", 5001), (*b"601", 5002)];
//!
//! fn demultiplex(packet: &mut impl PacketMut) -> Verdict {
//!     match decide(packet) {
//!         Ok(true) => Verdict::Moved,
//!         Ok(false) => Verdict::NotOurs,
//!         Err(why) => Verdict::Unparsed(why),
//!     }
//! }
//!
//! fn decide(packet: &mut impl PacketMut) -> Result<bool, Unparsed> {
//!     let datagram = Datagram::parse(packet)?;
//!     if datagram.udp.destination_port != PORT {
//!         return Ok(false);
//!     }
//!     let tag: [u8; 3] = datagram.udp.payload(packet, 20)?;
//!     for (text, port) in ROUTES {
//!         if tag == text {
//!             rewrite::udp_destination_port(packet, &datagram, port)?;
//!             return Ok(true);
//!         }
//!     }
//!     Ok(false)
//! }
//! # let mut frame = [0; 80];
//! # assert!(matches!(demultiplex(&mut frame.as_mut_slice()), Verdict::Unparsed(Unparsed::NotIp)));
//! ```

#![expect(missing_docs, reason = "headers, fields and numbers have the names that their RFC gives them")]

pub mod checksum;
pub mod ethernet;
pub mod icmp;
pub mod ip;
pub mod rewrite;
pub mod tcp;
pub mod udp;

/// The bytes of one packet, from its Ethernet header on.
pub trait Packet {
    /// Whether a transport checksum in this packet may still be the sum of the
    /// pseudo-header alone, to be completed by hardware or by the kernel later on,
    /// with nothing to tell. That is so in XDP on veth.
    const MAYBE_PARTIAL: bool = false;

    /// The `N` bytes from offset `at` on.
    ///
    /// # Errors
    /// [`Short`] if the packet ends before.
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short>;

    /// The packet's length in bytes.
    fn len(&self) -> usize;

    /// Whether the packet has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `at` itself. In the kernel it makes the verifier forget what it knows about
    /// the value, so that the ways which led here become one: a parser calls it
    /// after every step of a length that the packet chooses.
    #[inline(always)]
    fn forget(&self, at: usize) -> usize {
        at
    }
}

/// A packet that can be changed in place.
pub trait PacketMut: Packet {
    /// Writes `bytes` from offset `at` on.
    ///
    /// # Errors
    /// [`Short`] if the packet ends before; nothing is written then.
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short>;

    /// Sees to it that the bytes before `end` can be read, if the packet has them: in TC
    /// they may lie behind what is read directly.
    #[inline(always)]
    fn gather(&mut self, end: usize) {
        let _ = end;
    }

    /// Brings a transport checksum up to date with a change of what it covers
    /// (`old` to `new`, starting at an even offset), however far it is computed.
    ///
    /// # Errors
    /// [`Short`] if the checksum is beyond the packet's end.
    #[inline(always)]
    fn update_checksum<const N: usize>(
        &mut self,
        checksum: &checksum::Place,
        old: [u8; N],
        new: [u8; N],
    ) -> Result<(), Short> {
        checksum::update_in_place(self, checksum, old, new)
    }
}

/// The packet ends before what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short;

/// Why there is nothing of the kind that was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unparsed {
    /// The packet ends before its headers, or what they announce, do.
    Short,
    /// A header contradicts itself, or has more parts than are followed.
    Malformed,
    /// Neither IPv4 nor IPv6 (after up to two VLAN tags).
    NotIp,
    /// IP, but not the transport protocol that was looked for.
    OtherProtocol,
    /// A fragment other than the first: it has no transport header.
    Fragment,
}

impl From<Short> for Unparsed {
    fn from(Short: Short) -> Self {
        Self::Short
    }
}

impl Packet for [u8] {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
        self.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(Short)
    }

    fn len(&self) -> usize {
        <[u8]>::len(self)
    }
}

impl PacketMut for [u8] {
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short> {
        *self.get_mut(at..).and_then(|rest| rest.first_chunk_mut()).ok_or(Short)? = bytes;
        Ok(())
    }
}

macro_rules! by_reference {
    ($reference:ty) => {
        impl<P: Packet + ?Sized> Packet for $reference {
            const MAYBE_PARTIAL: bool = P::MAYBE_PARTIAL;

            #[inline(always)]
            fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Short> {
                (**self).bytes(at)
            }

            #[inline(always)]
            fn len(&self) -> usize {
                (**self).len()
            }

            #[inline(always)]
            fn forget(&self, at: usize) -> usize {
                (**self).forget(at)
            }
        }
    };
}
by_reference!(&P);
by_reference!(&mut P);

impl<P: PacketMut + ?Sized> PacketMut for &mut P {
    #[inline(always)]
    fn set_bytes<const N: usize>(&mut self, at: usize, bytes: [u8; N]) -> Result<(), Short> {
        (**self).set_bytes(at, bytes)
    }

    #[inline(always)]
    fn gather(&mut self, end: usize) {
        (**self).gather(end);
    }

    #[inline(always)]
    fn update_checksum<const N: usize>(
        &mut self,
        checksum: &checksum::Place,
        old: [u8; N],
        new: [u8; N],
    ) -> Result<(), Short> {
        (**self).update_checksum(checksum, old, new)
    }
}

/// The `N` bytes at any `offset` behind `from`, if they are before `end`.
#[inline(always)]
fn bytes_before<P: Packet + ?Sized, const N: usize>(
    packet: &P,
    from: usize,
    offset: usize,
    end: usize,
) -> Result<[u8; N], Short> {
    if offset > usize::from(u16::MAX) {
        return Err(Short);
    }
    let at = packet.forget(from + offset);
    if at + N > end { Err(Short) } else { packet.bytes(at) }
}

/// Gives a header made of zerocopy's types its length and a way to be read.
macro_rules! header {
    ($name:ident, $length:literal) => {
        const _: () = assert!(size_of::<$name>() == $length);

        impl $name {
            /// The length in bytes, without options.
            #[allow(dead_code, reason = "of a private header it may not be needed")]
            pub const LEN: usize = $length;

            /// Reads the header at offset `at`.
            ///
            /// # Errors
            /// [`Short`](crate::packet::Short) if the packet ends before the header does.
            #[allow(dead_code, reason = "of a private header only the length may be needed")]
            #[inline(always)]
            pub fn read<P: $crate::packet::Packet + ?Sized>(
                packet: &P,
                at: usize,
            ) -> Result<Self, $crate::packet::Short> {
                Ok(zerocopy::transmute!(packet.bytes::<$length>(at)?))
            }
        }
    };
}
pub(crate) use header;
