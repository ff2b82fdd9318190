//! `--route MATCH=TARGET`: what it may say, and which routes cannot stand together.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use underpass_abi::mux::{MAX_ROUTES, MAX_SHAPES, MAX_TAG, Table};
use underpass_logic::mux::{
    Matcher, Opening, Pattern, Verdict,
    table::{self, Misfit},
};

use crate::error::{Error, Result};

/// The matchers, for messages.
pub const VOCABULARY: &str = "'@OFFSET:TEXT', '@OFFSET:0xHEX', 'sni:NAME', 'sni:*.NAME', 'alpn:PROTOCOL', \
                              'http-host:NAME', 'tls', 'ssh' or 'http'";

/// One route. The first that matches wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route<T> {
    /// As it was given.
    pub text: String,
    /// What it takes.
    pub matches: Match,
    /// Where that goes.
    pub target: T,
}

/// What a payload must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// These bytes at this offset.
    Bytes {
        /// Bytes before them.
        offset: u16,
        /// At least one.
        bytes: Vec<u8>,
    },
    /// A TLS ClientHello.
    Tls,
    /// A TLS ClientHello for a server's name: exact, or `*.` and its parents.
    Sni(String),
    /// A TLS ClientHello that offers a protocol.
    Alpn(String),
    /// An SSH client.
    Ssh,
    /// An HTTP request.
    Http,
    /// An HTTP request for a host: exact, or `*.` and its parents.
    HttpHost(String),
}

impl Match {
    /// The same for `logic`.
    pub fn matcher(&self) -> Matcher<'_> {
        match self {
            Self::Bytes { offset, bytes } => Matcher::Bytes { offset: usize::from(*offset), bytes },
            Self::Tls => Matcher::Tls,
            Self::Sni(name) => Matcher::Sni(Pattern(name)),
            Self::Alpn(protocol) => Matcher::Alpn(protocol.as_bytes()),
            Self::Ssh => Matcher::Ssh,
            Self::Http => Matcher::Http,
            Self::HttpHost(name) => Matcher::HttpHost(Pattern(name)),
        }
    }

    /// Whether it takes all that `other` takes.
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes { offset, bytes }, other) => {
                let known = other.known_bytes();
                (usize::from(*offset)..).zip(bytes).all(|pair| known.contains(&pair))
            }
            (ours, Self::Bytes { offset: 0, bytes }) => {
                Opening::new(bytes).verdict(&ours.matcher()) == Verdict::Match
            }
            (Self::Tls, Self::Tls | Self::Sni(_) | Self::Alpn(_)) => true,
            (Self::Http, Self::Http | Self::HttpHost(_)) => true,
            (Self::Ssh, Self::Ssh) => true,
            (Self::Sni(ours), Self::Sni(theirs)) | (Self::HttpHost(ours), Self::HttpHost(theirs)) => {
                Pattern(ours).covers(&Pattern(theirs))
            }
            (Self::Alpn(ours), Self::Alpn(theirs)) => ours == theirs,
            _ => false,
        }
    }

    /// The bytes that everything it takes has, with their offsets.
    fn known_bytes(&self) -> Vec<(usize, &u8)> {
        match self {
            Self::Bytes { offset, bytes } => (usize::from(*offset)..).zip(bytes).collect(),
            Self::Tls | Self::Sni(_) | Self::Alpn(_) => vec![(0, &22), (1, &3), (5, &1)],
            Self::Ssh => (0..).zip(b"SSH-").collect(),
            Self::Http | Self::HttpHost(_) => vec![],
        }
    }
}

