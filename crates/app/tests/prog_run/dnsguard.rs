//! dnsguard's programs on built packets: what each rule hits and just misses, on each
//! hook and in each family, and that they decide as the host does.

use std::net::IpAddr;

use aya::{Ebpf, maps::PerCpuArray};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use underpass::{
    dnsguard::{
        Guarded, HostMemory, Rules,
        forgery::{HONEST, INJECTORS, Injector, answer, query, set_checksums},
        open,
    },
    object,
};
use underpass_abi::dnsguard::{Class, Counters, rule, settings_flag};
use underpass_logic::{
    dnsguard::{judge, note_query},
    packet::{ip::Ip, udp::Datagram},
};

use crate::run::{load, load_programs, run};

const GOOGLE: [&str; 2] = ["8.8.8.8", "2001:4860:4860::8888"];
const CLOUDFLARE: [&str; 2] = ["1.1.1.1", "2606:4700:4700::1111"];
const STRANGER: [&str; 2] = ["198.51.100.53", "2001:db8:53::53"];
const CLIENT: [&str; 2] = ["192.0.2.10", "2001:db8::10"];
const TRUTH: [&str; 2] = ["203.0.113.80", "2001:db8:80::80"];
const BOGUS: [&str; 2] = ["203.0.113.66", "2001:db8:66::66"];
const KINDS: [u16; 2] = [1, 28];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Xdp,
    Tc,
}

/// A loaded guard, and the host's beside it.
struct Guard {
    ebpf: Ebpf,
    hook: Hook,
    rules: Rules,
    memory: HostMemory,
}

impl Guard {
    fn new(hook: Hook, toml: &str) -> Self {
        Self::with(hook, toml, |_| {})
    }

