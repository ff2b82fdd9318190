//! dnsguard beside bare programs by `BPF_PROG_TEST_RUN`, and beside nft and iptables
//! with the same predicate on a veth.

use std::{
    fmt,
    net::IpAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::PerCpuArray,
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode},
};
use underpass::{
    dnsguard::{
        Guarded, Rules,
        forgery::{HONEST, INJECTORS, answer, query},
        open,
    },
    lab::Namespace,
    object,
};
use underpass_abi::dnsguard::{Class, Counters};

use crate::{
    packet::{self, Subject, load},
    report::{Args, Measure, Report, Table, rounds, say},
};

const PPS: &str = "dropped a second, million";

pub fn run(args: &Args) -> Result<()> {
    let mut tables = times(args)?;
    tables.push(drops(args)?);
    let findings = findings(&tables);
    let report = Report {
        name: "dnsguard",
        title: "dnsguard",
        introduction:
            "What a packet costs in the guard, beside programs that do nothing but return a verdict; \
                       and how many forged answers a second are dropped on a veth, beside nft and iptables \
                       with one of the guard's rules: from 8.8.8.8, UDP source port 53, QR, one answer, IPv4 \
                       identification 0."
                .to_owned(),
        tables,
        findings,
    };
    report.publish(args)
}

/// The guard by the rules that are its default.
fn guard(label: &'static str, program: &'static str) -> Result<Subject> {
    let rules = Rules::new(&[], None).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut object = open(&rules).map_err(|error| anyhow::anyhow!("{error}"))?;
    load(&mut object, program)?;
    Ok(Subject { label, object, program })
}

fn times(args: &Args) -> Result<Vec<Table>> {
    let packets = packets();
    let xdp = [
        Subject::load("bare XDP_PASS", object::PACKET, "packet_bare_pass_xdp")?,
        Subject::load("bare XDP_DROP", object::PACKET, "packet_bare_drop_xdp")?,
        guard("underpass, XDP", "dnsguard_xdp")?,
    ];
    let tc = [
        Subject::load("bare TC_ACT_OK", object::PACKET, "packet_bare_tc")?,
        guard("underpass, TC", "dnsguard_tc")?,
    ];
    Ok(vec![
        packet::time("XDP, ns a packet", "bare XDP_PASS", &xdp, &packets, args)?,
        packet::time("TC, ns a packet", "bare TC_ACT_OK", &tc, &packets, args)?,
    ])
}

fn findings(tables: &[Table]) -> Vec<String> {
    let mut findings = vec![];
    for measure in &tables[0].measures {
        let name = &measure.name;
        let (Some(ours), Some(bare)) =
            (tables[0].median("underpass, XDP", name), tables[0].median("bare XDP_PASS", name))
        else {
            continue;
        };
        findings.push(format!("XDP, {name}: {:.1} ns over bare", ours - bare));
    }
    if let Some(nft) = tables.last().and_then(|table| table.median("nft, netdev ingress", PPS))
        && nft > 0.0
    {
        for row in
            ["bare XDP_DROP, native", "underpass, native XDP", "underpass, generic XDP", "underpass, TC"]
        {
            if let Some(ours) = tables.last().and_then(|table| table.median(row, PPS)) {
                findings.push(format!("{row}: {:.1} times what nft drops at netdev ingress", ours / nft));
            }
        }
    }
    findings
}

fn ask(resolver: [u8; 4], edns: bool) -> Vec<u8> {
    query(([192, 0, 2, 10].into(), 40000), resolver.into(), ("www.example.org", 1), 7, edns)
}

fn packets() -> Vec<(&'static str, Vec<u8>)> {
    let truth: IpAddr = [203, 0, 113, 80].into();
    let google = ask([8, 8, 8, 8], false);
    let make = |asked: &[u8], how, edns| answer(asked, how, truth, edns).expect("a query for an address");
    let mut tcp = google.clone();
    tcp[23] = 6;
    let mut packets = vec![
        ("TCP", tcp),
        ("UDP, not DNS", google.clone()),
        ("other server", make(&ask([192, 0, 2, 53], false), &HONEST, false)),
        ("clean", make(&google, &HONEST, false)),
        ("clean, EDNS", make(&ask([8, 8, 8, 8], true), &HONEST, true)),
    ];
    for injector in &INJECTORS {
        packets.push((injector.name, make(&google, injector, false)));
    }
    packets
}

/// Who drops on the veth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dropper {
    Nobody,
    /// A program that drops whatever comes: nothing here is faster.
    Bare,
    Xdp(XdpMode),
    Tc,
    NftIngress,
    NftPrerouting,
    Iptables,
}