impl FromStr for Match {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, value) = match text.split_once(':') {
            Some((word, value)) => (word, Some(value)),
            None => (text, None),
        };
        if let Some(offset) = word.strip_prefix('@') {
            let offset = offset.parse().map_err(|_| {
                format!("'{offset}' is no offset: it takes a number of bytes from 0 to 65535")
            })?;
            let value =
                value.ok_or("the bytes to look for are missing: '@OFFSET:TEXT' or '@OFFSET:0xHEX'")?;
            return Ok(Self::Bytes { offset, bytes: bytes(value)? });
        }
        match (word, value) {
            ("tls", None) => Ok(Self::Tls),
            ("ssh", None) => Ok(Self::Ssh),
            ("http", None) => Ok(Self::Http),
            ("sni", Some(name)) => Ok(Self::Sni(host_pattern(name)?)),
            ("http-host", Some(name)) => Ok(Self::HttpHost(host_pattern(name)?)),
            ("alpn", Some(protocol)) if (1..=255).contains(&protocol.len()) => {
                Ok(Self::Alpn(protocol.to_owned()))
            }
            ("alpn", Some(_)) => Err("a protocol's name has 1 to 255 bytes".to_owned()),
            ("sni" | "http-host" | "alpn", None) => Err(format!("'{word}' takes a name: '{word}:NAME'")),
            ("tls" | "ssh" | "http", Some(_)) => Err(format!("'{word}' takes no value")),
            _ => Err(format!("'{text}' is no match; known are {VOCABULARY}")),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes { offset, bytes } => write_bytes(f, *offset, bytes),
            Self::Tls => f.write_str("tls"),
            Self::Sni(name) => write!(f, "sni:{name}"),
            Self::Alpn(protocol) => write!(f, "alpn:{protocol}"),
            Self::Ssh => f.write_str("ssh"),
            Self::Http => f.write_str("http"),
            Self::HttpHost(name) => write!(f, "http-host:{name}"),
        }
    }
}

/// Text where it can be read back as text, else hex.
fn write_bytes(f: &mut fmt::Formatter<'_>, offset: u16, bytes: &[u8]) -> fmt::Result {
    let plain = |text: &&str| !text.starts_with("0x") && text.bytes().all(|byte| byte.is_ascii_graphic());
    if let Some(text) = std::str::from_utf8(bytes).ok().filter(plain) {
        return write!(f, "@{offset}:{text}");
    }
    write!(f, "@{offset}:0x")?;
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn bytes(value: &str) -> Result<Vec<u8>, String> {
    let Some(hex) = value.strip_prefix("0x") else {
        return if value.is_empty() {
            Err("the text to look for is empty".to_owned())
        } else {
            Ok(value.into())
        };
    };
    let digits = hex.as_bytes();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(format!("'{value}' is no hex: after 0x it takes pairs of the digits 0-9 and a-f"));
    }
    if digits.len() % 2 == 1 {
        return Err(format!("'{value}' has an odd number of hex digits; each byte takes two"));
    }
    let pair =
        |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
    Ok(digits.chunks(2).filter_map(pair).collect())
}

fn host_pattern(name: &str) -> Result<String, String> {
    let plain = name.strip_prefix("*.").unwrap_or(if name == "*" { "a" } else { name });
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    if plain.is_empty() || plain.len() > 253 || !plain.bytes().all(fits) || plain.starts_with('.') {
        return Err(format!(
            "'{name}' is no host name; it takes one in letters, digits, '-' and '.', or '*.' and such a name"
        ));
    }
    Ok(name.trim_end_matches('.').to_ascii_lowercase())
}

