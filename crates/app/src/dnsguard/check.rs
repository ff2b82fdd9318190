//! `dnsguard check`: the same verdicts on a capture, without privileges.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use pcap_file::{
    DataLink,
    pcap::PcapReader,
    pcapng::{Block, PcapNgReader},
};
use serde::Serialize;
use underpass_abi::dnsguard::{Class, MAX_RULES};
use underpass_logic::{
    dns,
    dnsguard::{PORT, judge, note_query},
    packet::udp::Datagram,
};

use super::{Rules, memory::HostMemory};
use crate::error::{Error, Result};

/// What was read of a packet.
struct Captured {
    time: Duration,
    link: DataLink,
    bytes: Vec<u8>,
}

/// A line of `--json` about an answer.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// The packet's number in the capture, from 1.
    packet: u64,
    verdict: &'static str,
    rules: Vec<&'a str>,
    /// What kind of answer it is.
    class: &'static str,
    resolver: Option<String>,
    name: Option<String>,
}

#[derive(Debug, Serialize)]
struct Summary {
    summary: Totals,
}

#[derive(Debug, Default, Serialize)]
struct Totals {
    packets: u64,
    answers: u64,
    passed: u64,
    dropped: u64,
    queries: u64,
    /// Answers by kind.
    classes: std::collections::BTreeMap<&'static str, u64>,
    /// Answers that each rule hit.
    rules: std::collections::BTreeMap<String, u64>,
    /// Packets of a link type that is not read.
    other_link: u64,
}

pub(super) fn check(path: &Path, rules: &Rules, json: bool) -> Result<()> {
    let file = File::open(path)
        .map_err(|error| Error::Usage(format!("cannot open the capture {}: {error}", path.display())))?;
    let mut out = BufWriter::new(io::stdout().lock());
    judge_all(BufReader::new(file), path, rules, json, &mut out)
}

/// Judges every packet of a capture, which `path` only names.
pub(crate) fn judge_all(
    capture: impl Read,
    path: &Path,
    rules: &Rules,
    json: bool,
    mut out: impl Write,
) -> Result<()> {
    let mut memory = HostMemory::new(&rules.bogus);
    let mut totals = Totals::default();
    let mut hits = [0_u64; MAX_RULES];
    read(capture, path, |captured| {
        totals.packets += 1;
        let Some(frame) = ethernet(&captured) else {
            totals.other_link += 1;
            return Ok(());
        };
        // A little after the start: 0 stands for never.
        memory.now = u64::try_from(captured.time.as_nanos()).unwrap_or(u64::MAX).max(1);
        let frame = frame.as_slice();
        if note_query(&frame, &rules.settings, &mut memory) {
            totals.queries += 1;
        }
        let judgement = judge(&frame, &rules.settings, &mut memory);
        if !is_answer(frame) {
            return Ok(());
        }
        totals.answers += 1;
        let class = word(judgement.class);
        *totals.classes.entry(class).or_default() += 1;
        let dropped = judgement.class == Class::Dropped;
        *(if dropped { &mut totals.dropped } else { &mut totals.passed }) += 1;
        for (bit, hits) in hits.iter_mut().enumerate() {
            *hits += u64::from(judgement.rules >> bit & 1);
        }
        let line = Line {
            packet: totals.packets,
            verdict: if dropped { "drop" } else { "pass" },
            rules: rules.hit(judgement.rules),
            class,
            resolver: source(frame),
            name: name(frame),
        };
        Ok(print(&mut out, &line, json).context("cannot print")?)
    })?;
    totals.rules = rules.names.iter().cloned().zip(hits).filter(|(_, hits)| *hits > 0).collect();
    finish(&mut out, totals, json).context("cannot print")?;
    Ok(())
}

/// Whether the frame holds a DNS answer, from whomever.
fn is_answer(frame: &[u8]) -> bool {
    Datagram::parse(frame).is_ok_and(|datagram| {
        datagram.udp.source_port == PORT
            && dns::Header::read(frame, datagram.udp.payload_at())
                .is_ok_and(|header| header.flags.get() & dns::flags::RESPONSE != 0)
    })
}

fn source(frame: &[u8]) -> Option<String> {
    let address = Datagram::parse(frame).ok()?.ip.source(frame).ok()?;
    Some(std::net::IpAddr::from(address).to_string())
}

fn name(frame: &[u8]) -> Option<String> {
    let udp = Datagram::parse(frame).ok()?.udp;
    let message = hickory_proto::op::Message::from_vec(frame.get(udp.payload_at()..udp.end)?).ok()?;
    Some(message.queries.first()?.name().to_string())
}

fn word(class: Class) -> &'static str {
    match class {
        Class::NotDns => "not-dns",
        Class::OtherServer => "other-server",
        Class::Fragment => "fragment",
        Class::Unparsed => "unreadable",
        Class::Truncated => "truncated",
        Class::Empty => "no-answer",
        Class::Several => "several-answers",
        Class::Passed | Class::Dropped => "judged",
    }
}

fn print(out: &mut impl Write, line: &Line, json: bool) -> io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, line)?;
        return writeln!(out);
    }
    let rules = if line.rules.is_empty() { String::new() } else { format!(" [{}]", line.rules.join(", ")) };
    writeln!(
        out,
        "{:>8} {} {} from {} ({}){rules}",
        line.packet,
        line.verdict,
        line.name.as_deref().unwrap_or("?"),
        line.resolver.as_deref().unwrap_or("?"),
        line.class
    )
}

