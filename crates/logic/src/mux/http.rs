//! HTTP/1 requests (RFC 9112) as far as they say where they want to go.

use super::Verdict;

/// Methods that are HTTP without a doubt: RFC 9110, section 9, RFC 5789, WebDAV
/// (RFC 4918, 3253, 5323) and `PRI`, which opens HTTP/2's preface (RFC 9113).
const METHODS: [&[u8]; 20] = [
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"CONNECT",
    b"OPTIONS",
    b"TRACE",
    b"PATCH",
    b"PRI",
    b"PROPFIND",
    b"PROPPATCH",
    b"MKCOL",
    b"COPY",
    b"MOVE",
    b"LOCK",
    b"UNLOCK",
    b"REPORT",
    b"SEARCH",
    b"MERGE",
];
/// The longest method of its own invention that is waited for, in bytes.
const MAX_METHOD: usize = 24;

/// Whether a stream opens with a request: a known method and a space, or a whole
/// request line that ends in a version of HTTP.
pub fn recognise(bytes: &[u8]) -> Verdict {
    let bytes = after_empty_lines(bytes);
    let skipped = bytes.skipped;
    let bytes = bytes.rest;
    let end = bytes.iter().position(|byte| !(byte.is_ascii_uppercase() || *byte == b'-'));
    match end {
        None if bytes.len() > MAX_METHOD => Verdict::Miss,
        None => Verdict::More(skipped + bytes.len() + 1),
        Some(end) if bytes[end] != b' ' || end == 0 || end > MAX_METHOD => {
            // What may yet become an empty line before the request.
            if bytes == b"\r" { Verdict::More(skipped + 2) } else { Verdict::Miss }
        }
        Some(end) if METHODS.contains(&&bytes[..end]) => Verdict::Match,
        Some(_) => match line(bytes) {
            None => Verdict::More(skipped + bytes.len() + 1),
            Some(line) => match request_line(line) {
                Some(_) => Verdict::Match,
                None => Verdict::Miss,
            },
        },
    }
}

/// The host that a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host<'a> {
    /// This one, without its port and without the brackets of an IPv6 address.
    Is(&'a [u8]),
    /// It names none, or this is no HTTP/1 request.
    None,
    /// It has not arrived; this many bytes (in all) may show it.
    More(usize),
}

/// Finds the host: in the request's target if that is a whole URL, which then
/// overrides the header (RFC 9112, section 3.2.2), else in the header `Host`.
pub fn host(bytes: &[u8]) -> Host<'_> {
    if recognise(bytes) == Verdict::Miss {
        return Host::None;
    }
    let more = Host::More(bytes.len() + 1);
    let mut rest = after_empty_lines(bytes).rest;
    let Some(first) = line(rest) else { return more };
    let Some(target) = request_line(first) else { return Host::None };
    if let Some(authority) = authority(target) {
        return Host::Is(without_port(authority));
    }
    loop {
        rest = rest.iter().position(|byte| *byte == b'\n').map_or(&[][..], |at| &rest[at + 1..]);
        let Some(header) = line(rest) else { return more };
        if header.is_empty() {
            return Host::None;
        }
        if let Some(value) = header_value(header, b"host") {
            return if value.is_empty() { Host::None } else { Host::Is(without_port(value)) };
        }
    }
}

struct Started<'a> {
    skipped: usize,
    rest: &'a [u8],
}

/// What follows the empty lines that a server should ignore (RFC 9112, section 2.2).
fn after_empty_lines(bytes: &[u8]) -> Started<'_> {
    let mut rest = bytes;
    while let Some(after) = rest.strip_prefix(b"\r\n").or_else(|| rest.strip_prefix(b"\n")) {
        rest = after;
    }
    Started { skipped: bytes.len() - rest.len(), rest }
}

/// The first line without its end, if its end is there.
fn line(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let line = &bytes[..end];
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

/// The target of a request line, if it is one of HTTP/1.
fn request_line(line: &[u8]) -> Option<&[u8]> {
    let mut words = line.split(|byte| *byte == b' ');
    let (_method, target, version) = (words.next()?, words.next()?, words.next()?);
    let right = version.starts_with(b"HTTP/1.") && !target.is_empty() && words.next().is_none();
    right.then_some(target)
}

/// The authority of a URL, without the user before it.
fn authority(target: &[u8]) -> Option<&[u8]> {
    let at = target.windows(3).position(|window| window == b"://")?;
    if !target[..at].iter().all(u8::is_ascii_alphanumeric) {
        return None; // somewhere in a path or a query
    }
    let rest = &target[at + 3..];
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let authority = &rest[..end];
    Some(authority.iter().rposition(|byte| *byte == b'@').map_or(authority, |at| &authority[at + 1..]))
}

fn header_value<'a>(line: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    name.eq_ignore_ascii_case(wanted).then(|| value.trim_ascii())
}

fn without_port(host: &[u8]) -> &[u8] {
    if let Some(inside) = host.strip_prefix(b"[") {
        let end = inside.iter().position(|byte| *byte == b']').unwrap_or(inside.len());
        return &inside[..end];
    }
    host.iter().position(|byte| *byte == b':').map_or(host, |at| &host[..at])
}
