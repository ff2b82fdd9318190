//! One line per event: for programs as JSON, for people as text.

use std::{
    io::{self, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use underpass_abi::watch::{Address, Connection, PACKET, PacketNote, Passage, direction, flag, quality};

use super::{
    place,
    state::{Line, Lost, View, What},
};

/// Which moment of the wall clock the boot clock's zero is.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    zero: SystemTime,
}

impl Clock {
    /// Compares the two clocks.
    pub fn now() -> Self {
        Self { zero: SystemTime::now() - Duration::from_nanos(boot_time()) }
    }

    /// The wall clock at that time of the boot clock.
    pub fn wall(self, boot: u64) -> SystemTime {
        self.zero + Duration::from_nanos(boot)
    }
}

/// Nanoseconds of the boot clock.
pub fn boot_time() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

/// One JSON object a line. Absent is absent: a field that is not known is left out.
#[derive(Debug, Default, Serialize)]
struct Json<'a> {
    time: String,
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exe: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_us: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retransmits: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attribution: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unseen: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<LostJson>,
}

/// What was missed since the start, in the event `lost`.
#[derive(Debug, Serialize)]
pub struct LostJson {
    events: u64,
    names: u64,
    changes: u64,
    datagrams: u64,
    sockets: u64,
    passages: u64,
    packets: u64,
    unattributed: u64,
    undecoded: u64,
}

impl From<Lost> for LostJson {
    fn from(lost: Lost) -> Self {
        let Lost { events, names, changes, datagrams, sockets, passages, packets, unattributed, undecoded } =
            lost;
        Self { events, names, changes, datagrams, sockets, passages, packets, unattributed, undecoded }
    }
}

/// Writes a line of JSON.
///
/// # Errors
/// Those of the writer.
pub fn json(out: &mut impl Write, line: &Line, clock: Clock) -> io::Result<()> {
    let json = match line {
        Line::Connection { what, connection } => connection_json(*what, connection, clock),
        Line::Lost(lost) => Json {
            time: rfc3339(SystemTime::now()),
            event: "lost",
            lost: Some((*lost).into()),
            ..Json::default()
        },
    };
    serde_json::to_writer(&mut *out, &json)?;
    out.write_all(b"\n")
}

fn connection_json(what: What, view: &View, clock: Clock) -> Json<'_> {
    let report = &view.report;
    let began = matches!(what, What::Connect | What::Accept);
    let known = report.owner.quality > quality::NONE;
    let program = view.program.as_deref();
    let place = program.map(|program| place::of(&program.cgroup_path)).unwrap_or_default();
    let time = if began && report.started != 0 { report.started } else { report.at };
    Json {
        time: rfc3339(clock.wall(time)),
        event: event(what),
        protocol: Some(protocol(report.protocol)),
        direction: direction_word(report),
        local: address(&report.local, report.local_port, &report.remote),
        remote: address(&report.remote, report.remote_port, &report.local),
        remote_name: view.remote_name.as_deref(),
        pid: known.then_some(report.owner.tgid),
        comm: known.then(|| comm(report)),
        exe: program.map(|program| program.exe.as_str()).filter(|exe| !exe.is_empty()),
        uid: known.then_some(report.owner.uid),
        cgroup: program.map(|program| program.cgroup_path.as_str()).filter(|path| !path.is_empty()),
        container: place.container,
        unit: place.unit,
        netns: Some(report.netns).filter(|netns| *netns != 0),
        rx_bytes: (!began).then_some(report.rx_bytes),
        tx_bytes: (!began).then_some(report.tx_bytes),
        rtt_us: (report.rtt_us != 0 && !began).then_some(report.rtt_us),
        retransmits: (report.protocol == 6 && !began).then_some(report.retransmits),
        duration_ms: duration(report).filter(|_| !began).map(|duration| duration.as_millis() as u64),
        attribution: Some(attribution(report)),
        unseen: (what == What::Close && report.flags & flag::UNSEEN != 0).then_some(true),
        lost: None,
    }
}

/// A packet that passes, as a line of JSON.
#[derive(Debug, Serialize)]
struct PacketJson {
    time: String,
    event: &'static str,
    protocol: String,
    direction: &'static str,
    local: Option<String>,
    remote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_bytes: Option<u32>,
}

