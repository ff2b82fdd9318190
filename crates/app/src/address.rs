//! Addresses as people write them: `host:port`, `:port`, `[::1]:53`.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

/// Where to connect to. The host may be a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an address, without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

/// Where to listen: without a host, on all addresses of both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// A name or an address, without brackets.
    pub host: Option<String>,
    /// 0: any free port.
    pub port: u16,
}

/// What is wrong with an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No colon.
    #[error("no port: expected host:port, for example example.org:443 or [::1]:443")]
    NoPort,
    /// Not a number below 65536.
    #[error("'{0}' is no port: expected a number from 0 to 65535")]
    Port(String),
    /// Colons without brackets, or a bracket without its twin.
    #[error("an IPv6 address belongs in brackets: [::1]:443")]
    Brackets,
    /// Nothing before the colon.
    #[error("no host: expected host:port, for example example.org:443 or [::1]:443")]
    NoHost,
    /// Nobody can connect to port 0.
    #[error("port 0 is none to connect to")]
    PortZero,
    /// A host with characters that none has.
    #[error("'{0}' is no host name or address")]
    Host(String),
}

impl HostPort {
    /// The address, if the host is one and no name.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match split(text)? {
            (None, _) => Err(AddressError::NoHost),
            (_, 0) => Err(AddressError::PortZero),
            (Some(host), port) => Ok(Self { host, port }),
        }
    }
}

impl FromStr for Listen {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = split(text)?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            None => write!(f, ":{}", self.port),
            Some(host) => HostPort { host: host.clone(), port: self.port }.fmt(f),
        }
    }
}

fn split(text: &str) -> Result<(Option<String>, u16), AddressError> {
    let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => in_brackets(rest.strip_suffix(']').ok_or(AddressError::Brackets)?)?,
        None if host.contains(':') => return Err(AddressError::Brackets),
        None => host,
    };
    let port = port.parse().map_err(|_| AddressError::Port(port.into()))?;
    if host.chars().any(|c| c.is_whitespace() || c.is_control() || "/@\\[]".contains(c)) {
        return Err(AddressError::Host(host.into()));
    }
    Ok(((!host.is_empty()).then(|| host.to_owned()), port))
}

/// An IPv6 address, perhaps with its zone (RFC 4007, section 11).
fn in_brackets(inside: &str) -> Result<&str, AddressError> {
    let address = inside.split_once('%').map_or(inside, |(address, _zone)| address);
    match address.parse::<Ipv6Addr>() {
        Ok(_) => Ok(inside),
        Err(_) => Err(AddressError::Host(inside.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in ["example.org:443", "127.0.0.1:1", "[::1]:53", "[fe80::1%eth0]:65535"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert_eq!(":0".parse::<Listen>(), Ok(Listen { host: None, port: 0 }));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text: &str| text.parse::<HostPort>().unwrap_err();
        assert_eq!(wrong("example.org"), AddressError::NoPort);
        assert_eq!(wrong("::1:53"), AddressError::Brackets);
        assert_eq!(wrong("[::1:53"), AddressError::Brackets);
        assert_eq!(wrong("a:65536"), AddressError::Port("65536".into()));
        assert_eq!(wrong("a:http"), AddressError::Port("http".into()));
        assert_eq!(wrong(":80"), AddressError::NoHost);
        assert_eq!(wrong("a:0"), AddressError::PortZero);
        assert_eq!(wrong("http://a:80"), AddressError::Brackets);
        assert_eq!(wrong("a/b:80"), AddressError::Host("a/b".into()));
        assert_eq!(wrong("[example.org]:80"), AddressError::Host("example.org".into()));
        // Found by fuzzing.
        assert_eq!(wrong("[[0%e\0\"l53]:3"), AddressError::Host("[0%e\0\"l53".into()));
        assert_eq!(wrong("a]b:80"), AddressError::Host("a]b".into()));
    }
}
