//! Where an address is: from a database of the MaxMind format, or from the kind of address.

use std::{
    fs,
    io::Read as _,
    net::{IpAddr, Ipv6Addr},
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use flate2::read::GzDecoder;
use maxminddb::{LookupResult, PathElement, Reader};
use serde::Serialize;

use super::assets;

/// What is known about where an address is. Nothing of it is guessed: an address without
/// a country has none, and one without coordinates is not at 0,0.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Place {
    /// What kind of place: `located`, or why there is none on the map.
    pub kind: Kind,
    /// ISO 3166-1 alpha-2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub country: Option<String>,
    /// As the database has it, in English.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub city: Option<String>,
    /// Degrees, north is positive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latitude: Option<f64>,
    /// Degrees, east is positive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longitude: Option<f64>,
    /// The number of the autonomous system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asn: Option<u32>,
    /// Who runs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
}

/// Whether an address has a place on the map, and if not, why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A database knows its country or its coordinates.
    Located,
    /// This host.
    Loopback,
    /// Private networks: RFC 1918, RFC 4193, and shared address space (RFC 6598).
    Private,
    /// Of one link: RFC 3927, RFC 4291.
    LinkLocal,
    /// Multicast and broadcast.
    Multicast,
    /// A public address that no database knows.
    Unlocated,
    /// The remote address itself is not known.
    #[default]
    Unknown,
}

impl Kind {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Located => "located",
            Self::Loopback => "loopback",
            Self::Private => "private",
            Self::LinkLocal => "link-local",
            Self::Multicast => "multicast",
            Self::Unlocated => "unlocated",
            Self::Unknown => "unknown",
        }
    }

    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => match v4.octets() {
                [0, 0, 0, 0] => Self::Unknown,
                [127, ..] => Self::Loopback,
                [169, 254, ..] => Self::LinkLocal,
                [100, 64..=127, ..] => Self::Private,
                [224..=239, ..] | [255, 255, 255, 255] => Self::Multicast,
                _ if v4.is_private() => Self::Private,
                _ => Self::Unlocated,
            },
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Self::Unknown,
            IpAddr::V6(Ipv6Addr::LOCALHOST) => Self::Loopback,
            IpAddr::V6(v6) if v6.is_multicast() => Self::Multicast,
            IpAddr::V6(v6) if v6.is_unique_local() => Self::Private,
            IpAddr::V6(v6) if v6.is_unicast_link_local() => Self::LinkLocal,
            IpAddr::V6(_) => Self::Unlocated,
        }
    }
}

/// The databases, with their names; the first that knows something wins.
#[derive(Default)]
pub struct Databases {
    readers: Vec<(String, Reader<Vec<u8>>)>,
}

impl Databases {
    /// Opens those of the command line, and the one of countries that the binary carries.
    ///
    /// # Errors
    /// Where a file is not of the MaxMind format.
    pub fn open(files: &[impl AsRef<Path>]) -> Result<Self> {
        let mut readers = vec![];
        for file in files {
            let file = file.as_ref();
            let bytes = fs::read(file).with_context(|| format!("--geo {}", file.display()))?;
            let reader = Reader::from_source(bytes);
            let reader =
                reader.with_context(|| format!("--geo {}: not a MaxMind database", file.display()))?;
            readers.push((reader.metadata.database_type.clone(), reader));
        }
        if let Some(packed) = assets::COUNTRIES {
            let mut bytes = vec![];
            GzDecoder::new(packed).read_to_end(&mut bytes).context("the country database is broken")?;
            let reader = Reader::from_source(bytes).context("the country database is broken")?;
            readers.push(("geo-whois-asn-country".to_owned(), reader));
        }
        Ok(Self { readers })
    }

    /// What each is, for people: `GeoLite2-City 2026-10-01`.
    pub fn names(&self) -> Vec<String> {
        let names = self.readers.iter().map(|(name, reader)| {
            let built = UNIX_EPOCH + Duration::from_secs(reader.metadata.build_epoch);
            let built = humantime::format_rfc3339_seconds(built).to_string();
            format!("{name} {}", built.split('T').next().unwrap_or_default())
        });
        names.collect()
    }

    /// Where an address is. A broken record counts as none.
    pub fn find(&self, address: IpAddr) -> Place {
        let mut place = Place { kind: Kind::of(address), ..Place::default() };
        if place.kind == Kind::Unknown {
            return place;
        }
        for (_, reader) in &self.readers {
            if let Ok(found) = reader.lookup(address)
                && found.has_data()
            {
                Record::read(&found).add_to(&mut place);
            }
        }
        if place.country.is_some() || place.latitude.is_some() {
            place.kind = Kind::Located;
        }
        place
    }
}

