//! DNS messages over UDP (RFC 1035, 4.1; RFC 6891 for OPT), as far as an answer with
//! one record needs reading. Names are walked, never followed, so nothing can loop.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    network_endian::{U16, U32},
};

use crate::packet::{Packet, Short, header};

/// The header (RFC 1035, 4.1.1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Query and answer have the same.
    pub id: U16,
    /// Of [`flags`], and what is between them.
    pub flags: U16,
    /// Entries in the question section.
    pub question_count: U16,
    /// Records in the answer section.
    pub answer_count: U16,
    /// Records in the authority section.
    pub authority_count: U16,
    /// Records in the additional section.
    pub additional_count: U16,
}
header!(Header, 12);

/// Bits of [`Header::flags`].
pub mod flags {
    /// QR: an answer, not a query.
    pub const RESPONSE: u16 = 0x8000;
    /// AA: the server is an authority for the name.
    pub const AUTHORITATIVE: u16 = 0x0400;
    /// TC: cut, ask again over TCP.
    pub const TRUNCATED: u16 = 0x0200;
}

/// Record types.
pub mod kind {
    /// An IPv4 address.
    pub const A: u16 = 1;
    /// An IPv6 address (RFC 3596).
    pub const AAAA: u16 = 28;
    /// EDNS (RFC 6891).
    pub const OPT: u16 = 41;
}

/// Type and class behind a question's name.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Question {
    kind: U16,
    class: U16,
}
header!(Question, 4);

/// What follows a record's name (RFC 1035, 4.1.3).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHeader {
    kind: U16,
    class: U16,
    time_to_live: U32,
    length: U16,
}
header!(RecordHeader, 10);

/// The most labels that a name can have, with the root's: 255 bytes, two for each other.
const MAX_LABELS: usize = 128;

/// Where a name ends, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Name {
    /// The offset behind the name.
    end: usize,
    /// The name's first byte: a label's length, 0 for the root, or 0xc0 and up for a
    /// pointer to elsewhere in the message.
    first: u8,
}

impl Name {
    #[inline(always)]
    fn skip<P: Packet + ?Sized>(packet: &P, from: usize) -> Result<Self, Malformed> {
        let [first] = packet.bytes(from)?;
        let mut at = from;
        let mut length = first;
        let first = packet.forget(usize::from(first)) as u8;
        for _ in 0..MAX_LABELS {
            match length {
                0 => return Ok(Self { end: packet.forget(at + 1), first }),
                1..=63 => at = packet.forget(at + 1 + usize::from(length)),
                0xc0.. => return Ok(Self { end: packet.forget(at + 2), first }),
                64..0xc0 => return Err(Malformed),
            }
            let [next] = packet.bytes(at)?;
            length = next;
        }
        Err(Malformed)
    }
}

/// What cannot be read as far as was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl From<Short> for Malformed {
    fn from(Short: Short) -> Self {
        Self
    }
}

/// Whether a message carries an OPT record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opt {
    /// It does.
    Present,
    /// It does not.
    Absent,
    /// There are records that were not looked at.
    Unknown,
}

impl Opt {
    /// The same, by a way that the verifier does not follow: what comes after it is
    /// looked at once, not once for each way that led here.
    #[inline(always)]
    fn forgotten<P: Packet + ?Sized>(self, packet: &P) -> Self {
        match packet.forget(self as usize) {
            0 => Self::Present,
            1 => Self::Absent,
            _ => Self::Unknown,
        }
    }
}

/// The single answer record of a message, and what is around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SingleAnswer {
    /// Whether the record spells its name out although the question has it already.
    pub full_name: bool,
    /// The record's type.
    pub kind: u16,
    /// The offset of the record's data in the packet.
    pub data: usize,
    /// The length of the record's data in bytes.
    pub length: usize,
    /// Whether the message carries an OPT record.
    pub opt: Opt,
}

impl SingleAnswer {
    /// Reads the question and the answer record of a message at offset `at` whose
    /// header says that it has one of each; `end` is where the datagram ends.
    ///
    /// # Errors
    /// [`Malformed`] where the bytes do not hold what the header says.
    #[inline(always)]
    pub fn parse<P: Packet + ?Sized>(
        packet: &P,
        header: &Header,
        at: usize,
        end: usize,
    ) -> Result<Self, Malformed> {
        let question = Name::skip(packet, at + Header::LEN)?;
        let owner_at = packet.forget(question.end + Question::LEN);
        let owner = Name::skip(packet, owner_at)?;
        let record = RecordHeader::read(packet, owner.end)?;
        let data = packet.forget(owner.end + RecordHeader::LEN);
        let length = usize::from(record.length.get());
        let behind = packet.forget(data + length);
        if behind > end {
            return Err(Malformed);
        }
        let opt = match (header.authority_count.get(), header.additional_count.get()) {
            (_, 0) => Opt::Absent,
            // An OPT record has the root's name.
            (0, 1) => match packet.bytes::<3>(behind) {
                Ok([0, high, low]) if u16::from_be_bytes([high, low]) == kind::OPT => Opt::Present,
                Ok(_) => Opt::Absent,
                Err(Short) => return Err(Malformed),
            },
            (0, _) => match packet.bytes::<3>(behind) {
                Ok([0, high, low]) if u16::from_be_bytes([high, low]) == kind::OPT => Opt::Present,
                _ => Opt::Unknown,
            },
            _ => Opt::Unknown,
        };
        // A pointer to the root would be longer than the root itself.
        let full_name = owner.first == question.first && (1..=63).contains(&owner.first);
        Ok(Self {
            full_name: packet.forget(usize::from(full_name)) != 0,
            kind: record.kind.get(),
            data,
            length,
            opt: opt.forgotten(packet),
        })
    }
}

/// Whether a query at offset `at` carries an OPT record, as far as its header and one
/// record behind the question tell: in a query nothing else is there.
///
/// # Errors
/// [`Malformed`] where it is no query with one question.
#[inline(always)]
pub fn query_has_opt<P: Packet + ?Sized>(packet: &P, header: &Header, at: usize) -> Result<bool, Malformed> {
    if header.flags.get() & flags::RESPONSE != 0 || header.question_count.get() != 1 {
        return Err(Malformed);
    }
    if header.answer_count.get() != 0
        || header.authority_count.get() != 0
        || header.additional_count.get() == 0
    {
        return Ok(false);
    }
    let question = Name::skip(packet, at + Header::LEN)?;
    let [root, high, low] = packet.bytes(packet.forget(question.end + Question::LEN))?;
    Ok(root == 0 && u16::from_be_bytes([high, low]) == kind::OPT)
}
