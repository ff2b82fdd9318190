//! The ClientHello of TLS: RFC 8446, section 4.1.2; records: section 5.1.
//!
//! A hello may be cut into several records, and those into several segments. It is
//! read in one pass over what has arrived, without being put together first.

use super::Verdict;

/// The content type of handshake records.
const HANDSHAKE: u8 = 22;
/// The handshake type of a ClientHello.
const CLIENT_HELLO: u8 = 1;
/// The extension that carries the server's name (RFC 6066).
const SERVER_NAME: u16 = 0;
/// The extension that carries the application's protocols (RFC 7301).
const ALPN: u16 = 16;
/// The longest record, in bytes, without its header (RFC 8446, section 5.1).
const MAX_RECORD: usize = 1 << 14;
const RECORD_HEADER: usize = 5;
/// The longest name or list of protocols that is kept, in bytes.
const MAX_VALUE: usize = 255;

/// Whether a stream opens as TLS does: a handshake record of a version 3.x with a
/// length that is allowed, a ClientHello in it.
pub fn recognise(bytes: &[u8]) -> Verdict {
    let right = |at: usize, byte: u8| match at {
        0 => byte == HANDSHAKE,
        1 => byte == 3,
        2 => byte <= 4,
        3 => usize::from(byte) <= MAX_RECORD >> 8,
        4 => bytes[3] != 0 || byte != 0,
        _ => byte == CLIENT_HELLO,
    };
    if !bytes.iter().take(RECORD_HEADER + 1).enumerate().all(|(at, byte)| right(at, *byte)) {
        return Verdict::Miss;
    }
    if bytes.len() > RECORD_HEADER { Verdict::Match } else { Verdict::More(RECORD_HEADER + 1) }
}

/// What a ClientHello says, as far as it has arrived.
#[derive(Debug, Clone)]
pub struct Hello {
    end: End,
    name: Option<Value>,
    protocols: Option<Value>,
}

/// How the reading of a hello ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// All of it was there.
    Whole,
    /// It is cut off; this many bytes (in all) are needed to get on.
    Cut(usize),
    /// It is no ClientHello.
    Broken,
}

impl Hello {
    /// Reads as much as is there.
    pub fn read(bytes: &[u8]) -> Self {
        let mut hello = Self { end: End::Whole, name: None, protocols: None };
        if recognise(bytes) == Verdict::Miss {
            hello.end = End::Broken;
        } else if let Err(end) = hello.fill(&mut Handshake { bytes, at: 0, left: 0 }) {
            hello.end = end;
        }
        hello
    }

    /// The name of the server, if one has been read.
    pub fn server_name(&self) -> Option<&[u8]> {
        self.name.as_ref().map(Value::bytes)
    }

    /// The list of protocols, for [`protocols`], if one has been read.
    pub fn protocols(&self) -> Option<&[u8]> {
        self.protocols.as_ref().map(Value::bytes)
    }

    /// What a condition on one of the values says.
    pub(super) fn judge(
        &self,
        value: impl FnOnce(&Self) -> Option<&[u8]>,
        fits: impl FnOnce(&[u8]) -> bool,
    ) -> Verdict {
        match (value(self), self.end) {
            (Some(value), _) if fits(value) => Verdict::Match,
            (None, End::Cut(need)) => Verdict::More(need),
            (Some(_), _) | (None, End::Whole | End::Broken) => Verdict::Miss,
        }
    }

    fn fill(&mut self, from: &mut Handshake<'_>) -> Result<(), End> {
        if from.u8()? != CLIENT_HELLO {
            return Err(End::Broken);
        }
        let mut left = from.u24()?;
        take(&mut left, 2 + 32)?;
        from.skip(2 + 32)?; // version, random
        for width in [1, 2, 1] {
            // session id, cipher suites, compression methods
            let length = from.length(width)?;
            take(&mut left, width + length)?;
            from.skip(length)?;
        }
        if left == 0 {
            return Ok(()); // from before there were extensions
        }
        let extensions = from.length(2)?;
        take(&mut left, 2 + extensions)?;
        self.extensions(from, extensions)
    }