impl fmt::Display for Dropper {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "nobody",
            Self::Bare => "bare XDP_DROP, native",
            Self::Xdp(XdpMode::Driver) => "underpass, native XDP",
            Self::Xdp(_) => "underpass, generic XDP",
            Self::Tc => "underpass, TC",
            Self::NftIngress => "nft, netdev ingress",
            Self::NftPrerouting => "nft, prerouting",
            Self::Iptables => "iptables -m u32",
        })
    }
}

fn drops(args: &Args) -> Result<Table> {
    let droppers = [
        Dropper::Nobody,
        Dropper::Bare,
        Dropper::Xdp(XdpMode::Driver),
        Dropper::Xdp(XdpMode::Skb),
        Dropper::Tc,
        Dropper::NftIngress,
        Dropper::NftPrerouting,
        Dropper::Iptables,
    ];
    let note = "One CPU sends forged answers into a veth as fast as XDP_REDIRECT does; the other end drops them, or the \
                stack takes them where nobody does. Sending and dropping share the CPUs.";
    let mut table = Table::new("Forged answers dropped on a veth", note, vec![Measure::higher(PPS)])
        .base("nft, netdev ingress");
    let time = Duration::from_millis(if args.quick { 300 } else { 1000 });
    rounds(if args.quick { 1 } else { 3 }, &droppers, |dropper| {
        match stream(*dropper, time) {
            Ok(pps) => table.add(&dropper.to_string(), PPS, pps / 1e6),
            Err(error) => say(format_args!("{dropper} does not work here: {error:#}")),
        }
        Ok(())
    })?;
    Ok(table)
}

/// Packets a second that are dropped, or for nobody taken by the stack.
fn stream(dropper: Dropper, time: Duration) -> Result<f64> {
    let (sender, receiver) = (Namespace::new()?, Namespace::new()?);
    sender.join("out0", &receiver, "in0")?;
    receiver.address("in0", [192, 0, 2, 10], 24)?;
    // A veth without XDP takes redirected frames only with this on.
    let mut ethtool = Command::new("ethtool");
    let status = receiver.spawn(ethtool.args(["-K", "in0", "gro", "on"]))?.wait()?;
    ensure!(status.success(), "ethtool cannot turn GRO on");
    let mut guard = Guard::attach(&receiver, dropper)?;

    let target = sender.index("out0")?;
    let mut generator = EbpfLoader::new().override_global("TARGET", &target, true).load(object::PACKET)?;
    let program: &mut Xdp =
        generator.program_mut("packet_send_xdp").context("no packet_send_xdp")?.try_into()?;
    program.load()?;
    let mac = mac(&receiver, "in0")?;
    let mut forged = answer(&ask([8, 8, 8, 8], false), &INJECTORS[2], [203, 0, 113, 66].into(), false)
        .context("a query for an address")?;
    forged[..6].copy_from_slice(&mac);

    let before = guard.count(&receiver)?;
    let start = Instant::now();
    sender.enter(|| -> Result<()> {
        while start.elapsed() < time {
            let mut options = TestRunOptions::new();
            options.data_in = Some(&forged);
            // Around each run the kernel waits for grace periods.
            options.repeat = 400_000;
            options.attrs = TestRunAttrs::new().xdp_live_frames(64);
            program.test_run(options)?;
        }
        Ok(())
    })?;
    let elapsed = start.elapsed();
    let dropped = guard.count(&receiver)? - before;
    Ok(dropped / elapsed.as_secs_f64())
}

/// Whatever drops, for as long as it is wanted.
struct Guard {
    dropper: Dropper,
    object: Option<Ebpf>,
}

