//! `dnsguard show`: counters, learned TTLs and samples, read from the pinned maps.

use std::{
    io::Write as _,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use aya::maps::PerCpuArray;
use hickory_proto::op::Message;
use serde::Serialize;
use underpass_abi::dnsguard::{
    Class, Counters, Learned, MAX_RULES, Policy, RESOLVER_SLOTS, RULES, SAMPLE_BYTES, SAMPLES_PER_CPU, Sample,
};
use underpass_logic::{dnsguard::TRUSTED_ANSWERS, packet::ip::Address};

use super::{attach::DNSGUARD, rules::names_in};
use crate::{
    attachment::{Found, array, pinned, text},
    error::Result,
};

#[derive(Debug, Serialize)]
struct Report {
    attached: Vec<Shown>,
}

/// One guarded interface.
#[derive(Debug, Serialize)]
struct Shown {
    interface: String,
    /// Network namespace and interface number, as the pins are named.
    id: String,
    hook: &'static str,
    why: String,
    works: bool,
    dry_run: bool,
    /// Seconds since 1970.
    since: u64,
    packets: Packets,
    rules: Vec<RuleCount>,
    learned: Vec<LearnedTtl>,
    samples: Vec<Shot>,
    /// Answers that a rule hit and that were not sampled, as others were a moment before.
    unsampled: u64,
}

/// Packets by what became of them.
#[derive(Debug, Default, Serialize, PartialEq, Eq)]
pub(super) struct Packets {
    pub seen: u64,
    pub passed: u64,
    pub dropped: u64,
    /// Queries to guarded resolvers that were seen leaving.
    pub queries: u64,
    /// Of those passed, why.
    pub not_dns: u64,
    pub other_server: u64,
    pub fragment: u64,
    pub unparsed: u64,
    pub truncated: u64,
    pub no_answer: u64,
    pub several_answers: u64,
    pub judged: u64,
}

#[derive(Debug, Serialize)]
struct RuleCount {
    rule: String,
    on: bool,
    hits: u64,
    dropped: u64,
}

#[derive(Debug, Serialize)]
struct LearnedTtl {
    resolver: IpAddr,
    ttl: u32,
    /// How many answers in a row showed it.
    answers: u32,
    /// Whether those are enough for the rule to count.
    known: bool,
}

#[derive(Debug, Serialize)]
struct Shot {
    /// Seconds ago.
    age_s: u64,
    resolver: IpAddr,
    client: IpAddr,
    ttl: u32,
    name: Option<String>,
    answers: Vec<String>,
    verdict: &'static str,
    rules: Vec<String>,
}

pub(super) fn show(json: bool) -> Result<()> {
    let mut attached = vec![];
    for found in DNSGUARD.found()? {
        attached.push(read(&found)?);
    }
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &Report { attached }).context("cannot print")?;
        return Ok(writeln!(out).context("cannot print")?);
    }
    if attached.is_empty() {
        return Ok(writeln!(out, "dnsguard is not attached").context("cannot print")?);
    }
    for shown in &attached {
        print(&mut out, shown).context("cannot print")?;
    }
    Ok(())
}

fn read(found: &Found) -> Result<Shown> {
    let counters = counters(found)?;
    let policy: Policy = array(&found.folder, "POLICY")?.get(&0, 0).context("cannot read POLICY")?;
    let mut names: Vec<String> = RULES.iter().map(|name| (*name).to_owned()).collect();
    let patterns = policy.patterns.iter().map(|name| text(name));
    names.extend(patterns.take_while(|name| !name.is_empty()));
    let rules = names.iter().enumerate().map(|(bit, name)| RuleCount {
        rule: name.clone(),
        on: policy.enabled & 1 << bit != 0,
        hits: counters.hits[bit],
        dropped: counters.drops[bit],
    });
    Ok(Shown {
        interface: found.interface(),
        id: found.folder.key.clone(),
        hook: found.attached.hook.word(),
        why: found.attached.why.clone(),
        works: found.works()?,
        dry_run: policy.dry_run != 0,
        since: found.since(),
        packets: Packets::from_counters(&counters),
        rules: rules.collect(),
        learned: learned(found)?,
        samples: samples(found, &names)?,
        unsampled: counters.unsampled,
    })
}

impl Packets {
    pub(super) fn from_counters(counters: &Counters) -> Self {
        let class = |class: Class| counters.classes[class as usize];
        let seen: u64 = counters.classes.iter().sum();
        let dropped = class(Class::Dropped);
        Self {
            seen,
            passed: seen - dropped,
            dropped,
            queries: counters.queries,
            not_dns: class(Class::NotDns),
            other_server: class(Class::OtherServer),
            fragment: class(Class::Fragment),
            unparsed: class(Class::Unparsed),
            truncated: class(Class::Truncated),
            no_answer: class(Class::Empty),
            several_answers: class(Class::Several),
            judged: class(Class::Passed),
        }
    }
}

fn counters(found: &Found) -> Result<Counters> {
    let map: PerCpuArray<_, Counters> =
        pinned(&found.folder, "COUNTERS")?.try_into().context("COUNTERS is no per-CPU array")?;
    let values = map.get(&0, 0).context("cannot read COUNTERS")?;
    Ok(sum(values.iter()))
}