/// Parses routes and refuses those that no payload could ever reach.
///
/// # Errors
/// Names the route and what is wrong with it.
pub fn parse<T: PartialEq>(
    texts: &[String],
    target: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<Route<T>>> {
    let mut routes: Vec<Route<T>> = vec![];
    for text in texts {
        let route =
            parse_one(text, &target).map_err(|why| Error::Usage(format!("--route '{text}': {why}")))?;
        if let Some(earlier) = routes.iter().find(|earlier| earlier.matches.covers(&route.matches)) {
            return Err(Error::Usage(clash(earlier, &route)));
        }
        routes.push(route);
    }
    Ok(routes)
}

fn parse_one<T>(text: &str, target: impl Fn(&str) -> Result<T, String>) -> Result<Route<T>, String> {
    let (matches, to) = text.rsplit_once('=').ok_or("it takes MATCH=TARGET, and there is no '=' in this")?;
    Ok(Route { text: text.to_owned(), matches: matches.parse()?, target: target(to)? })
}

fn clash<T: PartialEq>(earlier: &Route<T>, later: &Route<T>) -> String {
    let (first, second) = (&earlier.text, &later.text);
    if !later.matches.covers(&earlier.matches) {
        return format!(
            "--route '{second}' can never match: '{first}' before it takes all that it would; put it first"
        );
    }
    if earlier.target == later.target {
        format!("--route '{second}' says the same as '{first}' before it; leave one out")
    } else {
        format!("--route '{second}' contradicts '{first}': both match the same; leave one out")
    }
}

/// The lengths that are valid, in bytes: `290..=294`, `290..295`, `290..`, `..=294` or `290`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths(pub RangeInclusive<u32>);

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.trim().parse::<u32>().map_err(|_| {
                format!("'{text}' is no number of bytes; lengths are written 290..=294, 290.., ..=294 or 290")
            })
        };
        let (low, high) = match text.split_once("..") {
            None => (number(text)?, number(text)?),
            Some((low, high)) => {
                let low = if low.trim().is_empty() { 0 } else { number(low)? };
                let high = match high.strip_prefix('=') {
                    Some(high) => number(high)?,
                    None if high.trim().is_empty() => u32::MAX,
                    None => number(high)?.checked_sub(1).ok_or("no length is below 0")?,
                };
                (low, high)
            }
        };
        if low > high {
            return Err(format!("{text} is empty: {low} is more than {high}"));
        }
        Ok(Self(low..=high))
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.0.start(), self.0.end())
    }
}

/// Refuses routes whose bytes lie beyond the longest valid payload.
///
/// # Errors
/// Names the route.
pub fn check_within<T>(routes: &[Route<T>], longest: usize, what: &str) -> Result<()> {
    for route in routes {
        if let Match::Bytes { offset, bytes } = &route.matches {
            let end = usize::from(*offset) + bytes.len();
            if end > longest {
                return Err(Error::Usage(format!(
                    "--route '{}' can never match: its bytes end at {end}, and {what} has at most {longest} bytes",
                    route.text
                )));
            }
        }
    }
    Ok(())
}

/// Puts routes by tags into a table, in their order. `values` gives the port and the
/// counter of each.
///
/// # Errors
/// Names the route that does not fit.
pub fn build<T>(
    table: &mut Table,
    routes: &[Route<T>],
    values: impl Fn(usize, &Route<T>) -> (u16, u16),
) -> Result<()> {
    let mut entries = vec![];
    for (index, route) in routes.iter().enumerate() {
        let Match::Bytes { offset, bytes } = &route.matches else {
            return Err(Error::Usage(format!(
                "--route '{}': '{}' is decided on the first bytes of a TCP connection; here it takes '@OFFSET:BYTES'",
                route.text, route.matches
            )));
        };
        let (port, counter) = values(index, route);
        entries.push(table::Route { offset: *offset, tag: bytes, port, counter });
    }
    table::build(table, entries.into_iter()).map_err(|(index, misfit)| {
        let text = routes.get(index).map_or("", |route| &route.text);
        Error::Usage(format!("--route '{text}': {}", explain(misfit)))
    })
}

