//! dnsguard: which DNS answers are forged.
//!
//! [`judge`] looks at a packet, [`Memory`] is what it knows from packets before.
//! Whatever cannot be read passes: the guard fails open, and counts that.

use underpass_abi::dnsguard::{
    Answered, Class, Learned, MAX_PATTERNS, MEMORY_SLOTS, Pattern, RESOLVER_SLOTS, Resolver, Settings, layer,
    rule, settings_flag,
};

use crate::{
    dns::{self, Opt, SingleAnswer},
    packet::{
        Packet, Short, Unparsed,
        ip::{Address, Fragment, Ipv4, Version, Words},
        udp::{Datagram, Glance},
    },
};

/// The port that DNS servers answer from.
pub const PORT: u16 = 53;
/// How many trusted answers in a row make a hop limit known.
pub const TRUSTED_ANSWERS: u32 = 3;

/// What is remembered from packet to packet. Slots are below the sizes in
/// `underpass_abi::dnsguard`; two things may share one, and the later wins.
pub trait Memory {
    /// Nanoseconds of a clock that never goes back.
    fn now(&self) -> u64;
    /// Whether an address is on the list of bogus ones.
    fn is_bogus(&self, address: Address) -> bool;
    /// The query in a slot: its key, the lowest bit set if it had an OPT record.
    fn query(&self, slot: usize) -> u64;
    /// Remembers a query.
    fn set_query(&mut self, slot: usize, query: u64);
    /// What was learned of the resolver in a slot, to look at and to change.
    fn learned(&mut self, slot: usize) -> Option<&mut Learned>;
    /// The last answer in a slot, to look at and to change.
    fn answered(&mut self, slot: usize) -> Option<&mut Answered>;
}

/// What became of a packet, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// What became of it.
    pub class: Class,
    /// Mask of the rules that hit, whether they sufficed or not.
    pub rules: u32,
}

/// Judges a packet that came in.
#[inline(always)]
pub fn judge<P: Packet + ?Sized, M: Memory>(packet: &P, settings: &Settings, memory: &mut M) -> Judgement {
    match Seen::of(packet, settings).and_then(|seen| seen.judge(packet, settings, memory)) {
        Ok(judgement) => judgement,
        Err(class) => Judgement { class, rules: 0 },
    }
}

/// Notes a query that goes out to a guarded resolver; whether it was one.
#[inline(always)]
pub fn note_query<P: Packet + ?Sized, M: Memory>(packet: &P, settings: &Settings, memory: &mut M) -> bool {
    if !matches!(Glance::at(packet), Glance::Udp { destination_port: PORT, .. } | Glance::Unclear) {
        return false;
    }
    let Ok(datagram) = Datagram::parse(packet) else { return false };
    if datagram.udp.destination_port != PORT {
        return false;
    }
    let ip = &datagram.ip;
    let Ok((source, destination)) = ip.endpoints(packet) else { return false };
    if guarded(settings, destination, slot_of(settings, destination)).is_none() {
        return false;
    }
    let message = datagram.udp.payload_at();
    let Ok(header) = dns::Header::read(packet, message) else { return false };
    let Ok(opt) = dns::query_has_opt(packet, &header, message) else { return false };
    let key = exchange(source, datagram.udp.source_port, destination, header.id.get());
    memory.set_query(memory_slot(key), key & !1 | u64::from(opt));
    true
}

/// Whether the hits drop the answer: one that suffices alone, or two that count.
#[inline(always)]
pub fn suffices(rules: u32, resolver: &Resolver) -> bool {
    let counting = rules & (resolver.alone | resolver.paired);
    rules & resolver.alone != 0 || counting & counting.wrapping_sub(1) != 0
}

/// The slot of a resolver's address in [`Settings::resolvers`] and in what is learned.
#[inline(always)]
pub fn slot_of(settings: &Settings, [high, low]: Words) -> usize {
    let word = low ^ high.wrapping_mul(ODD);
    (word.wrapping_mul(settings.hash_seed | 1) >> 56) as usize % RESOLVER_SLOTS
}

