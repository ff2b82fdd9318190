//! Where a message in a stream ends.

/// How messages are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// All have this length, in bytes.
    Fixed(u32),
    /// Each carries its length, a big-endian integer.
    Length {
        /// The integer's width in bytes: 2 or 4.
        width: u8,
        /// Bytes of the message before it.
        offset: u16,
        /// What it does not count: the message has this many bytes more than it says.
        plus: u16,
    },
}

/// The length says less than what was read to find it: nothing that follows can be
/// told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contradiction {
    /// The length of the whole message by its own account, in bytes.
    pub says: u64,
}

impl Frame {
    /// How many bytes of a message tell its length.
    pub const fn header(&self) -> usize {
        match *self {
            Self::Fixed(_) => 0,
            Self::Length { width, offset, .. } => offset as usize + width as usize,
        }
    }

    /// The length of the whole message that starts here, in bytes, once enough of
    /// it is there to say.
    ///
    /// # Errors
    /// Where the length that it carries is shorter than the header that carries it,
    /// or zero.
    pub fn length(&self, bytes: &[u8]) -> Result<Option<u64>, Contradiction> {
        let (width, offset, plus) = match *self {
            Self::Fixed(length) => return Ok(Some(u64::from(length))),
            Self::Length { width, offset, plus } => (usize::from(width), usize::from(offset), plus),
        };
        let Some(field) = bytes.get(offset..offset + width) else { return Ok(None) };
        let value = field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let says = value + u64::from(plus);
        if says < (offset + width) as u64 { Err(Contradiction { says }) } else { Ok(Some(says)) }
    }
}
