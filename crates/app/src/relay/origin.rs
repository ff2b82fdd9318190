//! Who a client is by the account of a proxy before it: the header of the PROXY protocol,
//! versions 1 and 2 (haproxy's doc/proxy-protocol.txt), that precedes a connection's first byte.

use std::net::{IpAddr, SocketAddr};

use proxy_header::{Error, ParseConfig, ProxiedAddress, ProxyHeader};

/// A header may have this many bytes, at most: version 2 can carry a lot beside addresses.
pub const LONGEST: usize = 4 << 10;

/// `--proxy-protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Version {
    /// A line of text
    V1,
    /// Binary
    V2,
}

/// A client's address, and the one that it connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Reads the header, of either version, that bytes begin with: its length, and what it says,
/// which is nothing where a proxy speaks for itself. None: more must come.
///
/// # Errors
/// Where they begin with none, whatever follows.
pub fn read(bytes: &[u8]) -> Result<Option<(Option<Origin>, usize)>, &'static str> {
    const SIGNATURES: [&[u8]; 2] = [b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"];
    let may_be = |signature: &[u8]| bytes.iter().zip(signature).all(|(byte, wanted)| byte == wanted);
    if !SIGNATURES.into_iter().any(may_be) {
        return Err("it sent no PROXY protocol header");
    }
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    match ProxyHeader::parse(bytes, config) {
        Ok((header, length)) if length <= LONGEST => {
            let origin = |it: &ProxiedAddress| Origin { source: it.source, destination: it.destination };
            Ok(Some((header.proxied_address().map(origin), length)))
        }
        Err(Error::BufferTooShort) if bytes.len() < LONGEST => Ok(None),
        Ok(_) | Err(Error::BufferTooShort) => Err("its PROXY protocol header is too long"),
        Err(_) => Err("its PROXY protocol header is wrong"),
    }
}

/// The header that says this; without an origin, that there is nothing to say.
pub fn header(version: Version, origin: Option<Origin>) -> Vec<u8> {
    let header = match origin.map(Origin::of_one_family) {
        Some(Origin { source, destination }) => {
            ProxyHeader::with_address(ProxiedAddress::stream(source, destination))
        }
        None => ProxyHeader::with_local(),
    };
    let mut bytes = [0; 256];
    let length = match version {
        Version::V1 => header.encode_to_slice_v1(&mut bytes),
        Version::V2 => header.encode_to_slice_v2(&mut bytes),
    };
    // It has room, and both addresses are of one family.
    bytes[..length.unwrap_or_default()].to_vec()
}

impl Origin {
    /// Addresses as IPv4 where both can be, else as IPv6: a header has one family.
    fn of_one_family(self) -> Self {
        let [source, destination] = [self.source, self.destination];
        let canonical = [source, destination].map(|address| address.ip().to_canonical());
        let ips = match canonical {
            [IpAddr::V4(_), IpAddr::V4(_)] => canonical,
            _ => canonical.map(|ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().into(),
                IpAddr::V6(_) => ip,
            }),
        };
        Self { source: (ips[0], source.port()).into(), destination: (ips[1], destination.port()).into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(source: &str, destination: &str) -> Origin {
        Origin { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    #[test]
    fn headers_are_read_back_whole_and_no_sooner() {
        for it in [
            Some(origin("192.0.2.1:4711", "198.51.100.2:443")),
            Some(origin("[2001:db8::1]:4711", "[2001:db8::2]:443")),
            None,
        ] {
            for version in [Version::V1, Version::V2] {
                let header = header(version, it);
                for end in 0..header.len() {
                    assert_eq!(read(&header[..end]), Ok(None), "{version:?} {it:?} cut at {end}");
                }
                let more = [&header[..], b"PROXY and more"].concat();
                assert_eq!(read(&more), Ok(Some((it, header.len()))));
            }
        }
    }

    #[test]
    fn mapped_addresses_are_written_as_what_they_are() {
        let mapped = origin("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2");
        assert_eq!(header(Version::V1, Some(mapped)), b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
        let mixed = origin("192.0.2.1:1", "[2001:db8::2]:2");
        assert_eq!(header(Version::V1, Some(mixed)), b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n");
    }

    #[test]
    fn what_is_no_header_is_told_at_its_first_wrong_byte() {
        for bytes in [
            &b"G"[..],
            b"PROXX",
            b"\r\n\r\n\0\r\nQUIX",
            b"PROXY TCP4 1.2.3.4 x 1 2\r\n",
            b"PROXY TCP9 a b\r\n",
        ] {
            assert!(read(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        // A line without an end, and a binary header that says it has 64 KiB.
        assert!(read(&[b"PROXY TCP4 ".as_slice(), &[b'1'; 200]].concat()).is_err());
        let mut long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".to_vec();
        long.resize(LONGEST, 0);
        assert!(read(&long).is_err());
    }
}