#[inline(always)]
fn guarded(settings: &Settings, address: Words, slot: usize) -> Option<&Resolver> {
    let resolver = &settings.resolvers[slot];
    if resolver.address == address {
        return Some(resolver);
    }
    (settings.flags & settings_flag::ANY != 0).then_some(&settings.any)
}

/// Whether that shows at a glance, as it does of nearly all traffic that is not DNS.
#[inline(always)]
fn is_surely_no_answer<P: Packet + ?Sized>(packet: &P) -> bool {
    match Glance::at(packet) {
        Glance::Other => true,
        Glance::Udp { source_port, .. } => source_port != PORT,
        Glance::Unclear => false,
    }
}

/// A single answer of a guarded resolver, and all that was read of it.
pub struct Seen<'a> {
    datagram: Datagram,
    source: Words,
    destination: Words,
    slot: usize,
    resolver: &'a Resolver,
    header: dns::Header,
    answer: SingleAnswer,
}

impl<'a> Seen<'a> {
    /// Reads a packet, or says which kind of those it is that pass unjudged.
    ///
    /// # Errors
    /// Any [`Class`] but [`Class::Passed`] and [`Class::Dropped`].
    #[inline(always)]
    pub fn of<P: Packet + ?Sized>(packet: &P, settings: &'a Settings) -> Result<Self, Class> {
        if is_surely_no_answer(packet) {
            return Err(Class::NotDns);
        }
        let datagram = match Datagram::parse(packet) {
            Ok(datagram) => datagram,
            Err(Unparsed::Fragment) => return Err(Class::Fragment),
            Err(Unparsed::Short | Unparsed::Malformed | Unparsed::NotIp | Unparsed::OtherProtocol) => {
                return Err(Class::NotDns);
            }
        };
        if datagram.udp.source_port != PORT {
            return Err(Class::NotDns);
        }
        let (source, destination) = datagram.ip.endpoints(packet).map_err(|Short| Class::NotDns)?;
        let slot = slot_of(settings, source);
        let resolver = guarded(settings, source, slot).ok_or(Class::OtherServer)?;
        if datagram.ip.fragment != Fragment::Whole {
            return Err(Class::Fragment);
        }
        let message = datagram.udp.payload_at();
        let header = match dns::Header::read(packet, message) {
            Ok(header) if message + dns::Header::LEN <= datagram.udp.end => header,
            Ok(_) | Err(Short) => return Err(Class::Unparsed),
        };
        let flags = header.flags.get();
        if flags & dns::flags::RESPONSE == 0 || header.question_count.get() != 1 {
            return Err(Class::Unparsed);
        }
        if flags & dns::flags::TRUNCATED != 0 {
            return Err(Class::Truncated);
        }
        match header.answer_count.get() {
            0 => return Err(Class::Empty),
            1 => {}
            _ => return Err(Class::Several),
        }
        let answer = SingleAnswer::parse(packet, &header, message, datagram.udp.end)
            .map_err(|dns::Malformed| Class::Unparsed)?;
        Ok(Self { datagram, source, destination, slot, resolver, header, answer })
    }

    /// Judges the answer, and learns from it if it can be trusted.
    ///
    /// # Errors
    /// [`Class::Unparsed`] where the packet ends too early after all.
    #[inline(always)]
    pub fn judge<P: Packet + ?Sized, M: Memory>(
        &self,
        packet: &P,
        settings: &Settings,
        memory: &mut M,
    ) -> Result<Judgement, Class> {
        let rules = self.hits(packet, settings, memory).map_err(|Short| Class::Unparsed)?;
        let class = if suffices(rules, self.resolver) { Class::Dropped } else { Class::Passed };
        if class == Class::Passed && rules & !rule::TTL_DEVIATES == 0 && self.answer.opt == Opt::Present {
            self.learn(settings, memory);
        }
        Ok(Judgement { class, rules })
    }

