//! What the programs remember in maps, in plain memory: for captures.

use ipnet::IpNet;
use underpass_abi::dnsguard::{Answered, Learned, MEMORY_SLOTS, RESOLVER_SLOTS};
use underpass_logic::{dnsguard::Memory, packet::ip::Address};

use super::attach::mapped;

/// The same slots as the maps have.
#[derive(Debug)]
pub struct HostMemory {
    /// The time of the packet that is judged, in nanoseconds.
    pub now: u64,
    /// The networks, each mapped into IPv6, in order and none within another.
    bogus: Vec<(u128, u128)>,
    queries: Vec<u64>,
    answered: Vec<Answered>,
    learned: Vec<Learned>,
}

impl HostMemory {
    /// Remembers nothing yet.
    pub fn new(bogus: &[IpNet]) -> Self {
        Self {
            now: 0,
            bogus: ranges(bogus),
            queries: vec![0; MEMORY_SLOTS],
            answered: vec![Answered::EMPTY; MEMORY_SLOTS],
            learned: vec![Learned::EMPTY; RESOLVER_SLOTS],
        }
    }
}

impl Memory for HostMemory {
    fn now(&self) -> u64 {
        self.now
    }

    fn is_bogus(&self, address: Address) -> bool {
        let address = u128::from_be_bytes(address.0);
        let after = self.bogus.partition_point(|(first, _)| *first <= address);
        after > 0 && address <= self.bogus[after - 1].1
    }

    fn query(&self, slot: usize) -> u64 {
        self.queries[slot]
    }

    fn set_query(&mut self, slot: usize, query: u64) {
        self.queries[slot] = query;
    }

    fn learned(&mut self, slot: usize) -> Option<&mut Learned> {
        self.learned.get_mut(slot)
    }

    fn answered(&mut self, slot: usize) -> Option<&mut Answered> {
        self.answered.get_mut(slot)
    }
}

/// Networks as ascending ranges of addresses mapped into IPv6 that neither overlap nor
/// touch.
pub(super) fn ranges(networks: &[IpNet]) -> Vec<(u128, u128)> {
    let mut ranges: Vec<_> = networks
        .iter()
        .map(|network| {
            let (address, prefix) = mapped(network);
            let first = u128::from_be_bytes(address.0);
            let hosts = u128::MAX.checked_shr(prefix).unwrap_or(0);
            (first & !hosts, first | hosts)
        })
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = vec![];
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_both_families_merge_and_match() {
        let networks: Vec<IpNet> =
            ["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "2001:db8::/32", "203.0.113.7/32"]
                .map(|text| text.parse().unwrap())
                .to_vec();
        assert_eq!(ranges(&networks).len(), 3);
        let memory = HostMemory::new(&networks);
        let bogus = |text: &str| memory.is_bogus(text.parse::<std::net::IpAddr>().unwrap().into());
        for hit in ["10.0.0.0", "11.255.255.255", "203.0.113.7", "2001:db8:ffff::1"] {
            assert!(bogus(hit), "{hit}");
        }
        for miss in ["9.255.255.255", "12.0.0.0", "203.0.113.6", "203.0.113.8", "2001:db9::"] {
            assert!(!bogus(miss), "{miss}");
        }
    }
}