/// What a record tells.
#[derive(Debug, Default)]
struct Record<'a> {
    country: Option<&'a str>,
    city: Option<&'a str>,
    latitude: Option<f64>,
    longitude: Option<f64>,
    asn: Option<u32>,
    organization: Option<&'a str>,
}

impl<'a> Record<'a> {
    /// Reads MaxMind's own nested shape and the flat one of free databases. What is not
    /// there, or of another type, is not told.
    fn read(found: &LookupResult<'a, Vec<u8>>) -> Self {
        let text = |path: &[&str]| found.decode_path::<&str>(&path_of(path)).ok().flatten();
        let number = |path: &[&str]| found.decode_path::<f64>(&path_of(path)).ok().flatten();
        let degrees = |name: &str| {
            number(&["location", name])
                .or_else(|| number(&[name]))
                .or_else(|| text(&[name]).and_then(|text| text.parse().ok()))
        };
        let asn = found.decode_path::<u32>(&path_of(&["autonomous_system_number"]));
        Self {
            country: text(&["country", "iso_code"])
                .or_else(|| text(&["country_code"]))
                .or_else(|| text(&["country"])),
            city: text(&["city", "names", "en"]).or_else(|| text(&["city"])),
            latitude: degrees("latitude"),
            longitude: degrees("longitude"),
            asn: asn.ok().flatten(),
            organization: text(&["autonomous_system_organization"]),
        }
    }

    /// Adds what is not known yet. A place is taken whole from one database: a city of one
    /// and a country of another may contradict each other.
    fn add_to(self, place: &mut Place) {
        if place.country.is_none() && place.latitude.is_none() {
            place.country = self
                .country
                .filter(|code| code.len() == 2 && code.bytes().all(|byte| byte.is_ascii_alphabetic()))
                .map(str::to_ascii_uppercase);
            place.city = self.city.filter(|name| !name.is_empty()).map(str::to_owned);
            if let (Some(latitude), Some(longitude)) = (self.latitude, self.longitude)
                && latitude.abs() <= 90.0
                && longitude.abs() <= 180.0
                && (latitude, longitude) != (0.0, 0.0)
            {
                (place.latitude, place.longitude) = (Some(latitude), Some(longitude));
            }
        }
        if place.asn.is_none() {
            place.asn = self.asn;
            place.organization = self.organization.map(str::to_owned);
        }
    }
}

fn path_of<'a>(names: &[&'a str]) -> Vec<PathElement<'a>> {
    names.iter().map(|name| PathElement::Key(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_place_says_why() {
        for (address, kind) in [
            ("127.0.0.1", Kind::Loopback),
            ("::1", Kind::Loopback),
            ("10.1.2.3", Kind::Private),
            ("172.31.0.1", Kind::Private),
            ("172.32.0.1", Kind::Unlocated),
            ("192.168.0.1", Kind::Private),
            ("100.64.0.1", Kind::Private),
            ("fd00::1", Kind::Private),
            ("169.254.1.1", Kind::LinkLocal),
            ("fe80::1", Kind::LinkLocal),
            ("224.0.0.251", Kind::Multicast),
            ("255.255.255.255", Kind::Multicast),
            ("ff02::1", Kind::Multicast),
            ("0.0.0.0", Kind::Unknown),
            ("::", Kind::Unknown),
            ("192.0.2.1", Kind::Unlocated),
            ("2001:db8::1", Kind::Unlocated),
        ] {
            let place = Databases::default().find(address.parse().unwrap());
            assert_eq!(place, Place { kind, ..Place::default() }, "{address}");
        }
    }

    #[test]
    fn the_first_database_that_knows_the_place_wins() {
        let mut place = Place::default();
        let city = Record { country: Some("de"), latitude: Some(52.5), ..Record::default() };
        city.add_to(&mut place);
        assert_eq!((place.country.as_deref(), place.latitude), (Some("DE"), None), "half a point is none");
        let other = Record {
            country: Some("FR"),
            latitude: Some(48.0),
            longitude: Some(2.0),
            asn: Some(64496),
            ..Record::default()
        };
        other.add_to(&mut place);
        assert_eq!((place.country.as_deref(), place.latitude, place.asn), (Some("DE"), None, Some(64496)));
        let mut nowhere = Place::default();
        Record { latitude: Some(0.0), longitude: Some(0.0), ..Record::default() }.add_to(&mut nowhere);
        assert_eq!(nowhere, Place::default(), "nothing is put at 0,0");
    }
}