    /// Mask of the rules that are on and hit.
    #[inline(always)]
    fn hits<P: Packet + ?Sized, M: Memory>(
        &self,
        packet: &P,
        settings: &Settings,
        memory: &mut M,
    ) -> Result<u32, Short> {
        let on = |rule: u32| settings.enabled & rule != 0;
        // Each rule is forgotten once it is looked at: else the verifier follows every
        // combination of hits.
        let forgotten = |hits: u32| packet.forget(hits as usize) as u32;
        let mut hits = 0;
        if self.datagram.ip.version == Version::V4 && on(rule::IP_ID_ZERO | rule::DONT_FRAGMENT) {
            let ip = Ipv4::read(packet, self.datagram.ip.header)?;
            if ip.identification.get() == 0 {
                hits |= rule::IP_ID_ZERO;
            }
            if ip.dont_fragment() {
                hits |= rule::DONT_FRAGMENT;
            }
            hits = forgotten(hits);
        }
        if self.header.flags.get() & dns::flags::AUTHORITATIVE != 0 && self.header.authority_count.get() == 0
        {
            hits |= rule::AUTHORITATIVE;
        }
        if self.answer.full_name {
            hits |= rule::FULL_NAME;
        }
        hits = forgotten(hits);
        if on(rule::BOGUS_ADDRESS) && settings.flags & settings_flag::BOGUS != 0 {
            let address = match (self.answer.kind, self.answer.length) {
                (dns::kind::A, 4) => Some(Address::v4(packet.bytes(self.answer.data)?)),
                (dns::kind::AAAA, 16) => Some(Address(packet.bytes(self.answer.data)?)),
                _ => None,
            };
            if address.is_some_and(|address| memory.is_bogus(address)) {
                hits |= rule::BOGUS_ADDRESS;
            }
            hits = forgotten(hits);
        }
        if on(rule::TTL_DEVIATES) && self.ttl_deviates(settings, memory) {
            hits |= rule::TTL_DEVIATES;
        }
        hits = forgotten(hits);
        if on(rule::NO_EDNS | rule::DUPLICATE) {
            hits = forgotten(hits | self.exchange_hits(packet, settings, memory));
        }
        for (nth, pattern) in settings.patterns.iter().enumerate().take(MAX_PATTERNS) {
            if nth >= settings.pattern_count as usize {
                break;
            }
            if matches(packet, &self.datagram, pattern) {
                hits |= rule::FIRST_PATTERN << nth;
            }
            hits = forgotten(hits);
        }
        Ok(hits & settings.enabled)
    }

    /// The rules that compare the answer with the query, or with another answer.
    #[inline(always)]
    fn exchange_hits<P: Packet + ?Sized, M: Memory>(
        &self,
        packet: &P,
        settings: &Settings,
        memory: &mut M,
    ) -> u32 {
        let mut hits = 0;
        let key =
            exchange(self.destination, self.datagram.udp.destination_port, self.source, self.header.id.get());
        let slot = memory_slot(key);
        if self.answer.opt == Opt::Absent && memory.query(slot) == key | 1 {
            hits |= rule::NO_EDNS;
        }
        if settings.enabled & rule::DUPLICATE != 0 {
            let now = memory.now();
            let answer = self.fingerprint(packet);
            let Some(before) = memory.answered(slot) else { return hits };
            if before.key != key || now > before.at.wrapping_add(settings.duplicate_window_ns) {
                *before = Answered { key, answer, at: now };
            } else if before.answer != answer {
                hits |= rule::DUPLICATE;
            }
        }
        hits
    }

