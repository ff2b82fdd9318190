//! Which route a payload belongs to.
//!
//! Routes are asked in their order and the first that matches wins. On a stream
//! the answer may have to wait for more bytes: [`Opening`] gives it for what has
//! arrived so far. Tags in datagrams and messages are found through
//! [`table`], messages in a stream through [`frame`].

use core::cell::OnceCell;

pub mod datagram;
pub mod frame;
pub mod http;
pub mod table;
pub mod tls;

/// What a matcher says about the bytes that have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They match, whatever follows.
    Match,
    /// They do not, whatever follows.
    Miss,
    /// It cannot be said before this many bytes (in all) are there.
    More(usize),
}

/// What a stream must open with to belong to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matcher<'a> {
    /// These bytes, that many bytes from the start.
    Bytes {
        /// Bytes before them.
        offset: usize,
        /// The bytes themselves.
        bytes: &'a [u8],
    },
    /// A TLS ClientHello (RFC 8446, section 4.1.2, and its forerunners).
    Tls,
    /// One whose server_name (RFC 6066, section 3) fits.
    Sni(Pattern<'a>),
    /// One that offers this protocol (RFC 7301).
    Alpn(&'a [u8]),
    /// The identification string of an SSH client (RFC 4253, section 4.2).
    Ssh,
    /// An HTTP/1 request line (RFC 9112, section 3) or HTTP/2's preface (RFC 9113, section 3.4).
    Http,
    /// An HTTP/1 request whose host (RFC 9112, section 3.2) fits.
    HttpHost(Pattern<'a>),
}

/// A host name, or `*.` and the name that its parents must have: `*.example.org`
/// takes `a.example.org` and `a.b.example.org`, not `example.org`. `*` takes every name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern<'a>(pub &'a str);

impl Pattern<'_> {
    /// Whether a name fits. Case does not matter, nor does a dot at the end.
    pub fn matches(&self, name: &[u8]) -> bool {
        let name = name.strip_suffix(b".").unwrap_or(name);
        let pattern = self.0.as_bytes();
        match pattern.strip_prefix(b"*") {
            Some(b"") => !name.is_empty(),
            Some(parents) => {
                name.split_at_checked(name.len().wrapping_sub(parents.len())).is_some_and(|(child, rest)| {
                    !child.is_empty() && !child.starts_with(b".") && rest.eq_ignore_ascii_case(parents)
                })
            }
            None => name.eq_ignore_ascii_case(pattern),
        }
    }

    /// Whether every name that fits the other fits this.
    pub fn covers(&self, other: &Pattern<'_>) -> bool {
        match (self.0.strip_prefix('*'), other.0.strip_prefix('*')) {
            (Some(ours), Some(theirs)) => {
                ours.is_empty()
                    || theirs.len() >= ours.len() && Pattern(self.0).matches_parents(theirs.as_bytes())
            }
            (None, Some(_)) => false,
            (_, None) => self.matches(other.0.as_bytes()),
        }
    }

    /// Whether each child of `parents` (which begins with a dot) fits a wildcard.
    fn matches_parents(&self, parents: &[u8]) -> bool {
        let ours = self.0.as_bytes().strip_prefix(b"*").unwrap_or_default();
        parents.len().checked_sub(ours.len()).is_some_and(|at| parents[at..].eq_ignore_ascii_case(ours))
    }
}

/// The first bytes of a stream, and what was read out of them.
#[derive(Debug)]
pub struct Opening<'a> {
    bytes: &'a [u8],
    hello: OnceCell<tls::Hello>,
    host: OnceCell<http::Host<'a>>,
}

impl<'a> Opening<'a> {
    /// Takes all bytes that have arrived, from the first on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, hello: OnceCell::new(), host: OnceCell::new() }
    }

    /// What a matcher says about them.
    pub fn verdict(&self, matcher: &Matcher<'_>) -> Verdict {
        match *matcher {
            Matcher::Bytes { offset, bytes } => self.has(offset, bytes),
            Matcher::Tls => tls::recognise(self.bytes),
            Matcher::Sni(pattern) => {
                self.hello().judge(tls::Hello::server_name, |name| pattern.matches(name))
            }
            Matcher::Alpn(protocol) => self
                .hello()
                .judge(tls::Hello::protocols, |list| tls::protocols(list).any(|offered| offered == protocol)),
            Matcher::Ssh => self.has(0, b"SSH-"),
            Matcher::Http => http::recognise(self.bytes),
            Matcher::HttpHost(pattern) => match *self.host.get_or_init(|| http::host(self.bytes)) {
                http::Host::Is(name) if pattern.matches(name) => Verdict::Match,
                http::Host::Is(_) | http::Host::None => Verdict::Miss,
                http::Host::More(need) => Verdict::More(need),
            },
        }
    }

    /// The first route that matches, by its index. Routes after one that cannot be
    /// said yet must wait for it; with `last`, as no more will come, they do not.
    pub fn decide<'m>(&self, matchers: impl IntoIterator<Item = Matcher<'m>>, last: bool) -> Decision {
        for (index, matcher) in matchers.into_iter().enumerate() {
            match self.verdict(&matcher) {
                Verdict::Match => return Decision::Route(index),
                Verdict::More(need) if !last => return Decision::More(need),
                Verdict::More(_) | Verdict::Miss => {}
            }
        }
        Decision::None
    }

    fn hello(&self) -> &tls::Hello {
        self.hello.get_or_init(|| tls::Hello::read(self.bytes))
    }

    fn has(&self, offset: usize, wanted: &[u8]) -> Verdict {
        let there = self.bytes.get(offset..).unwrap_or_default();
        match there.get(..wanted.len()) {
            Some(there) if there == wanted => Verdict::Match,
            None if wanted.starts_with(there) => Verdict::More(offset.saturating_add(wanted.len())),
            Some(_) | None => Verdict::Miss,
        }
    }
}

/// What all routes together say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// This route, by its index.
    Route(usize),
    /// No route, whatever follows.
    None,
    /// It cannot be said before this many bytes (in all) are there.
    More(usize),
}

#[cfg(test)]
mod tests;