    fn with(hook: Hook, toml: &str, change: impl FnOnce(&mut Rules)) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, toml.as_bytes()).unwrap();
        let mut rules = Rules::new(&[], Some(file.path())).unwrap_or_else(|error| panic!("{error}"));
        change(&mut rules);
        let mut ebpf = open(&rules).unwrap();
        load_programs(&mut ebpf);
        let mut memory = HostMemory::new(&rules.bogus);
        memory.now = 1;
        Self { ebpf, hook, rules, memory }
    }

    /// Sees a packet come in; the class and the rules that hit, which are the same on
    /// the host.
    #[track_caller]
    fn sees(&mut self, packet: &[u8]) -> (Class, Vec<String>) {
        let before = self.counters();
        let program = match self.hook {
            Hook::Xdp => "dnsguard_xdp",
            Hook::Tc => "dnsguard_tc",
        };
        let outcome = run(&mut self.ebpf, program, packet);
        assert_eq!(outcome.packet, packet, "a packet is never changed");
        let after = self.counters();
        let host = judge(packet, &self.rules.settings, &mut self.memory);

        let moved: Vec<_> = (0..9).filter(|class| after.classes[*class] != before.classes[*class]).collect();
        assert_eq!(moved, [host.class as usize], "class of {packet:02x?}");
        let hits = (0..16).filter(|bit| after.hits[*bit] != before.hits[*bit]);
        let hits = hits.fold(0_u32, |mask, bit| mask | 1 << bit);
        assert_eq!(self.rules.hit(hits), self.rules.hit(host.rules), "rules on {packet:02x?}");
        let dry = self.rules.settings.flags & settings_flag::DRY_RUN != 0;
        let dropped = host.class == Class::Dropped && !dry;
        let verdict = match (self.hook, dropped) {
            (Hook::Xdp, true) => 1,
            (Hook::Xdp, false) => 2,
            (Hook::Tc, true) => 2,
            (Hook::Tc, false) => u32::MAX,
        };
        assert_eq!(outcome.verdict, verdict, "verdict on {packet:02x?}");
        (host.class, self.rules.hit(host.rules).into_iter().map(str::to_owned).collect())
    }

    #[track_caller]
    fn drops(&mut self, packet: &[u8], rules: &[&str]) {
        let (class, hit) = self.sees(packet);
        assert_eq!((class, hit), (Class::Dropped, owned(rules)));
    }

    #[track_caller]
    fn passes(&mut self, packet: &[u8], rules: &[&str]) {
        let (class, hit) = self.sees(packet);
        assert_eq!((class, hit), (Class::Passed, owned(rules)));
    }

    #[track_caller]
    fn passes_as(&mut self, packet: &[u8], class: Class) {
        assert_eq!(self.sees(packet), (class, vec![]));
    }

    /// Sees a query leave.
    fn sends(&mut self, packet: &[u8]) {
        let outcome = run(&mut self.ebpf, "dnsguard_egress", packet);
        assert_eq!(outcome.verdict, u32::MAX);
        note_query(packet, &self.rules.settings, &mut self.memory);
    }

    fn counters(&self) -> Counters {
        let map = self.ebpf.map("COUNTERS").unwrap();
        let map: PerCpuArray<_, Counters> = map.try_into().unwrap();
        let mut sum = Counters::EMPTY;
        for cpu in map.get(&0, 0).unwrap().iter() {
            for (to, from) in sum.classes.iter_mut().zip(cpu.classes) {
                *to += from;
            }
            for bit in 0..sum.hits.len() {
                sum.hits[bit] += cpu.hits[bit];
                sum.drops[bit] += cpu.drops[bit];
            }
            sum.queries += cpu.queries;
        }
        sum
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ask(family: usize, resolver: &str, id: u16, edns: bool) -> Vec<u8> {
    query((address(CLIENT[family]), 40000), address(resolver), ("www.example.org", KINDS[family]), id, edns)
}

/// An answer that no query was seen for.
fn reply(family: usize, resolver: &str, id: u16, how: &Injector) -> Vec<u8> {
    answer(&ask(family, resolver, id, false), how, address(TRUTH[family]), true).unwrap()
}

/// Changes a frame's DNS message and mends lengths and checksums.
fn with_message(frame: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let Datagram { ip, udp } = Datagram::parse(frame).unwrap();
    let mut message = frame[udp.payload_at()..].to_vec();
    change(&mut message);
    let mut frame = frame[..udp.payload_at()].to_vec();
    frame.extend(&message);
    let length = (message.len() + 8) as u16;
    frame[udp.header + 4..udp.header + 6].copy_from_slice(&length.to_be_bytes());
    let total = (frame.len() - ip.header) as u16;
    let (at, total) = if ip.header == ip.payload - 20 { (2, total) } else { (4, total - 40) };
    frame[ip.header + at..ip.header + at + 2].copy_from_slice(&total.to_be_bytes());
    let ip = Ip::parse(&frame[..]).unwrap();
    set_checksums(&mut frame[..], &ip).unwrap();
    frame
}

/// Runs a test on each hook, in each family.
fn each(test: impl Fn(Hook, usize)) {
    for hook in [Hook::Xdp, Hook::Tc] {
        for family in 0..2 {
            test(hook, family);
        }
    }
}

#[test]
fn header_rules_hit_google_only() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        guard.passes(&reply(family, GOOGLE[family], 1, &HONEST), &[]);
        let zero = Injector { identification: 0, ..HONEST };
        let fragile = Injector { dont_fragment: true, ..HONEST };
        let one = Injector { identification: 1, ..HONEST };
        guard.passes(&reply(family, GOOGLE[family], 2, &one), &[]);
        if family == 0 {
            guard.drops(&reply(family, GOOGLE[family], 3, &zero), &["ip-id-zero"]);
            guard.drops(&reply(family, GOOGLE[family], 4, &fragile), &["dont-fragment"]);
        } else {
            guard.passes(&reply(family, GOOGLE[family], 3, &zero), &[]);
        }
        // What Linux hosts send: counted, and passed.
        let linux = Injector { dont_fragment: true, identification: 0, ..HONEST };
        let (class, _) = guard.sees(&reply(family, CLOUDFLARE[family], 5, &linux));
        assert_eq!(class, Class::Passed);
        guard.passes_as(&reply(family, STRANGER[family], 6, &zero), Class::OtherServer);
    });
}

#[test]
fn authoritative_hits_without_authority_records() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let authority = Injector { flags: 0x8580, ..HONEST };
        guard.drops(&reply(family, GOOGLE[family], 1, &authority), &["authoritative"]);
        guard.drops(&reply(family, CLOUDFLARE[family], 1, &authority), &["authoritative"]);
        let with_records = with_message(&reply(family, GOOGLE[family], 2, &authority), |message| {
            message[9] = 1;
            message.extend([0xc0, 12, 0, 2, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0, 12]);
        });
        guard.passes(&with_records, &[]);
    });
}

#[test]
fn full_name_hits_what_is_not_a_pointer() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let full = Injector { full_name: true, ..HONEST };
        guard.drops(&reply(family, GOOGLE[family], 1, &full), &["full-name"]);
        // Elsewhere it needs a second one.
        guard.passes(&reply(family, CLOUDFLARE[family], 1, &full), &["full-name"]);
        let two = Injector { flags: 0x8400, ..full };
        guard.drops(&reply(family, CLOUDFLARE[family], 2, &two), &["authoritative", "full-name"]);
        // The root's name is shorter than a pointer to it.
        let root =
            query((address(CLIENT[family]), 4000), address(GOOGLE[family]), ("", KINDS[family]), 3, false);
        guard.passes(&answer(&root, &full, address(TRUTH[family]), true).unwrap(), &[]);
    });
}