/// Writes a line about one packet.
///
/// # Errors
/// Those of the writer.
pub fn packet(out: &mut impl Write, note: &PacketNote, as_json: bool, clock: Clock) -> io::Result<()> {
    let Passage { beyond, behind, beyond_port, behind_port, protocol: number, .. } = note.passage;
    let sent = note.out == 1;
    let line = PacketJson {
        time: rfc3339(clock.wall(note.at)),
        event: "packet",
        protocol: protocol(u16::from(number)),
        direction: "forwarded",
        local: address(&behind, behind_port, &beyond),
        remote: address(&beyond, beyond_port, &behind),
        rx_bytes: (!sent).then_some(note.payload),
        tx_bytes: sent.then_some(note.payload),
    };
    if as_json {
        serde_json::to_writer(&mut *out, &line)?;
        return out.write_all(b"\n");
    }
    let text = |address: &Option<String>| address.clone().unwrap_or_else(|| "-".to_owned());
    let arrow = if sent { "->" } else { "<-" };
    let (local, remote) = (text(&line.local), text(&line.remote));
    writeln!(
        out,
        "{} packet   {:<5} {local} {arrow} {remote}  {}",
        &line.time[11..23],
        line.protocol,
        note.payload
    )
}

/// Writes a line for people.
///
/// # Errors
/// Those of the writer.
pub fn text(out: &mut impl Write, line: &Line, clock: Clock) -> io::Result<()> {
    let (what, view) = match line {
        Line::Connection { what, connection } => (*what, connection),
        Line::Lost(lost) => return writeln!(out, "lost     {}", lost_text(*lost)),
    };
    let report = &view.report;
    let began = matches!(what, What::Connect | What::Accept) && report.started != 0;
    let time = rfc3339(clock.wall(if began { report.started } else { report.at }));
    write!(out, "{} {:<8} {:<5} ", &time[11..23], event(what), protocol(report.protocol))?;
    let who = if report.owner.quality > quality::NONE {
        format!("{}[{}]", comm(report), report.owner.tgid)
    } else {
        "-".to_owned()
    };
    let arrow = match report.direction {
        direction::INBOUND => "<-",
        direction::OUTBOUND => "->",
        direction::FORWARDED => "<>",
        _ => "--",
    };
    let local = address(&report.local, report.local_port, &report.remote).unwrap_or_else(|| "-".to_owned());
    let remote = address(&report.remote, report.remote_port, &report.local).unwrap_or_else(|| "-".to_owned());
    write!(out, "{who:<24} {local} {arrow} {remote}")?;
    if let Some(name) = &view.remote_name {
        write!(out, " ({name})")?;
    }
    if matches!(what, What::Traffic | What::Close) {
        write!(out, "  received {} sent {}", bytes(report.rx_bytes), bytes(report.tx_bytes))?;
        if report.rtt_us != 0 {
            write!(out, " rtt {:.1}ms", f64::from(report.rtt_us) / 1000.0)?;
        }
        if report.retransmits != 0 {
            write!(out, " retransmits {}", report.retransmits)?;
        }
        if let Some(duration) = duration(report).filter(|_| what == What::Close) {
            write!(out, " after {:.3}s", duration.as_secs_f64())?;
        }
        if what == What::Close && report.flags & flag::UNSEEN != 0 {
            write!(out, ", its end unseen")?;
        }
    }
    writeln!(out)
}

/// Everything that was missed, for people.
pub fn lost_text(lost: Lost) -> String {
    format!(
        "{} events, {} names, {} state changes, {} datagrams, {} sockets, {} passing flows, {} packets, \
         {} undecoded; {} connections without a process",
        lost.events,
        lost.names,
        lost.changes,
        lost.datagrams,
        lost.sockets,
        lost.passages,
        lost.packets,
        lost.undecoded,
        lost.unattributed
    )
}

fn event(what: What) -> &'static str {
    match what {
        What::Connect => "connect",
        What::Accept => "accept",
        What::Traffic => "traffic",
        What::Close => "close",
    }
}