fn explain(misfit: Misfit) -> String {
    match misfit {
        Misfit::Routes => format!("there are more than {MAX_ROUTES} routes"),
        Misfit::Shapes => format!(
            "the place of its tag is one too many: all routes together may have {MAX_SHAPES} different pairs of \
             offset and length"
        ),
        Misfit::Tag => format!("a tag has 1 to {MAX_TAG} bytes and ends within 65535 bytes"),
        Misfit::Twice => "another route has the same tag at the same place".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(texts: &[&str]) -> Result<Vec<Route<String>>> {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        parse(&texts, |target| Ok(target.to_owned()))
    }

    fn refusal(texts: &[&str]) -> String {
        routes(texts).unwrap_err().to_string()
    }

    #[test]
    fn every_match_is_parsed_and_shown_as_it_was() {
        for text in [
            "@20:600",
            "@0:0x1603",
            "@5:a=b",
            "@0:0x20",
            "sni:www.example.org",
            "sni:*.example.org",
            "sni:*",
            "alpn:h2",
            "alpn:http/1.1",
            "http-host:example.org",
            "tls",
            "ssh",
            "http",
            "http-host:fd00::1",
        ] {
            let route = routes(&[&format!("{text}=somewhere:1")]).unwrap().remove(0);
            assert_eq!(route.matches.to_string(), text);
            assert_eq!(route.target, "somewhere:1");
        }
        assert_eq!(
            "SNI.".parse::<Match>().unwrap_err(),
            format!("'SNI.' is no match; known are {VOCABULARY}")
        );
        assert_eq!("sni:WWW.Example.".parse::<Match>().unwrap().to_string(), "sni:www.example");
    }

    #[test]
    fn a_route_that_is_wrong_is_named_with_the_reason() {
        for (route, reason) in [
            ("tls", "no '='"),
            ("teltnet=a:1", "known are"),
            ("@x:1=a:1", "no offset"),
            ("@70000:1=a:1", "0 to 65535"),
            ("@20=a:1", "missing"),
            ("@20:=a:1", "empty"),
            ("@0:0x=a:1", "no hex"),
            ("@0:0xzz=a:1", "no hex"),
            ("@0:0x123=a:1", "odd"),
            ("sni=a:1", "takes a name"),
            ("sni:*example.org=a:1", "no host name"),
            ("sni:a b=a:1", "no host name"),
            ("tls:1=a:1", "takes no value"),
            ("alpn:=a:1", "1 to 255"),
        ] {
            let message = refusal(&[route]);
            assert!(message.contains(&format!("'{route}'")) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn routes_that_cannot_stand_together_are_refused() {
        for (first, second, reason) in [
            ("@20:600=a:1", "@20:600=b:1", "contradicts"),
            ("@20:600=a:1", "@20:0x363030=a:1", "says the same"),
            ("@20:600=a:1", "@20:6001=b:1", "can never match"),
            ("@20:600=a:1", "@19:x600y=b:1", "can never match"),
            ("tls=a:1", "sni:x.org=b:1", "can never match"),
            ("tls=a:1", "alpn:h2=b:1", "can never match"),
            ("@0:0x1603=a:1", "tls=b:1", "can never match"),
            ("@1:0x03=a:1", "sni:x.org=b:1", "can never match"),
            ("@0:SSH=a:1", "ssh=b:1", "can never match"),
            ("ssh=a:1", "@0:SSH-2=b:1", "can never match"),
            ("http=a:1", "http-host:x.org=b:1", "can never match"),
            ("http=a:1", "@0:GET /=b:1", "can never match"),
            ("sni:*.example.org=a:1", "sni:a.example.org=b:1", "can never match"),
            ("sni:A.example.org=a:1", "sni:a.example.org=b:1", "contradicts"),
            ("tls=a:1", "tls=b:1", "contradicts"),
        ] {
            let message = refusal(&[first, second]);
            assert!(message.contains(reason) && message.contains(second), "{message}");
        }
    }

    #[test]
    fn routes_that_can_stand_together_are_taken() {
        for pair in [
            ["@20:6001=a:1", "@20:600=b:1"],
            ["@20:600=a:1", "@21:600=b:1"],
            ["@0:0x1603=a:1", "@0:0x1703=b:1"],
            ["sni:a.example.org=a:1", "sni:*.example.org=b:1"],
            ["sni:*.example.org=a:1", "tls=b:1"],
            ["ssh=a:1", "@0:SSx=b:1"],
            ["ssh=a:1", "http=b:1"],
            ["sni:x.org=a:1", "http-host:x.org=b:1"],
        ] {
            assert_eq!(routes(&pair).unwrap().len(), 2);
        }
    }

    #[test]
    fn lengths_are_ranges() {
        for (text, range) in [
            ("290..=294", 290..=294),
            ("290..295", 290..=294),
            ("290", 290..=290),
            ("290..", 290..=u32::MAX),
            ("..=294", 0..=294),
        ] {
            assert_eq!(text.parse::<Lengths>().unwrap().0, range);
        }
        for text in ["", "a", "5..=4", "..0", "-1", "1...2"] {
            assert!(text.parse::<Lengths>().is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_beyond_the_payload_are_refused() {
        let routes = routes(&["@290:12345=a:1"]).unwrap();
        assert!(check_within(&routes, 295, "a message").is_ok());
        let message = check_within(&routes, 294, "a message").unwrap_err().to_string();
        assert!(message.contains("end at 295") && message.contains("at most 294"), "{message}");
    }
}