#[test]
fn bogus_addresses_and_networks_hit() {
    let toml = r#"
        [rules.bogus-address]
        addresses = ["203.0.113.66", "198.51.100.0/24", "2001:db8:66::/48"]
    "#;
    each(|hook, family| {
        let mut guard = Guard::new(hook, toml);
        let ask = ask(family, CLOUDFLARE[family], 1, false);
        let named = |text: &str| answer(&ask, &HONEST, address(text), true).unwrap();
        guard.drops(&named(BOGUS[family]), &["bogus-address"]);
        guard.passes(&named(["203.0.113.67", "2001:db8:67::1"][family]), &["duplicate"]);
        guard.drops(&named(["198.51.100.200", "2001:db8:66:1::"][family]), &["bogus-address", "duplicate"]);
    });
}

#[test]
fn a_hundred_thousand_bogus_addresses_fit() {
    let mut guard = Guard::with(Hook::Xdp, "", |rules| {
        rules.bogus =
            (0..100_000_u32).map(|n| IpAddr::from((0x0a00_0000 + n * 2).to_be_bytes()).into()).collect();
        rules.settings.flags |= settings_flag::BOGUS;
        rules.settings.enabled |= rule::BOGUS_ADDRESS;
    });
    for (id, (last, bogus)) in
        [("10.0.0.0", true), ("10.0.0.1", false), ("10.3.13.62", true), ("10.3.13.64", false)]
            .into_iter()
            .enumerate()
    {
        let frame = answer(&ask(0, GOOGLE[0], id as u16, false), &HONEST, address(last), true).unwrap();
        if bogus { guard.drops(&frame, &["bogus-address"]) } else { guard.passes(&frame, &[]) }
    }
}

#[test]
fn a_ttl_is_learned_from_trusted_answers_and_deviation_hits() {
    let toml = "[rules]\nttl-deviates = { mode = \"alone\", tolerance = 3 }\nno-edns = { mode = \"off\" }";
    each(|hook, family| {
        let mut guard = Guard::new(hook, toml);
        let trusted = |id: u16, hop_limit: u8| {
            let asked = ask(family, GOOGLE[family], id, true);
            answer(&asked, &Injector { hop_limit, ..HONEST }, address(TRUTH[family]), true).unwrap()
        };
        let plain =
            |id: u16, hop_limit: u8| reply(family, GOOGLE[family], id, &Injector { hop_limit, ..HONEST });
        // Not before three are seen.
        guard.passes(&trusted(1, 118), &[]);
        guard.passes(&trusted(2, 118), &[]);
        guard.passes(&plain(3, 60), &[]);
        guard.passes(&trusted(4, 117), &[]);
        guard.drops(&plain(5, 60), &["ttl-deviates"]);
        guard.drops(&plain(6, 114), &["ttl-deviates"]);
        guard.passes(&plain(7, 115), &[]);
        guard.passes(&plain(8, 121), &[]);
        guard.drops(&plain(9, 122), &["ttl-deviates"]);
        // Another resolver has its own.
        let other = Injector { hop_limit: 60, ..HONEST };
        guard.passes(&reply(family, CLOUDFLARE[family], 10, &other), &[]);
    });
}

#[test]
fn no_edns_hits_the_answer_to_a_query_that_had_it() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let asked = ask(family, GOOGLE[family], 7, true);
        let without = answer(&asked, &HONEST, address(TRUTH[family]), false).unwrap();
        let with = answer(&asked, &HONEST, address(TRUTH[family]), true).unwrap();
        guard.passes(&without, &[]);
        guard.sends(&asked);
        guard.passes(&with, &[]);
        guard.drops(&without, &["no-edns"]);
        let other_id = answer(&ask(family, GOOGLE[family], 8, true), &HONEST, address(TRUTH[family]), false);
        guard.passes(&other_id.unwrap(), &[]);
        // Asked again without it, the answer need not have it.
        guard.sends(&ask(family, GOOGLE[family], 7, false));
        guard.passes(&without, &[]);
        assert_eq!(guard.counters().queries, 2);
        guard.sends(&ask(family, STRANGER[family], 9, true));
        assert_eq!(guard.counters().queries, 2);
    });
}

