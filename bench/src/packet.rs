//! What reading a packet costs: the library beside C and network-types, by
//! `BPF_PROG_TEST_RUN`.

use std::{fmt, process::Command};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{Program, TestRun as _, TestRunOptions},
};
use underpass::{dnsguard::forgery::query, object};

use crate::report::{Args, Measure, Report, Table, rounds, say};

/// A program among others, by what it stands for.
pub struct Subject {
    pub label: &'static str,
    pub object: Ebpf,
    pub program: &'static str,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.label)
    }
}

impl Subject {
    /// Loads a program from an object.
    pub fn load(label: &'static str, object: &[u8], program: &'static str) -> Result<Self> {
        let mut object = Ebpf::load(object).with_context(|| format!("cannot load {label}"))?;
        load(&mut object, program)?;
        Ok(Self { label, object, program })
    }

    /// The mean time of a run, in nanoseconds, and the verdict.
    pub fn time(&self, packet: &[u8], repeat: u32) -> Result<(f64, u32)> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.repeat = repeat;
        let program = self.object.program(self.program).context("the program is gone")?;
        let result = if let Program::Xdp(program) = program {
            program.test_run(options)?
        } else if let Program::SchedClassifier(program) = program {
            program.test_run(options)?
        } else {
            anyhow::bail!("{} is neither XDP nor TC", self.program)
        };
        // The kernel's own figure: around it, it waits for grace periods.
        Ok((result.duration.as_nanos() as f64, result.return_value))
    }
}

/// The packets that programs are run on, by what they are.
pub type Packets = [(&'static str, Vec<u8>)];

/// What each subject takes for each packet, in rounds.
pub fn time(title: &str, base: &str, subjects: &[Subject], packets: &Packets, args: &Args) -> Result<Table> {
    let (n, repeat) = if args.quick { (3, 200_000) } else { (9, 2_000_000) };
    let note = format!(
        "Mean nanoseconds a packet of {repeat} runs, as the kernel tells it, without fractions; the median of {n} rounds."
    );
    let measures = packets.iter().map(|(name, _)| Measure::lower(*name)).collect();
    let mut table = Table::new(title, note, measures).base(base);
    rounds(n, subjects, |subject| {
        for (name, packet) in packets {
            table.add(subject.label, name, subject.time(packet, repeat)?.0);
        }
        Ok(())
    })?;
    Ok(table)
}

/// Loads one program of an open object.
pub fn load(object: &mut Ebpf, name: &str) -> Result<()> {
    let program = object.program_mut(name).with_context(|| format!("the object has no {name}"))?;
    if let Program::Xdp(program) = program {
        program.load()?;
    } else if let Program::SchedClassifier(program) = program {
        program.load()?;
    }
    Ok(())
}

pub fn run(args: &Args) -> Result<()> {
    let c = c_object("packet.c", include_str!("packet.c"))?;
    let xdp = [
        Subject::load("bare XDP_PASS", object::PACKET, "packet_bare_pass_xdp")?,
        Subject::load("underpass", object::PACKET, "packet_pass_xdp")?,
        Subject::load("C by hand", &c, "c_pass_xdp")?,
        Subject::load("network-types", object::PACKET_PEER, "peer_pass_xdp")?,
    ];
    let tc = [
        Subject::load("bare TC_ACT_OK", object::PACKET, "packet_bare_tc")?,
        Subject::load("underpass", object::PACKET, "packet_pass_tc")?,
        Subject::load("C by hand", &c, "c_pass_tc")?,
    ];
    let packets = packets();
    let tables = vec![
        time("XDP: parse to the UDP payload and pass, ns", "C by hand", &xdp, &packets, args)?,
        time("TC: parse to the UDP payload and pass, ns", "C by hand", &tc, &packets, args)?,
    ];
    let findings = findings(&tables[0], &packets);
    let report = Report {
        name: "packet",
        title: "The packet library",
        introduction: "One program, written three times: find the UDP payload through Ethernet, VLAN tags, \
                       IPv4 with options or IPv6 with extension headers, add its first byte to a map, and \
                       pass. The C program does the same checks; the one on network-types knows no tags, no \
                       extension headers and no fragments, as its examples do not, so it passes those packets \
                       without looking further."
            .to_owned(),
        tables,
        findings,
    };
    report.publish(args)
}

fn findings(xdp: &Table, packets: &Packets) -> Vec<String> {
    let mut findings = vec![];
    for (name, _) in packets {
        let (Some(ours), Some(c)) = (xdp.median("underpass", name), xdp.median("C by hand", name)) else {
            continue;
        };
        findings.push(format!(
            "{name}: {:+.1} ns, {:+.0} % of the C program",
            ours - c,
            (ours / c - 1.0) * 100.0
        ));
    }
    findings
}

fn packets() -> Vec<(&'static str, Vec<u8>)> {
    let v4 = query(([192, 0, 2, 1].into(), 4000), [192, 0, 2, 2].into(), ("www.example.org", 1), 1, false);
    let six = |last: u16| std::net::IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
    let v6 = query((six(1), 4000), six(2), ("www.example.org", 28), 1, false);
    let mut arp = vec![0; 60];
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut tcp = v4.clone();
    tcp[23] = 6;
    let tagged = [&v4[..12], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5], &v4[12..]].concat();
    let mut options = v4.clone();
    options.splice(34..34, [1; 12]);
    options[14] = 0x48;
    let total = (options.len() - 14) as u16;
    options[16..18].copy_from_slice(&total.to_be_bytes());
    let mut extended = v6.clone();
    extended[20] = 60;
    let headers: Vec<u8> =
        (0..6).flat_map(|nth| [if nth == 5 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]).collect();
    extended.splice(54..54, headers);
    let length = (extended.len() - 54) as u16;
    extended[18..20].copy_from_slice(&length.to_be_bytes());
    vec![
        ("not IP", arp),
        ("TCP", tcp),
        ("UDP", v4),
        ("UDP, IPv4 options", options),
        ("UDP in two tags", tagged),
        ("UDP over IPv6", v6),
        ("6 extension headers", extended),
    ]
}

/// Programs in C, built now.
pub fn c_object(name: &str, text: &str) -> Result<Vec<u8>> {
    say(format_args!("building {name}"));
    let folder = tempfile::tempdir()?;
    let (source, target) = (folder.path().join(name), folder.path().join("object.o"));
    std::fs::write(&source, text)?;
    let status = Command::new("clang")
        .args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-c"])
        .arg(&source)
        .arg("-o")
        .arg(&target)
        .status()
        .context("cannot start clang; run ./dev setup bench")?;
    ensure!(status.success(), "{name} does not build");
    Ok(std::fs::read(&target)?)
}