    /// A hash of what is answered: of an address all of it, else the record's start.
    #[inline(always)]
    fn fingerprint<P: Packet + ?Sized>(&self, packet: &P) -> u64 {
        let kind = u64::from(self.answer.kind) << 32 | self.answer.length as u64;
        let data = match (self.answer.length >= 16, self.answer.length >= 4) {
            (true, _) => Address(packet.bytes(self.answer.data).unwrap_or_default()).words(),
            (false, true) => {
                [0, u64::from(u32::from_ne_bytes(packet.bytes(self.answer.data).unwrap_or_default()))]
            }
            (false, false) => [0, 0],
        };
        mix(kind.wrapping_mul(ODD) ^ data[0].rotate_left(17), data[1])
    }

    #[inline(always)]
    fn ttl_deviates<M: Memory>(&self, settings: &Settings, memory: &mut M) -> bool {
        let Some(learned) = memory.learned(self.slot) else { return false };
        if learned.answers < TRUSTED_ANSWERS || self.agrees(learned, settings) {
            return false;
        }
        let (address, at) = (learned.address, learned.at);
        address == self.source && memory.now() <= at.saturating_add(settings.ttl_remember_ns)
    }

    /// Whether the answer has the hop limit that was learned.
    #[inline(always)]
    fn agrees(&self, learned: &Learned, settings: &Settings) -> bool {
        learned.hop_limit.abs_diff(u32::from(self.datagram.ip.hop_limit)) <= settings.ttl_tolerance
    }

    /// Learns from a trusted answer. One that agrees is only noted now and then, as
    /// reading the clock costs more than all else here.
    #[inline(always)]
    fn learn<M: Memory>(&self, settings: &Settings, memory: &mut M) {
        let answers = match memory.learned(self.slot) {
            Some(learned) if learned.address == self.source && self.agrees(learned, settings) => {
                learned.answers = learned.answers.saturating_add(1);
                learned.answers
            }
            _ => 0,
        };
        if answers > TRUSTED_ANSWERS && !answers.is_multiple_of(16) {
            return;
        }
        let at = memory.now();
        let Some(learned) = memory.learned(self.slot) else { return };
        if answers == 0 {
            // With `any`, resolvers may share a slot: the later one has it.
            let hop_limit = u32::from(self.datagram.ip.hop_limit);
            *learned = Learned { address: self.source, at, answers: 1, hop_limit };
        } else {
            learned.at = at;
        }
    }
}

/// Whether a packet has a pattern's bytes; one that ends before has not.
#[inline(always)]
fn matches<P: Packet + ?Sized>(packet: &P, datagram: &Datagram, pattern: &Pattern) -> bool {
    let base = match pattern.layer {
        layer::IP => datagram.ip.header,
        layer::UDP => datagram.udp.header,
        _ => datagram.udp.payload_at(),
    };
    let at = packet.forget(base + usize::from(pattern.offset));
    if at + usize::from(pattern.length) > datagram.udp.end {
        return false;
    }
    for nth in 0..pattern.bytes.len() {
        if nth >= usize::from(pattern.length) {
            break;
        }
        let Ok([byte]) = packet.bytes(at + nth) else { return false };
        if (byte ^ pattern.bytes[nth]) & pattern.mask[nth] != 0 {
            return false;
        }
    }
    true
}

/// A hash of who asks whom under which identifier, its lowest bit clear. An empty slot
/// is 0, which no exchange is.
#[inline(always)]
fn exchange([a, b]: Words, port: u16, [c, d]: Words, id: u16) -> u64 {
    let ports = u64::from(port) << 16 | u64::from(id);
    let (client, server) = (mix(a.wrapping_mul(ODD) ^ ports, b), mix(c.wrapping_mul(ODD), d));
    (mix(client, server) | 1 << 63) & !1
}

#[inline(always)]
fn memory_slot(key: u64) -> usize {
    (key >> 32) as usize % MEMORY_SLOTS
}

/// One step of a multiplicative hash: good enough for slots, not against an attacker,
/// who can at most make two exchanges share one.
#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(ODD);
    hash ^ (hash >> 32)
}

/// 2^64 divided by the golden ratio: an odd number whose bits look like chance.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