#[test]
fn a_second_different_answer_is_marked_and_passes() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let asked = ask(family, GOOGLE[family], 9, false);
        let first = answer(&asked, &HONEST, address(TRUTH[family]), true).unwrap();
        let second = answer(&asked, &HONEST, address(BOGUS[family]), true).unwrap();
        guard.passes(&first, &[]);
        guard.passes(&first, &[]);
        guard.passes(&second, &["duplicate"]);
        guard.passes(&reply(family, GOOGLE[family], 10, &HONEST), &[]);
    });
}

#[test]
fn byte_patterns_hit_where_they_say() {
    let toml = r#"
        [[pattern]]
        name = "short-lived"
        layer = "dns"
        offset = 39
        bytes = "0x0000003c"
        mode = "paired"
        [[pattern]]
        name = "from-53"
        layer = "udp"
        offset = 0
        bytes = "0x0135"
        mask = "0x00ff"
        mode = "mark"
        [[pattern]]
        name = "tos"
        layer = "ip"
        offset = 1
        bytes = "0x10"
        mode = "alone"
        [[pattern]]
        name = "beyond"
        layer = "dns"
        offset = 900
        bytes = "0x00"
        mask = "0x00"
        mode = "alone"
    "#;
    each(|hook, family| {
        let mut guard = Guard::new(hook, toml);
        let frame = reply(family, CLOUDFLARE[family], 1, &HONEST);
        guard.passes(&frame, &["short-lived", "from-53"]);
        let full = reply(family, CLOUDFLARE[family], 2, &Injector { flags: 0x8400, ..HONEST });
        guard.drops(&full, &["authoritative", "short-lived", "from-53"]);
        let longer = with_message(&frame, |message| message[42] = 61);
        guard.passes(&longer, &["from-53"]);
        if family == 0 {
            let mut marked = frame.clone();
            marked[15] = 0x10;
            let ip = Ip::parse(&marked[..]).unwrap();
            set_checksums(&mut marked[..], &ip).unwrap();
            guard.drops(&marked, &["short-lived", "from-53", "tos"]);
        }
    });
}

#[test]
fn what_is_not_judged_passes_and_is_counted() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let bad = Injector { identification: 0, flags: 0x8580, full_name: true, ..HONEST };
        let frame = reply(family, GOOGLE[family], 1, &bad);
        let changed = |at: usize, byte: u8| with_message(&frame, |message| message[at] = byte);
        guard.passes_as(&changed(2, 0x87), Class::Truncated);
        guard.passes_as(&changed(2, 0x05), Class::Unparsed);
        guard.passes_as(&changed(5, 2), Class::Unparsed);
        guard.passes_as(&changed(7, 0), Class::Empty);
        guard.passes_as(&changed(7, 2), Class::Several);
        // A label of a length that there is not, a record that ends too late.
        guard.passes_as(&changed(12, 0x80), Class::Unparsed);
        guard.passes_as(&with_message(&frame, |message| message.truncate(20)), Class::Unparsed);
        guard.passes_as(&with_message(&frame, |message| message.truncate(6)), Class::Unparsed);
        guard
            .passes_as(&with_message(&frame, |message| message.truncate(message.len() - 1)), Class::Unparsed);
        guard.passes_as(&ask(family, GOOGLE[family], 2, true), Class::NotDns);
        let mut arp = vec![0xff; 60];
        arp[12..14].copy_from_slice(&[8, 6]);
        if hook == Hook::Xdp {
            guard.passes_as(&arp, Class::NotDns);
        }
        let Datagram { ip, .. } = Datagram::parse(&frame[..]).unwrap();
        if family == 0 {
            let mut first = frame.clone();
            first[ip.header + 6] = 0x20;
            guard.passes_as(&first, Class::Fragment);
            let mut later = frame.clone();
            later[ip.header + 7] = 0x10;
            guard.passes_as(&later, Class::Fragment);
        } else {
            for (offset, _) in [([0, 1], "first"), ([0, 0x81], "later")] {
                let mut fragment = frame[..ip.payload].to_vec();
                fragment.extend([17, 0, offset[0], offset[1], 0, 0, 0, 9]);
                fragment.extend(&frame[ip.payload..]);
                fragment[ip.header + 6] = 44;
                let length = (fragment.len() - ip.header - 40) as u16;
                fragment[ip.header + 4..ip.header + 6].copy_from_slice(&length.to_be_bytes());
                guard.passes_as(&fragment, Class::Fragment);
            }
        }
    });
}

