//! Whatever the bytes, and whoever they claim to come from: nothing panics, and what is
//! dropped was an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass_abi::dnsguard::{
    Answered, Class, Learned, MEMORY_SLOTS, Pattern, RESOLVER_SLOTS, Resolver, Settings, layer, settings_flag,
};
use underpass_logic::{
    dns,
    dnsguard::{Memory, judge, note_query},
    packet::{ip::Address, udp::Datagram},
};

/// One slot of each kind: what is under test is the reading, not the forgetting.
struct One {
    query: u64,
    learned: Learned,
    answered: Answered,
}

impl Memory for One {
    fn now(&self) -> u64 {
        1
    }

    fn is_bogus(&self, address: Address) -> bool {
        address.0[15] & 1 == 1
    }

    fn query(&self, slot: usize) -> u64 {
        assert!(slot < MEMORY_SLOTS);
        self.query
    }

    fn set_query(&mut self, slot: usize, query: u64) {
        assert!(slot < MEMORY_SLOTS);
        self.query = query;
    }

    fn learned(&mut self, slot: usize) -> Option<&mut Learned> {
        assert!(slot < RESOLVER_SLOTS);
        Some(&mut self.learned)
    }

    fn answered(&mut self, slot: usize) -> Option<&mut Answered> {
        assert!(slot < MEMORY_SLOTS);
        Some(&mut self.answered)
    }
}

fuzz_target!(|bytes: &[u8]| {
    let pattern = Pattern {
        offset: 2,
        layer: layer::DNS,
        length: 2,
        bytes: [0x84; 8],
        mask: [0xff; 8],
        ..Pattern::EMPTY
    };
    let settings = Settings {
        flags: settings_flag::ANY | settings_flag::BOGUS,
        enabled: 0x1ff,
        any: Resolver { alone: 0x1ff, ..Resolver::EMPTY },
        ttl_remember_ns: u64::MAX,
        duplicate_window_ns: u64::MAX,
        pattern_count: 1,
        patterns: [pattern; 8],
        ..Settings::EMPTY
    };
    let mut memory = One { query: 0, learned: Learned::EMPTY, answered: Answered::EMPTY };
    note_query(bytes, &settings, &mut memory);
    for _ in 0..2 {
        let judgement = judge(bytes, &settings, &mut memory);
        assert_eq!(judgement.rules & !settings.enabled, 0);
        if judgement.class == Class::Dropped {
            let datagram = Datagram::parse(bytes).expect("a datagram");
            let header = dns::Header::read(bytes, datagram.udp.payload_at()).expect("a header");
            assert_eq!(header.flags.get() & dns::flags::RESPONSE, dns::flags::RESPONSE);
            assert!(bytes.len() >= datagram.udp.end);
        }
    }
});
