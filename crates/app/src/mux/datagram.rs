//! What `mux attach` is told about datagrams, and the table that the programs read.

use std::{collections::BTreeSet, fmt, str::FromStr};

use underpass_abi::mux::{FALLBACK_DROP, FALLBACK_PASS, MAX_ROUTES, Slot, Table};
use underpass_logic::mux::table;

use super::route::{self, Lengths, Match, Route};
use crate::error::Result;

/// The longest payload of a UDP datagram, in bytes (over IPv6, RFC 8200).
const LONGEST: u32 = 65_527;

/// What happens to a datagram that no route takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Default {
    /// It goes to this port.
    Port(u16),
    /// It is dropped.
    Drop,
    /// It passes as it is.
    Pass,
}

impl FromStr for Default {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "drop" => Ok(Self::Drop),
            "pass" => Ok(Self::Pass),
            _ => port(text).map(Self::Port).map_err(|why| format!("{why}, 'drop' or 'pass'")),
        }
    }
}

impl fmt::Display for Default {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => port.fmt(f),
            Self::Drop => f.write_str("drop"),
            Self::Pass => f.write_str("pass"),
        }
    }
}

/// A UDP port of `--port`, of a route or a default.
///
/// # Errors
/// Says what was expected.
pub fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("'{text}' is no port: expected a number from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

/// What becomes of datagrams for one port.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The port that everybody sends to.
    pub port: u16,
    /// The services' ports, by tag.
    pub routes: Vec<Route<u16>>,
    /// What happens to the rest.
    pub default: Default,
    /// The payload lengths that are valid, in bytes.
    pub lengths: Lengths,
}

impl Plan {
    /// Checks what the command line says.
    ///
    /// # Errors
    /// [`crate::error::Error::Usage`], naming the route that is wrong.
    pub fn new(port: u16, routes: &[String], default: Default, lengths: Option<Lengths>) -> Result<Self> {
        let routes = route::parse(routes, self::port)?;
        let lengths = lengths.unwrap_or(Lengths(0..=LONGEST));
        let longest = (*lengths.0.end()).min(LONGEST);
        route::check_within(&routes, longest as usize, "a payload")?;
        let plan = Self { port, routes, default, lengths: Lengths(*lengths.0.start()..=longest) };
        plan.table(None)?;
        Ok(plan)
    }

    /// The table. Routes that `before` has as well keep their counters.
    ///
    /// # Errors
    /// [`crate::error::Error::Usage`], naming the route that does not fit.
    pub fn table(&self, before: Option<&Table>) -> Result<Box<Table>> {
        let mut table = Box::new(table::EMPTY);
        table.port = self.port;
        table.min_length = *self.lengths.0.start();
        table.max_length = *self.lengths.0.end();
        table.fallback = match self.default {
            Default::Port(port) => port.into(),
            Default::Drop => FALLBACK_DROP,
            Default::Pass => FALLBACK_PASS,
        };
        let counters = self.counters(before);
        route::build(&mut table, &self.routes, |index, route| {
            (route.target, counters.get(index).copied().unwrap_or_default())
        })?;
        Ok(table)
    }

    fn counters(&self, before: Option<&Table>) -> Vec<u16> {
        let known: Vec<(Match, u16)> = before.map_or(vec![], |table| {
            table::routes(table).map(|slot| (tag(table, slot), slot.counter)).collect()
        });
        let kept: Vec<Option<u16>> = self
            .routes
            .iter()
            .map(|route| known.iter().find(|(tag, _)| *tag == route.matches).map(|(_, counter)| *counter))
            .collect();
        let taken: BTreeSet<u16> = kept.iter().flatten().copied().collect();
        let mut free = (0..MAX_ROUTES as u16).filter(|counter| !taken.contains(counter));
        kept.into_iter().map(|kept| kept.or_else(|| free.next()).unwrap_or_default()).collect()
    }
}

/// The match that a route in a table stands for.
pub fn tag(table: &Table, slot: &Slot) -> Match {
    let (offset, window, length) = table::tag(table, slot);
    Match::Bytes { offset, bytes: window[window.len() - length..].to_vec() }
}

/// What a table says about datagrams that no route takes.
pub fn default(table: &Table) -> Default {
    match table.fallback {
        FALLBACK_PASS => Default::Pass,
        port if port < FALLBACK_PASS => Default::Port(port as u16),
        _ => Default::Drop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(routes: &[&str]) -> Result<Plan> {
        let routes: Vec<String> = routes.iter().map(|&route| route.to_owned()).collect();
        Plan::new(5000, &routes, Default::Drop, None)
    }

    #[test]
    fn a_route_keeps_its_counter_when_others_come_and_go() {
        let before = plan(&["@20:600=5001", "@20:601=5002", "@20:602=5003"]).unwrap().table(None).unwrap();
        let after = plan(&["@0:x=1", "@20:602=9", "@20:600=5001"]).unwrap().table(Some(&before)).unwrap();
        let counters: Vec<_> = table::routes(&after)
            .map(|slot| (tag(&after, slot).to_string(), slot.port, slot.counter))
            .collect();
        let expected = [("@0:x", 1, 1), ("@20:602", 9, 2), ("@20:600", 5001, 0)];
        assert_eq!(counters, expected.map(|(tag, port, counter)| (tag.to_owned(), port, counter)));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (routes, reason) in [
            (&["tls=5001"][..], "'tls=5001': 'tls' is decided on the first bytes"),
            (&["@20:600=0"], "'0' is no port"),
            (&["@20:600=70000"], "'70000' is no port"),
            (&["@65527:1=1"], "bytes end at 65528"),
            (&["@0:12345678901234567=1"], "1 to 16 bytes"),
        ] {
            let said = plan(routes).unwrap_err().to_string();
            assert!(said.contains(reason), "{said}");
        }
        let many: Vec<String> = (0..33).map(|offset| format!("@{offset}:t{offset}=1")).collect();
        let said = Plan::new(1, &many, Default::Drop, None).unwrap_err().to_string();
        assert!(said.contains("@32:t32=1") && said.contains("32 different pairs"), "{said}");
        let lengths = Some("..=22".parse().unwrap());
        let said = Plan::new(1, &["@20:600=1".to_owned()], Default::Drop, lengths).unwrap_err().to_string();
        assert!(said.contains("ends at 23") || said.contains("end at 23"), "{said}");
    }
}