/// All CPUs' counters together.
pub(super) fn sum<'a>(values: impl Iterator<Item = &'a Counters>) -> Counters {
    let mut sum = Counters::EMPTY;
    for value in values {
        for (to, from) in sum.classes.iter_mut().zip(&value.classes) {
            *to += from;
        }
        for bit in 0..MAX_RULES {
            sum.hits[bit] += value.hits[bit];
            sum.drops[bit] += value.drops[bit];
        }
        sum.queries += value.queries;
        sum.unsampled += value.unsampled;
        sum.samples += value.samples;
    }
    sum
}

fn learned(found: &Found) -> Result<Vec<LearnedTtl>> {
    let map = array(&found.folder, "LEARNED")?;
    let mut learned = vec![];
    for slot in 0..RESOLVER_SLOTS as u32 {
        let entry: Learned = map.get(&slot, 0).context("cannot read LEARNED")?;
        if entry.answers > 0 {
            learned.push(LearnedTtl {
                resolver: Address::from(entry.address).into(),
                ttl: entry.hop_limit,
                answers: entry.answers,
                known: entry.answers >= TRUSTED_ANSWERS,
            });
        }
    }
    learned.sort_by_key(|entry| entry.resolver);
    Ok(learned)
}

fn samples(found: &Found, names: &[String]) -> Result<Vec<Shot>> {
    let map: PerCpuArray<_, Sample> =
        pinned(&found.folder, "SAMPLES")?.try_into().context("SAMPLES is no per-CPU array")?;
    let mut samples = vec![];
    for slot in 0..SAMPLES_PER_CPU as u32 {
        let values = map.get(&slot, 0).context("cannot read SAMPLES")?;
        samples.extend(values.iter().copied().filter(|sample| sample.at != 0));
    }
    samples.sort_by_key(|sample| std::cmp::Reverse(sample.at));
    samples.truncate(SAMPLES_PER_CPU);
    let now = Duration::from(
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?,
    );
    let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    Ok(samples.iter().map(|sample| shot(sample, names, now)).collect())
}

fn shot(sample: &Sample, names: &[String], now: u64) -> Shot {
    let length = (sample.length as usize).min(SAMPLE_BYTES);
    let message = Message::from_vec(&sample.message[..length]).ok();
    let answers = message
        .iter()
        .flat_map(|message| &message.answers)
        .map(|record| format!("{} {}", record.record_type(), record.data));
    Shot {
        age_s: now.saturating_sub(sample.at) / 1_000_000_000,
        resolver: Address(sample.source).into(),
        client: Address(sample.destination).into(),
        ttl: sample.hop_limit,
        name: message
            .as_ref()
            .and_then(|message| message.queries.first())
            .map(|query| query.name().to_string()),
        answers: answers.collect(),
        verdict: if sample.dropped == 1 { "drop" } else { "pass" },
        rules: names_in(names, sample.rules).into_iter().map(str::to_owned).collect(),
    }
}

fn print(out: &mut impl std::io::Write, shown: &Shown) -> std::io::Result<()> {
    let age = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs().saturating_sub(shown.since));
    let mode = if shown.dry_run { ", dry run: nothing is dropped" } else { "" };
    let gone = if shown.works { "" } else { " (the interface is gone)" };
    writeln!(out, "{}{gone}: {}, as {}{mode}", shown.interface, shown.hook, shown.why)?;
    writeln!(out, "  attached {} ago", humantime::format_duration(Duration::from_secs(age)))?;
    let packets = &shown.packets;
    writeln!(
        out,
        "  packets seen {}, passed {}, dropped {}; queries seen leaving {}",
        packets.seen, packets.passed, packets.dropped, packets.queries
    )?;
    writeln!(
        out,
        "  passed as: not DNS {}, other server {}, fragment {}, unreadable {}, truncated {}, no answer {}, \
         several answers {}, judged {}",
        packets.not_dns,
        packets.other_server,
        packets.fragment,
        packets.unparsed,
        packets.truncated,
        packets.no_answer,
        packets.several_answers,
        packets.judged
    )?;
    writeln!(out, "  {:<32} {:>12} {:>12}", "rule", "hits", "in drops")?;
    for rule in &shown.rules {
        let off = if rule.on { "" } else { "  off" };
        writeln!(out, "  {:<32} {:>12} {:>12}{off}", rule.rule, rule.hits, rule.dropped)?;
    }
    for learned in &shown.learned {
        let known = if learned.known { "" } else { ", too few to count" };
        writeln!(
            out,
            "  learned: {} answers with TTL {} ({} answers{known})",
            learned.resolver, learned.ttl, learned.answers
        )?;
    }
    for sample in &shown.samples {
        writeln!(
            out,
            "  {} {} ago: {} from {} (TTL {}) to {}: {} [{}]",
            sample.verdict,
            humantime::format_duration(Duration::from_secs(sample.age_s)),
            sample.name.as_deref().unwrap_or("?"),
            sample.resolver,
            sample.ttl,
            sample.client,
            sample.answers.join(", "),
            sample.rules.join(", ")
        )?;
    }
    if shown.unsampled > 0 {
        writeln!(out, "  {} more hits were not sampled", shown.unsampled)?;
    }
    Ok(())
}