impl Guard {
    fn attach(receiver: &Namespace, dropper: Dropper) -> Result<Self> {
        let mut guard = Self { dropper, object: None };
        // The predicate of one of the guard's rules, as nft and u32 can say it.
        let nft = |hook: &str| {
            format!(
                "table {hook} iif in0 ip saddr 8.8.8.8 ip id 0 udp sport 53 @th,80,1 1 @th,112,16 1 counter drop\n}}\n}}\n"
            )
        };
        match dropper {
            Dropper::Nobody => {}
            Dropper::Bare => {
                guard.object = Some(attach_xdp(
                    receiver,
                    Ebpf::load(object::PACKET)?,
                    "packet_bare_drop_xdp",
                    XdpMode::Driver,
                )?);
            }
            Dropper::Xdp(mode) => {
                guard.object = Some(attach_xdp(receiver, default_guard()?, "dnsguard_xdp", mode)?);
            }
            Dropper::Tc => {
                let mut object = default_guard()?;
                let program: &mut aya::programs::SchedClassifier =
                    object.program_mut("dnsguard_tc").context("no dnsguard_tc")?.try_into()?;
                program.load()?;
                receiver.enter(|| program.attach("in0", aya::programs::TcAttachType::Ingress))?;
                guard.object = Some(object);
            }
            Dropper::NftIngress => {
                let rules =
                    nft("netdev guard { chain ingress { type filter hook ingress device \"in0\" priority 0;");
                command(receiver, "nft", &[&rules.replace("iif in0 ", "")])?;
            }
            Dropper::NftPrerouting => {
                let rules = nft("ip guard { chain pre { type filter hook prerouting priority raw;");
                command(receiver, "nft", &[&rules])?;
            }
            Dropper::Iptables => {
                // Behind the IP header: source port 53; QR; one answer. And identification 0.
                let u32 = "2&0xFFFF=0x1A4:0xFFFF && 0>>22&0x3C@0>>16=53 && 0>>22&0x3C@8>>15&1=1 && 0>>22&0x3C@14>>16=1";
                let u32 = u32.replace("2&0xFFFF=0x1A4:0xFFFF", "4>>16=0");
                let args = [
                    "-t",
                    "raw",
                    "-A",
                    "PREROUTING",
                    "-s",
                    "8.8.8.8",
                    "-p",
                    "udp",
                    "-m",
                    "u32",
                    "--u32",
                    &u32,
                    "-j",
                    "DROP",
                ];
                command(receiver, "iptables", &args)?;
            }
        }
        Ok(guard)
    }

    /// How many it has dropped so far.
    fn count(&mut self, receiver: &Namespace) -> Result<f64> {
        match self.dropper {
            Dropper::Nobody => {
                let text = receiver.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
                let line =
                    text.lines().filter(|line| line.starts_with("Ip:")).nth(1).context("no Ip line")?;
                Ok(line.split_whitespace().nth(3).context("no InReceives")?.parse()?)
            }
            Dropper::Bare => {
                let text = command(receiver, "ethtool", &["-S", "in0"])?;
                let drops = text.lines().filter_map(|line| line.trim().split_once("xdp_drops: "));
                drops.map(|(_, count)| Ok(count.parse::<f64>()?)).sum()
            }
            Dropper::Xdp(_) | Dropper::Tc => {
                let object = self.object.as_ref().context("nothing is attached")?;
                let map: PerCpuArray<_, Counters> =
                    object.map("COUNTERS").context("no COUNTERS")?.try_into()?;
                let values = map.get(&0, 0)?;
                Ok(values.iter().map(|cpu| cpu.classes[Class::Dropped as usize]).sum::<u64>() as f64)
            }
            Dropper::NftIngress | Dropper::NftPrerouting => {
                let text = command(receiver, "nft", &["list ruleset"])?;
                let count = text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
                Ok(count.context("nft shows no counter")?.parse()?)
            }
            Dropper::Iptables => {
                let text =
                    command(receiver, "iptables", &["-t", "raw", "-L", "PREROUTING", "-v", "-x", "-n"])?;
                let line = text.lines().find(|line| line.contains("DROP ")).context("no rule")?;
                Ok(line.split_whitespace().next().context("no count")?.parse()?)
            }
        }
    }
}

fn attach_xdp(receiver: &Namespace, mut object: Ebpf, name: &str, mode: XdpMode) -> Result<Ebpf> {
    let program: &mut Xdp = object.program_mut(name).context("no such program")?.try_into()?;
    program.load()?;
    receiver.enter(|| program.attach("in0", mode))?;
    Ok(object)
}

fn default_guard() -> Result<Ebpf> {
    let rules = Rules::new(&[Guarded::Address([8, 8, 8, 8].into())], None)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    open(&rules).map_err(|error| anyhow::anyhow!("{error}"))
}

pub(crate) fn command(host: &Namespace, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let output = host
        .spawn(&mut command)
        .with_context(|| format!("cannot start {program}; run ./dev setup bench"))?
        .wait_with_output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The hardware address of an interface.
pub(crate) fn mac(host: &Namespace, name: &str) -> Result<[u8; 6]> {
    let text = command(host, "ip", &["-br", "link", "show", name])?;
    let mac = text.split_whitespace().nth(2).context("ip shows no address")?;
    let bytes: Vec<u8> = mac.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{mac} is no hardware address"))
}