fn finish(out: &mut impl Write, totals: Totals, json: bool) -> io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, &Summary { summary: totals })?;
        writeln!(out)?;
        return out.flush();
    }
    writeln!(
        out,
        "{} packets, {} DNS answers: {} pass, {} drop",
        totals.packets, totals.answers, totals.passed, totals.dropped
    )?;
    for (class, count) in &totals.classes {
        writeln!(out, "  {class:<20} {count}")?;
    }
    for (rule, count) in &totals.rules {
        writeln!(out, "  hit by {rule:<13} {count}")?;
    }
    if totals.other_link > 0 {
        writeln!(out, "  {} packets of a link type that is not read", totals.other_link)?;
    }
    out.flush()
}

/// Calls `each` for every packet of a pcap or pcapng file.
fn read(mut capture: impl Read, path: &Path, mut each: impl FnMut(Captured) -> Result<()>) -> Result<()> {
    let shown = path.display();
    let mut magic = [0; 4];
    let broken = |what: &str| Error::Usage(format!("{shown} is no capture: {what}; expected pcap or pcapng"));
    capture.read_exact(&mut magic).map_err(|error| {
        broken(&if error.kind() == io::ErrorKind::UnexpectedEof {
            "it is shorter than a file header".to_owned()
        } else {
            error.to_string()
        })
    })?;
    let file = io::Cursor::new(magic).chain(capture);
    match magic {
        [0x0a, 0x0d, 0x0d, 0x0a] => {
            let mut reader = PcapNgReader::new(file).map_err(|error| broken(&error.to_string()))?;
            let mut number = 0_u64;
            while let Some(block) = reader.next_block() {
                let block = block.map_err(|error| cut(path, number, &error))?.into_owned();
                if let Some(captured) = captured(block, &reader) {
                    number += 1;
                    each(captured)?;
                }
            }
        }
        [0xd4, 0xc3, 0xb2, 0xa1]
        | [0xa1, 0xb2, 0xc3, 0xd4]
        | [0x4d, 0x3c, 0xb2, 0xa1]
        | [0xa1, 0xb2, 0x3c, 0x4d] => {
            let mut reader = PcapReader::new(file).map_err(|error| broken(&error.to_string()))?;
            let link = reader.header().datalink;
            let mut number = 0_u64;
            while let Some(packet) = reader.next_packet() {
                let packet = packet.map_err(|error| cut(path, number, &error))?;
                number += 1;
                each(Captured { time: packet.timestamp, link, bytes: packet.data.into_owned() })?;
            }
        }
        other => return Err(broken(&format!("it starts with {other:02x?}"))),
    }
    Ok(())
}

/// The packet in a block, if there is one.
#[expect(clippy::wildcard_enum_match_arm, reason = "of the many kinds of block three hold a packet")]
fn captured<R: Read>(block: Block, reader: &PcapNgReader<R>) -> Option<Captured> {
    let (time, interface, bytes) = match block {
        Block::EnhancedPacket(packet) => (packet.timestamp, packet.interface_id, packet.data),
        Block::SimplePacket(packet) => (Duration::ZERO, 0, packet.data),
        Block::Packet(packet) => {
            (Duration::from_micros(packet.timestamp), u32::from(packet.interface_id), packet.data)
        }
        _ => return None,
    };
    let link = reader.interfaces().get(interface as usize).map_or(DataLink::ETHERNET, |found| found.linktype);
    Some(Captured { time, link, bytes: bytes.into_owned() })
}

fn cut(path: &Path, number: u64, error: &pcap_file::PcapError) -> Error {
    Error::Usage(format!("{}: broken after packet {number}: {error}", path.display()))
}

/// The packet behind an Ethernet header, which is made up where the link has another.
#[expect(clippy::wildcard_enum_match_arm, reason = "of the many links these carry IP")]
fn ethernet(captured: &Captured) -> Option<Vec<u8>> {
    let bytes = &captured.bytes;
    let (ether_type, skip) = match captured.link {
        DataLink::ETHERNET => return Some(bytes.clone()),
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => (by_version(*bytes.first()?)?, 0),
        // The address family in front has the byte order of who wrote it, and IPv6's
        // number differs between systems: the packet itself tells.
        DataLink::NULL | DataLink::LOOP => (by_version(*bytes.get(4)?)?, 4),
        DataLink::LINUX_SLL => (u16::from_be_bytes(*bytes.get(14..)?.first_chunk()?), 16),
        DataLink::LINUX_SLL2 => (u16::from_be_bytes(*bytes.first_chunk()?), 20),
        _ => return None,
    };
    let mut frame = vec![0; 12];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(bytes.get(skip..)?);
    Some(frame)
}

fn by_version(first: u8) -> Option<u16> {
    match first >> 4 {
        4 => Some(0x0800),
        6 => Some(0x86dd),
        _ => None,
    }
}

/// Arguments of `underpass dnsguard check`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A pcap or pcapng file
    pub file: PathBuf,
    #[command(flatten)]
    pub rules: super::RuleArgs,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}
