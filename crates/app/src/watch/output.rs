//! One line per event: for programs as JSON, for people as text.

use std::{
    borrow::Cow,
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

/// Writes a line of JSON, one object. Absent is absent: a field that is not known is left out.
pub fn json(out: &mut Vec<u8>, line: &Line, clock: Clock) {
    match line {
        Line::Connection { what, connection } => connection_json(out, *what, connection, clock),
        Line::Lost(lost) => {
            let mut object = Object::begin(out, SystemTime::now(), "lost");
            object.json("lost", &LostJson::from(*lost));
            object.end();
        }
    }
}

/// An object that is being written, field by field: there may be a hundred thousand a
/// second, so nothing is allocated, and only what comes from elsewhere is escaped.
struct Object<'a>(&'a mut Vec<u8>);

impl<'a> Object<'a> {
    /// With the fields that each has.
    fn begin(out: &'a mut Vec<u8>, time: SystemTime, event: &str) -> Self {
        out.extend_from_slice(b"{\"time\":\"");
        let _ = write!(out, "{}", humantime::format_rfc3339_micros(time));
        out.push(b'"');
        let mut object = Self(out);
        object.word("event", event);
        object
    }

    fn name(&mut self, name: &str) {
        self.0.extend_from_slice(b",\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
    }

    /// A word of ours, in which nothing is to be escaped.
    fn word(&mut self, name: &str, word: &str) {
        self.name(name);
        self.0.push(b'"');
        self.0.extend_from_slice(word.as_bytes());
        self.0.push(b'"');
    }

    /// Any text, or whatever else JSON has.
    fn json(&mut self, name: &str, value: &(impl Serialize + ?Sized)) {
        self.name(name);
        // A vector takes everything, and none of these values can fail.
        let _ = serde_json::to_writer(&mut *self.0, value);
    }

    fn text(&mut self, name: &str, text: Option<&str>) {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            self.json(name, text);
        }
    }

    fn number(&mut self, name: &str, number: impl Into<u64>) {
        self.json(name, &number.into());
    }

    /// An address with its port, as people write it: in it nothing is to be escaped.
    fn address(&mut self, name: &str, at: &Address, port: u16, other: &Address) {
        if let Some(ip) = shown_ip(at, port, other) {
            self.name(name);
            self.0.push(b'"');
            match ip {
                // Without the machinery of formatting: that takes a quarter of the whole.
                IpAddr::V4(ip) => {
                    for (octet, mark) in ip.octets().into_iter().zip(*b"...:") {
                        let _ = serde_json::to_writer(&mut *self.0, &octet);
                        self.0.push(mark);
                    }
                    if port == 0 {
                        self.0.pop();
                    } else {
                        let _ = serde_json::to_writer(&mut *self.0, &port);
                    }
                }
                IpAddr::V6(ip) if port == 0 => drop(write!(self.0, "{ip}")),
                IpAddr::V6(ip) => drop(write!(self.0, "[{ip}]:{port}")),
            }
            self.0.push(b'"');
        }
    }

    fn end(self) {
        self.0.extend_from_slice(b"}\n");
    }
}

fn connection_json(out: &mut Vec<u8>, what: What, view: &View, clock: Clock) {
    let report = &view.report;
    let began = matches!(what, What::Connect | What::Accept);
    let time = if began && report.started != 0 { report.started } else { report.at };
    let mut object = Object::begin(out, clock.wall(time), event(what));
    object.word("protocol", &protocol(report.protocol));
    if let Some(word) = direction_word(report) {
        object.word("direction", word);
    }
    object.address("local", &report.local, report.local_port, &report.remote);
    object.address("remote", &report.remote, report.remote_port, &report.local);
    object.text("remote_name", view.remote_name.as_deref());
    process_json(&mut object, view);
    if report.netns != 0 {
        object.number("netns", report.netns);
    }
    if !began {
        object.number("rx_bytes", report.rx_bytes);
        object.number("tx_bytes", report.tx_bytes);
        if report.rtt_us != 0 {
            object.number("rtt_us", report.rtt_us);
        }
        if report.protocol == 6 {
            object.number("retransmits", report.retransmits);
        }
        if let Some(duration) = duration(report) {
            object.number("duration_ms", duration.as_millis() as u64);
        }
    }
    object.word("attribution", attribution(report));
    if what == What::Close && report.flags & flag::UNSEEN != 0 {
        object.json("unseen", &true);
    }
    object.end();
}