/// Who opened it; `None` where that is not known.
pub fn direction_word(report: &Connection) -> Option<&'static str> {
    match report.direction {
        direction::OUTBOUND => Some("outbound"),
        direction::INBOUND => Some("inbound"),
        direction::FORWARDED => Some("forwarded"),
        _ => None,
    }
}

/// How the process was found out.
pub fn attribution(report: &Connection) -> &'static str {
    match report.owner.quality {
        quality::SEEN => "kernel",
        quality::SEEDED => "procfs",
        quality::LISTENER => "listener",
        _ => "none",
    }
}

/// The protocol's word, or its number where it has none here.
pub fn protocol(number: u16) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        33 => "dccp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        136 => "udplite".to_owned(),
        255 => "raw".to_owned(),
        262 => "mptcp".to_owned(),
        PACKET => "packet".to_owned(),
        number => format!("ip-{number}"),
    }
}

/// The process' name, threads of the kernel in brackets as ps(1) has them.
pub fn comm(report: &Connection) -> String {
    let comm = &report.owner.comm;
    let end = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    let name = String::from_utf8_lossy(&comm[..end]);
    if report.flags & flag::KERNEL != 0 { format!("[{name}]") } else { name.into_owned() }
}

/// How long the connection has lasted; `None` where it began before the watch.
pub fn duration(report: &Connection) -> Option<Duration> {
    (report.started != 0).then(|| Duration::from_nanos(report.at.saturating_sub(report.started)))
}

/// An address as people write it; `None` where nothing is known. "Any" is written
/// in the family of the other side.
pub fn address(address: &Address, port: u16, other: &Address) -> Option<String> {
    if *address == [0; 16] && port == 0 {
        return None;
    }
    let any_of_v4 = *address == [0; 16] && matches!(ip(other), IpAddr::V4(_));
    let ip = if any_of_v4 { IpAddr::from([0, 0, 0, 0]) } else { ip(address) };
    Some(if port == 0 { ip.to_string() } else { SocketAddr::new(ip, port).to_string() })
}

/// The address, an IPv4-mapped one as IPv4.
pub fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}

/// A number of bytes, for people.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    format!("{value:.1} {unit}")
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::watch::{event::Program, state::tests::report};

    fn view() -> View {
        let program = Program {
            pid: 100,
            exe: "/usr/bin/curl".to_owned(),
            cgroup: 1,
            cgroup_path: "/system.slice/cron.service".to_owned(),
        };
        View {
            report: report(1, 100, b"curl", 500_000, 1000),
            program: Some(Rc::new(program)),
            remote_name: Some("www.example.com".into()),
        }
    }

    fn written(line: &Line) -> String {
        let mut out = vec![];
        json(&mut out, line, Clock { zero: SystemTime::UNIX_EPOCH }).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_schema_stays() {
        let line = Line::Connection { what: What::Close, connection: view() };
        assert_eq!(
            written(&line),
            "{\"time\":\"1970-01-01T00:00:00.000501Z\",\"event\":\"close\",\"protocol\":\"tcp\",\
             \"direction\":\"outbound\",\"local\":\"10.0.0.1:40001\",\"remote\":\"192.0.2.7:443\",\
             \"remote_name\":\"www.example.com\",\"pid\":100,\"comm\":\"curl\",\"exe\":\"/usr/bin/curl\",\
             \"uid\":0,\"cgroup\":\"/system.slice/cron.service\",\"unit\":\"cron.service\",\"netns\":1,\
             \"rx_bytes\":500000,\"tx_bytes\":1000,\"rtt_us\":12345,\"retransmits\":1,\"duration_ms\":0,\
             \"attribution\":\"kernel\"}\n"
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let mut view = view();
        (view.program, view.remote_name) = (None, None);
        (view.report.owner.quality, view.report.started, view.report.direction) = (0, 0, 0);
        let line = written(&Line::Connection { what: What::Connect, connection: view });
        for field in [
            "pid",
            "comm",
            "exe",
            "uid",
            "cgroup",
            "remote_name",
            "rx_bytes",
            "duration_ms",
            "direction",
            "null",
        ] {
            assert!(!line.contains(&format!("\"{field}\"")), "{field}: {line}");
        }
        assert!(line.contains("\"attribution\":\"none\""), "{line}");
    }
}