    fn extensions(&mut self, from: &mut Handshake<'_>, mut left: usize) -> Result<(), End> {
        while left > 0 {
            let kind = from.u16()?;
            let length = from.length(2)?;
            take(&mut left, 4 + length)?;
            match kind {
                SERVER_NAME if self.name.is_none() => self.name = server_name(from, length)?,
                ALPN if self.protocols.is_none() => self.protocols = protocol_list(from, length)?,
                _ => from.skip(length)?,
            }
        }
        Ok(())
    }
}

/// The protocols of a list, each with its length before it.
pub fn protocols(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = list;
    core::iter::from_fn(move || {
        let (length, after) = rest.split_first()?;
        let (protocol, after) = after.split_at_checked(usize::from(*length))?;
        rest = after;
        Some(protocol)
    })
}

/// The first host name of the extension.
fn server_name(from: &mut Handshake<'_>, length: usize) -> Result<Option<Value>, End> {
    const HOST_NAME: u8 = 0;
    if length == 0 {
        return Ok(None);
    }
    let mut left = length;
    take(&mut left, 2)?;
    from.skip(2)?; // the length of the list: the extension's own bounds it
    let mut name = None;
    while left > 0 {
        let kind = from.u8()?;
        let size = from.length(2)?;
        take(&mut left, 3 + size)?;
        if kind == HOST_NAME && name.is_none() && size <= MAX_VALUE {
            name = Some(from.value(size)?);
        } else {
            from.skip(size)?;
        }
    }
    Ok(name)
}

/// The list of the extension, as far as it can be kept.
fn protocol_list(from: &mut Handshake<'_>, length: usize) -> Result<Option<Value>, End> {
    let mut left = length;
    take(&mut left, 2)?;
    from.skip(2)?;
    let kept = left.min(MAX_VALUE);
    let list = from.value(kept)?;
    from.skip(left - kept)?;
    Ok(Some(list))
}

/// Takes from what a length promised; what does not fit is broken.
fn take(left: &mut usize, size: usize) -> Result<(), End> {
    *left = left.checked_sub(size).ok_or(End::Broken)?;
    Ok(())
}

/// Bytes of a value, copied out of the records.
#[derive(Debug, Clone)]
struct Value {
    bytes: [u8; MAX_VALUE],
    length: usize,
}

impl Value {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// The handshake's bytes, read over the headers of the records between them.
struct Handshake<'a> {
    bytes: &'a [u8],
    /// Where the next byte is.
    at: usize,
    /// How many bytes the record still has.
    left: usize,
}

impl Handshake<'_> {
    fn u8(&mut self) -> Result<u8, End> {
        self.enter_record()?;
        let byte = *self.bytes.get(self.at).ok_or(End::Cut(self.at + self.left))?;
        self.at += 1;
        self.left -= 1;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16, End> {
        Ok(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn u24(&mut self) -> Result<usize, End> {
        self.length(3)
    }

    /// A length of that many bytes.
    fn length(&mut self, width: usize) -> Result<usize, End> {
        (0..width).try_fold(0, |value, _| Ok(value << 8 | usize::from(self.u8()?)))
    }

    fn value(&mut self, length: usize) -> Result<Value, End> {
        let mut value = Value { bytes: [0; MAX_VALUE], length };
        for byte in value.bytes.iter_mut().take(length) {
            *byte = self.u8()?;
        }
        Ok(value)
    }

    fn skip(&mut self, mut count: usize) -> Result<(), End> {
        while count > 0 {
            self.enter_record()?;
            let step = count.min(self.left);
            if self.bytes.len() < self.at + step {
                return Err(End::Cut(self.at + self.left));
            }
            self.at += step;
            self.left -= step;
            count -= step;
        }
        Ok(())
    }

    /// Reads the header of the next record where the last one is used up.
    fn enter_record(&mut self) -> Result<(), End> {
        if self.left > 0 {
            return Ok(());
        }
        let end = self.at + RECORD_HEADER;
        let header = self.bytes.get(self.at..end).ok_or(End::Cut(end))?;
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        // An empty handshake record is not allowed, and would be a way to burn time.
        if header[0] != HANDSHAKE || header[1] != 3 || length == 0 || length > MAX_RECORD {
            return Err(End::Broken);
        }
        self.at = end;
        self.left = length;
        Ok(())
    }
}