/// Whose it is, as far as that is known.
fn process_json(object: &mut Object<'_>, view: &View) {
    let owner = &view.report.owner;
    let known = owner.quality > quality::NONE;
    let program = view.program.as_deref();
    if known {
        object.number("pid", owner.tgid);
        object.json("comm", &*comm(&view.report));
    }
    object.text("exe", program.map(|program| program.exe.as_str()));
    if known {
        object.number("uid", owner.uid);
    }
    let path = program.map(|program| program.cgroup_path.as_str());
    object.text("cgroup", path);
    if let Some(path) = path.filter(|path| !path.is_empty()) {
        let place = place::of(path);
        object.text("container", place.container.as_deref());
        object.text("unit", place.unit.as_deref());
    }
}

/// A packet that passes, as a line of JSON.
#[derive(Debug, Serialize)]
struct PacketJson {
    time: String,
    event: &'static str,
    protocol: Cow<'static, str>,
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
pub fn packet(out: &mut Vec<u8>, note: &PacketNote, as_json: bool, clock: Clock) -> io::Result<()> {
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
pub fn text(out: &mut Vec<u8>, line: &Line, clock: Clock) -> io::Result<()> {
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
pub fn protocol(number: u16) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        1 => "icmp",
        6 => "tcp",
        17 => "udp",
        33 => "dccp",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        255 => "raw",
        262 => "mptcp",
        PACKET => "packet",
        number => return Cow::Owned(format!("ip-{number}")),
    })
}

/// The process' name, threads of the kernel in brackets as ps(1) has them.
pub fn comm(report: &Connection) -> Cow<'_, str> {
    let comm = &report.owner.comm;
    let end = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    let name = String::from_utf8_lossy(&comm[..end]);
    if report.flags & flag::KERNEL != 0 { Cow::Owned(format!("[{name}]")) } else { name }
}

/// How long the connection has lasted; `None` where it began before the watch.
pub fn duration(report: &Connection) -> Option<Duration> {
    (report.started != 0).then(|| Duration::from_nanos(report.at.saturating_sub(report.started)))
}

/// An address as people write it; `None` where nothing is known. "Any" is written
/// in the family of the other side.
pub fn address(address: &Address, port: u16, other: &Address) -> Option<String> {
    let ip = shown_ip(address, port, other)?;
    Some(if port == 0 { ip.to_string() } else { SocketAddr::new(ip, port).to_string() })
}

fn shown_ip(address: &Address, port: u16, other: &Address) -> Option<IpAddr> {
    if *address == [0; 16] && port == 0 {
        return None;
    }
    let any_of_v4 = *address == [0; 16] && matches!(ip(other), IpAddr::V4(_));
    Some(if any_of_v4 { IpAddr::from([0, 0, 0, 0]) } else { ip(address) })
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
        json(&mut out, line, Clock { zero: SystemTime::UNIX_EPOCH });
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
    fn addresses_are_written_as_people_do() {
        for (ip, port) in [
            ("192.0.2.255", 0),
            ("10.0.0.1", 65535),
            ("0.0.0.0", 7),
            ("2001:db8::1", 0),
            ("::1", 53),
            ("::", 80),
        ] {
            let ip: IpAddr = ip.parse().unwrap();
            let octets = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let mut out = vec![];
            Object(&mut out).address("a", &octets, port, &[0; 16]);
            let text = if port == 0 { ip.to_string() } else { SocketAddr::new(ip, port).to_string() };
            assert_eq!(String::from_utf8(out).unwrap(), format!(",\"a\":\"{text}\""));
            assert_eq!(address(&octets, port, &[0; 16]), Some(text));
        }
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