#[test]
fn tags_and_options_hide_nothing() {
    each(|hook, family| {
        let mut guard = Guard::new(hook, "");
        let frame = reply(family, GOOGLE[family], 1, &Injector { flags: 0x8580, ..HONEST });
        let tagged = |tags: &[u8]| [&frame[..12], tags, &frame[12..]].concat();
        guard.drops(&tagged(&[0x81, 0, 0, 5]), &["authoritative"]);
        guard.drops(&tagged(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5]), &["authoritative"]);
        let mut longer = frame.clone();
        if family == 0 {
            longer.splice(34..34, [1; 12]);
            longer[14] = 0x48;
            let total = (longer.len() - 14) as u16;
            longer[16..18].copy_from_slice(&total.to_be_bytes());
        } else {
            longer.splice(54..54, [17, 0, 1, 4, 0, 0, 0, 0]);
            longer[20] = 60;
            let length = (longer.len() - 54) as u16;
            longer[18..20].copy_from_slice(&length.to_be_bytes());
        }
        let ip = Ip::parse(&longer[..]).unwrap();
        set_checksums(&mut longer[..], &ip).unwrap();
        guard.drops(&longer, &["authoritative"]);
    });
}

#[test]
fn a_dry_run_counts_and_drops_nothing() {
    for hook in [Hook::Xdp, Hook::Tc] {
        let mut guard = Guard::with(hook, "", |rules| rules.settings.flags |= settings_flag::DRY_RUN);
        guard.drops(&reply(0, GOOGLE[0], 1, &Injector { identification: 0, ..HONEST }), &["ip-id-zero"]);
        assert_eq!(guard.counters().drops[0], 1);
    }
}

#[test]
fn any_guards_whoever_answers() {
    for (family, stranger) in STRANGER.into_iter().enumerate() {
        let mut rules = Rules::new(&[Guarded::Any], None).unwrap();
        rules.settings.flags |= settings_flag::ANY;
        let mut guard = Guard::with(Hook::Xdp, "", |own| *own = rules);
        let one = Injector { flags: 0x8580, ..HONEST };
        guard.passes(&reply(family, stranger, 1, &one), &["authoritative"]);
        guard.drops(
            &reply(family, stranger, 2, &Injector { full_name: true, ..one }),
            &["authoritative", "full-name"],
        );
    }
}

#[test]
fn every_known_injector_is_dropped_at_google_by_default() {
    for hook in [Hook::Xdp, Hook::Tc] {
        let mut guard = Guard::new(hook, "");
        for (id, injector) in INJECTORS.iter().enumerate() {
            let (class, hit) = guard.sees(&reply(0, GOOGLE[0], id as u16, injector));
            assert_eq!(class, Class::Dropped, "{}: {hit:?}", injector.name);
        }
    }
}

#[test]
fn the_kernel_decides_as_the_host_on_mutated_answers() {
    let mut runner = TestRunner::deterministic();
    let mutations = proptest::collection::vec((proptest::num::usize::ANY, proptest::num::u8::ANY), 1..4);
    let mut classes = std::collections::BTreeMap::<u32, u32>::new();
    for hook in [Hook::Xdp, Hook::Tc] {
        let mut guard = Guard::new(hook, "");
        for id in 0..1500_u16 {
            let family = usize::from(id % 2);
            let injector = INJECTORS[usize::from(id) % INJECTORS.len()];
            let injector = if id % 3 == 0 { HONEST } else { injector };
            let asked = ask(family, GOOGLE[family], id, id % 5 == 0);
            let mut frame = answer(&asked, &injector, address(TRUTH[family]), id % 7 != 0).unwrap();
            for (at, byte) in mutations.new_tree(&mut runner).unwrap().current() {
                // Not the addresses of Ethernet: nobody looks at them.
                let at = 12 + at % (frame.len() - 12);
                frame[at] = byte;
            }
            // TC's test run refuses a frame whose EtherType does not fit what follows.
            if hook == Hook::Tc && (frame[12..14] != asked[12..14] || frame[14] >> 4 != asked[14] >> 4) {
                continue;
            }
            let (class, _) = guard.sees(&frame);
            *classes.entry(class as u32).or_default() += 1;
        }
    }
    println!("packets by class: {classes:?}");
    assert!(classes.len() >= 6, "{classes:?}");
}

#[test]
fn the_verifier_spends_little_on_the_guard() {
    let object = load(object::DNSGUARD);
    for (name, most) in [("dnsguard_xdp", 100_000), ("dnsguard_egress", 80_000), ("dnsguard_tc", 160_000)] {
        let info = object.program(name).unwrap().info().unwrap();
        // Linux 5.16 and up tell.
        let Some(count) = info.verified_instruction_count() else { continue };
        println!("{name}: {count} instructions verified");
        assert!(count < most, "{name}: {count} instructions verified, expected fewer than {most}");
    }
}
