//! dnsguard's memory in maps, its counters and samples: what its programs share.

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns},
};
use underpass_abi::dnsguard::{
    Answered, CLASSES, Class, Counters, Learned, MAX_RULES, MEMORY_SLOTS, RESOLVER_SLOTS, RULES,
    SAMPLE_BYTES, SAMPLES_PER_CPU, Sample, Settings, rule, settings_flag,
};
use underpass_logic::{
    dnsguard::{Judgement, Memory, Seen},
    packet::{Packet, ip::Address, udp::Datagram},
};

/// What is remembered, by slot.
pub struct Maps {
    /// The settings' length of a tick.
    pub tick_ns: u64,
    pub queries: &'static Array<u64, MEMORY_SLOTS>,
    pub answered: &'static Array<Answered, MEMORY_SLOTS>,
    pub learned: &'static Array<Learned, RESOLVER_SLOTS>,
    pub is_bogus: fn(Address) -> bool,
}

impl Memory for Maps {
    #[inline(always)]
    fn now(&self) -> u64 {
        if self.tick_ns == 0 { now() } else { tick().wrapping_mul(self.tick_ns) }
    }

    #[inline(always)]
    fn is_bogus(&self, address: Address) -> bool {
        (self.is_bogus)(address)
    }

    #[inline(always)]
    fn query(&self, slot: usize) -> u64 {
        self.queries.get(slot as u32).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn set_query(&mut self, slot: usize, query: u64) {
        if let Some(value) = self.queries.get_ptr_mut(slot as u32) {
            // SAFETY: a value of the map; a word is written whole.
            unsafe { *value = query };
        }
    }

    #[inline(always)]
    fn learned(&mut self, slot: usize) -> Option<&mut Learned> {
        // SAFETY: a value of the map. Two CPUs may mix theirs: the next answers mend it.
        self.learned.get_ptr_mut(slot as u32).map(|value| unsafe { &mut *value })
    }

    #[inline(always)]
    fn answered(&mut self, slot: usize) -> Option<&mut Answered> {
        // SAFETY: a value of the map. Two CPUs may mix theirs, which hides a duplicate.
        self.answered.get_ptr_mut(slot as u32).map(|value| unsafe { &mut *value })
    }
}

/// Judges a packet and counts it; whether it is to be dropped. `sample` is called for
/// an answer that a rule hit, if it is this CPU's first within a tick of the clock.
#[inline(always)]
pub fn guard<P: Packet>(
    packet: &P,
    settings: &Settings,
    memory: &mut impl Memory,
    counters: &PerCpuArray<Counters, 1>,
    sample: impl FnOnce(&P, &Judgement, &mut Counters),
) -> bool {
    // What passes unjudged is done with here, and carries nothing along.
    let judged = Seen::of(packet, settings).and_then(|seen| seen.judge(packet, settings, memory));
    let Some(counters) = counters.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own value; nothing interrupts the program and comes here.
    let counters = unsafe { &mut *counters };
    let judgement = match judged {
        Ok(judgement) => judgement,
        Err(class) => {
            count(packet, counters, class);
            return false;
        }
    };
    count(packet, counters, judgement.class);
    let dropped = is_dropped(judgement.class);
    if judgement.rules != 0 {
        count_rules(packet, counters, &judgement);
        let tick = tick();
        if tick == counters.sampled_at {
            counters.unsampled += 1;
        } else {
            counters.sampled_at = tick;
            sample(packet, &judgement, counters);
        }
    }
    dropped && settings.flags & settings_flag::DRY_RUN == 0
}

/// The policy: whatever is not sure to be forged passes.
#[inline(always)]
fn is_dropped(class: Class) -> bool {
    match class {
        Class::NotDns
        | Class::OtherServer
        | Class::Fragment
        | Class::Unparsed
        | Class::Truncated
        | Class::Empty
        | Class::Several
        | Class::Passed => false,
        Class::Dropped => true,
    }
}

#[inline(always)]
fn count<P: Packet>(packet: &P, counters: &mut Counters, class: Class) {
    // Forgotten and masked: the compiler makes one number of the class and how it was
    // found, and then the verifier does not know that it is in range ("invalid access
    // to map value, value_size=360 off=480 size=8").
    counters.classes[packet.forget(class as usize) % CLASSES] += 1;
}

/// Counts the rules that hit: the built-in ones, and the patterns if one of them did.
#[inline(always)]
fn count_rules<P: Packet>(packet: &P, counters: &mut Counters, judgement: &Judgement) {
    let dropped = u64::from(is_dropped(judgement.class));
    let (built_in, patterns) = (RULES.len(), MAX_RULES);
    let mut count = |range: core::ops::Range<usize>| {
        for nth in range {
            // Forgotten, or the verifier follows every combination of hits.
            if packet.forget(judgement.rules as usize) & 1 << nth != 0 {
                counters.hits[nth] += 1;
                counters.drops[nth] += dropped;
            }
        }
    };
    count(0..built_in);
    if judgement.rules >= rule::FIRST_PATTERN {
        count(built_in..patterns);
    }
}

/// Keeps an answer that a rule hit among this CPU's last samples.
#[inline(always)]
pub fn keep_sample<P: Packet>(
    packet: &P,
    judgement: &Judgement,
    counters: &mut Counters,
    samples: &PerCpuArray<Sample, SAMPLES_PER_CPU>,
) {
    // Rarely done, so nothing of it is carried here from the judging.
    let Ok(datagram) = Datagram::parse(packet) else { return };
    let nth = counters.samples as usize % SAMPLES_PER_CPU;
    let Some(sample) = samples.get_ptr_mut(nth as u32) else { return };
    // SAFETY: this CPU's own value; nothing interrupts the program and comes here.
    let sample = unsafe { &mut *sample };
    counters.samples += 1;
    sample.source = datagram.ip.source(packet).unwrap_or(Address([0; 16])).0;
    sample.destination = datagram.ip.destination(packet).unwrap_or(Address([0; 16])).0;
    sample.rules = judgement.rules;
    sample.dropped = u32::from(matches!(judgement.class, Class::Dropped));
    sample.hop_limit = u32::from(datagram.ip.hop_limit);
    sample.length = copy_message(packet, &datagram, &mut sample.message);
    sample.at = now();
}

/// Copies a message, cut to what fits; how many bytes it was.
#[inline(always)]
fn copy_message<P: Packet>(packet: &P, datagram: &Datagram, to: &mut [u8; SAMPLE_BYTES]) -> u32 {
    let length = datagram.udp.payload_length().min(SAMPLE_BYTES);
    let mut done = 0;
    let (words, _) = to.as_chunks_mut::<8>();
    for word in words {
        let at = packet.forget(datagram.udp.payload_at() + done);
        if done + 8 > length {
            break;
        }
        let Ok(bytes) = packet.bytes::<8>(at) else { break };
        *word = bytes;
        done = packet.forget(done + 8);
    }
    // What does not fill a word, byte by byte.
    for _ in 0..7 {
        if done >= length {
            break;
        }
        let at = packet.forget(datagram.udp.payload_at() + done);
        let Ok([byte]) = packet.bytes(at) else { break };
        // Forgotten, or the compiler drops the mask, as it knows the bound, which 5.10 does
        // not ("math between map_value pointer and register with unbounded min value").
        to[packet.forget(done) % SAMPLE_BYTES] = byte;
        done = packet.forget(done + 1);
    }
    done as u32
}

/// The kernel's clock in ticks: a load from memory.
#[inline(always)]
fn tick() -> u64 {
    // SAFETY: no arguments, no memory.
    unsafe { bpf_jiffies64() }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: no arguments, no memory.
    unsafe { bpf_ktime_get_ns() }
}
