//! The multiplexer: what a datagram costs in the kernel and how many pass a veth, beside
//! socat and nginx; connections by their first bytes, beside haproxy and sslh; messages
//! by their tags, beside a plain loop that does the same.

use std::{
    fmt, fs,
    io::{IoSlice, IoSliceMut, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError, SchedClassifier, TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use nix::sys::{
    resource::{UsageWho, getrusage},
    socket::{MsgFlags, MultiHeaders, recvmmsg},
};
use underpass::{
    lab::Namespace,
    mux::{
        attach::put_table,
        datagram::{Default, Plan},
    },
    object,
};

use crate::{
    dnsguard::{command, mac},
    load::{Clients, Server, many_ports},
    peers::workplace,
    process::Process,
    report::{Args, Measure, Report, Table, median, rounds, say},
};

const PACKETS: &str = "arrived a second, thousand";
const SHORT_1: &str = "connections/s, one at a time";
const SHORT_32: &str = "connections/s, 32 at a time";
const KEEP: &str = "requests/s on one connection";
const MESSAGES: &str = "messages a CPU second, million";
const BARE: &str = "bare program";
const MESSAGE: usize = 290;
const TAGS: [&str; 3] = ["600", "601", "602"];
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

pub fn run(args: &Args) -> Result<()> {
    let tables = vec![times(args)?, moves(args)?, datagrams(args)?, connections(args)?, messages(args)?];
    let findings = findings(&tables);
    let report = Report {
        name: "mux",
        title: "mux",
        introduction:
            "Datagrams of 290 bytes with a tag at byte 20; TCP connections whose first byte decides; \
                       messages of 290 bytes with a tag at byte 20 over one connection."
                .to_owned(),
        tables,
        findings,
    };
    report.publish(args)
}

/// A program with a table, for `BPF_PROG_TEST_RUN`.
struct Timed {
    label: &'static str,
    object: Ebpf,
    program: &'static str,
    hook: &'static str,
    packet: Vec<u8>,
}

impl fmt::Display for Timed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.label, self.hook)
    }
}

impl Timed {
    /// The program on a datagram that the last route takes, to `port`.
    fn routes(
        label: &'static str,
        hook: &'static str,
        count: usize,
        shapes: usize,
        port: u16,
    ) -> Result<Self> {
        let target = |i| if i + 1 == count { port.into() } else { 10_000 + i };
        let routes: Vec<_> =
            (0..count).map(|i| format!("@{}:{i:04}={}", 20 + i % shapes * 4, target(i))).collect();
        let plan = Plan::new(5000, &routes, Default::Drop, None).map_err(|e| anyhow::anyhow!("{e}"))?;
        let mut object = EbpfLoader::new().load(object::MUX)?;
        put_table(&mut object, &plan, None).map_err(|e| anyhow::anyhow!("{e}"))?;
        let last = count - 1;
        let at = 20 + last % shapes * 4;
        let mut payload = vec![b'.'; MESSAGE];
        payload[at..at + 4].copy_from_slice(format!("{last:04}").as_bytes());
        let packet = frame(5000, &payload);
        Self { label, object, program: if hook == "XDP" { "mux_xdp" } else { "mux_in" }, hook, packet }.load()
    }

    /// The program on what is not for the port.
    fn other_port(hook: &'static str) -> Result<Self> {
        let mut it = Self::routes("mux, another port", hook, 16, 1, 5000)?;
        it.packet = frame(5001, &[b'.'; MESSAGE]);
        Ok(it)
    }

    /// On a datagram that looks like a tag's beginning wherever one can be.
    fn hostile(hook: &'static str) -> Result<Self> {
        let mut it = Self::routes("1,024 routes in 32 places, all nearly hit", hook, 1024, 32, 5000)?;
        let mut payload: Vec<u8> =
            (0..MESSAGE).map(|at: usize| if at.is_multiple_of(4) { b'0' } else { b'.' }).collect();
        payload[20 + 31 * 4..20 + 32 * 4].copy_from_slice(b"1023");
        it.packet = frame(5000, &payload);
        Ok(it)
    }

    /// A program that returns its verdict and nothing else.
    fn bare(hook: &'static str) -> Result<Self> {
        let object = EbpfLoader::new().load(object::PACKET)?;
        let program = if hook == "XDP" { "packet_bare_pass_xdp" } else { "packet_bare_tc" };
        Self { label: BARE, object, program, hook, packet: frame(5000, &[b'.'; MESSAGE]) }.load()
    }

    fn load(mut self) -> Result<Self> {
        if self.hook == "XDP" {
            self.program::<Xdp>()?.load()?;
        } else {
            self.program::<SchedClassifier>()?.load()?;
        }
        Ok(self)
    }

    fn program<'a, P>(&'a mut self) -> Result<&'a mut P>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        Ok(self.object.program_mut(self.program).context("no such program")?.try_into()?)
    }

    /// Nanoseconds a run.
    fn time(&mut self, repeat: u32) -> Result<f64> {
        let packet = self.packet.clone();
        let mut options = TestRunOptions::new();
        options.data_in = Some(&packet);
        options.repeat = repeat;
        let result = if self.hook == "XDP" {
            self.program::<Xdp>()?.test_run(options)?
        } else {
            self.program::<SchedClassifier>()?.test_run(options)?
        };
        Ok(result.duration.as_nanos() as f64)
    }

    /// Nanoseconds a run, of runs on a fresh packet each.
    fn time_once(&mut self, runs: usize) -> Result<f64> {
        let times: Vec<f64> = (0..runs).map(|_| self.time(1)).collect::<Result<_>>()?;
        median(&times).context("no runs")
    }
}

/// A frame to 10.1.0.2 that the stack takes; without a UDP checksum, as IPv4 allows.
fn frame(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
    frame.extend((20 + length).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(CLIENT.octets().iter().chain(&HOST.octets()));
    let (words, _) = frame[14..].as_chunks();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.extend([0x9c, 0x40]);
    frame.extend(port.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

const PLACES: [(&str, usize, usize); 6] = [
    ("1 route", 1, 1),
    ("16 routes", 16, 1),
    ("256 routes", 256, 1),
    ("1,024 routes", 1024, 1),
    ("1,024 routes in 8 places", 1024, 8),
    ("1,024 routes in 32 places", 1024, 32),
];

fn times(args: &Args) -> Result<Table> {
    let note = "Nanoseconds a packet by BPF_PROG_TEST_RUN, which runs the program again on what it left. So that \
                each run meets the shared port, the last route here leads back to it: the packet is parsed, \
                its length checked, its tag found and counted; flow and rewrite are in the next table.";
    let mut table =
        Table::new("UDP, ns a packet", note, vec![Measure::lower("XDP"), Measure::lower("TC")]).base(BARE);
    let mut subjects = vec![];
    for hook in ["XDP", "TC"] {
        subjects.extend([Timed::bare(hook)?, Timed::other_port(hook)?]);
        for (label, count, shapes) in PLACES {
            subjects.push(Timed::routes(label, hook, count, shapes, 5000)?);
        }
        subjects.push(Timed::hostile(hook)?);
    }
    let (n, repeat) = if args.quick { (3, 200_000) } else { (9, 500_000) };
    time_all(&mut table, &mut subjects, n, "UDP", |subject| subject.time(repeat))?;
    Ok(table)
}

fn moves(args: &Args) -> Result<Table> {
    let note = "The whole way: parsed, found, counted, its flow looked up, port and checksum rewritten. Medians of \
                single runs, each on a fresh packet; reading the clock is in all of them, the bare program's, too.";
    let mut table =
        Table::new("UDP, ns a packet that moves", note, vec![Measure::lower("XDP"), Measure::lower("TC")])
            .base(BARE);
    let mut subjects = vec![];
    for hook in ["XDP", "TC"] {
        subjects.push(Timed::bare(hook)?);
        for (label, count, shapes) in PLACES {
            subjects.push(Timed::routes(label, hook, count, shapes, 5001)?);
        }
    }
    let (n, runs) = if args.quick { (3, 2_000) } else { (9, 10_000) };
    time_all(&mut table, &mut subjects, n, "UDP that moves", |subject| subject.time_once(runs))?;
    Ok(table)
}

fn time_all(
    table: &mut Table,
    subjects: &mut [Timed],
    n: usize,
    what: &str,
    time: impl Fn(&mut Timed) -> Result<f64>,
) -> Result<()> {
    for round in 1..=n {
        say(format_args!("{what}, round {round} of {n}"));
        for subject in &mut *subjects {
            table.add(subject.label, subject.hook, time(subject)?);
        }
    }
    Ok(())
}

fn start(host: &Namespace, command: &mut Command) -> Result<Process> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Process::start(host, command).with_context(|| format!("cannot start {command:?}; run ./dev setup bench"))
}

fn underpass() -> Result<Command> {
    let this = std::env::current_exe().context("cannot find this program")?;
    Ok(Command::new(this.with_file_name("underpass")))
}

fn pair() -> Result<(Namespace, Namespace)> {
    let (client, host) = (Namespace::new()?, Namespace::new()?);
    client.join("eth0", &host, "eth0")?;
    client.address("eth0", CLIENT, 24)?;
    host.address("eth0", HOST, 24)?;
    for namespace in [&client, &host] {
        many_ports(namespace)?;
    }
    Ok((client, host))
}

/// Who is between the client and the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Between {
    Nobody,
    Underpass(&'static str),
    Haproxy,
    Sslh,
    Socat,
    Nginx,
}

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("nobody"),
            Self::Underpass(how) => write!(f, "underpass {how}"),
            Self::Haproxy => f.write_str("haproxy"),
            Self::Sslh => f.write_str("sslh-select"),
            Self::Socat => f.write_str("socat"),
            Self::Nginx => f.write_str("nginx stream"),
        }
    }
}

fn datagrams(args: &Args) -> Result<Table> {
    let note = "Frames put on a veth as fast as XDP_REDIRECT does, more than anybody can take; what the service's \
                socket receives is counted. Sender, forwarder and service share the CPUs.";
    let mut table = Table::new("UDP over a veth", note, vec![Measure::higher(PACKETS)]).base("nobody");
    let between = [
        Between::Nobody,
        Between::Underpass("tc"),
        Between::Underpass("xdp"),
        Between::Socat,
        Between::Nginx,
    ];
    let time = Duration::from_millis(if args.quick { 400 } else { 1000 });
    rounds(if args.quick { 2 } else { 5 }, &between, |between| {
        table.add(&between.to_string(), PACKETS, stream(*between, time)? / 1e3);
        Ok(())
    })?;
    Ok(table)
}

/// Datagrams a second that arrive.
fn stream(between: Between, time: Duration) -> Result<f64> {
    let (client, host) = pair()?;
    // A veth without XDP takes redirected frames only with this on.
    command(&host, "ethtool", &["-K", "eth0", "gro", "on"])?;
    let service = host.enter(|| UdpSocket::bind((HOST, 5001)))?;
    service.set_read_timeout(Some(Duration::from_millis(100)))?;
    let config = workplace()?.join("mux-stream.conf");
    let running = match between {
        Between::Underpass(hook) => {
            let mut attach = underpass()?;
            attach.args([
                "mux",
                "attach",
                "eth0",
                "--port",
                "5000",
                "--route",
                "@20:600=5001",
                "--hook",
                hook,
            ]);
            ensure!(host.spawn(attach.stdout(Stdio::null()))?.wait()?.success(), "mux attach failed");
            None
        }
        Between::Socat => {
            let mut socat = Command::new("socat");
            socat.args(["-u", "UDP4-RECV:5000", &format!("UDP4-SENDTO:{HOST}:5001")]);
            Some(start(&host, &mut socat)?)
        }
        Between::Nginx => {
            let text = format!(
                "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\npid \
                 {}.pid;\nevents {{}}\nstream {{ server {{ listen {HOST}:5000 udp; proxy_pass {HOST}:5001; \
                 proxy_responses 0; }} }}\n",
                config.display()
            );
            fs::write(&config, text)?;
            Some(start(&host, Command::new("nginx").args(["-e", "stderr", "-c"]).arg(&config))?)
        }
        Between::Nobody | Between::Haproxy | Between::Sslh => None,
    };
    thread::sleep(Duration::from_millis(300));
    let mut sent = frame(if between == Between::Nobody { 5001 } else { 5000 }, &tagged("600"));
    sent[..6].copy_from_slice(&mac(&host, "eth0")?);
    let stop = AtomicBool::new(false);
    let rate = thread::scope(|scope| {
        let sender = scope.spawn(|| send_frames(&client, &sent, &stop));
        let rate = received(&service, time);
        stop.store(true, Relaxed);
        sender.join().map_err(|_| anyhow::anyhow!("the sender broke"))??;
        rate
    })?;
    drop(running);
    if let Between::Underpass(_) = between {
        let mut detach = underpass()?;
        host.spawn(detach.args(["mux", "detach", "eth0"]).stdout(Stdio::null()))?.wait()?;
    }
    let _ = fs::remove_file(config);
    Ok(rate)
}

/// Puts frames on the link as fast as XDP_REDIRECT does.
fn send_frames(client: &Namespace, frame: &[u8], stop: &AtomicBool) -> Result<()> {
    let target = client.index("eth0")?;
    let mut generator = EbpfLoader::new().override_global("TARGET", &target, true).load(object::PACKET)?;
    let program: &mut Xdp =
        generator.program_mut("packet_send_xdp").context("no packet_send_xdp")?.try_into()?;
    program.load()?;
    client.enter(|| {
        while !stop.load(Relaxed) {
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.repeat = 5_000;
            options.attrs = TestRunAttrs::new().xdp_live_frames(64);
            program.test_run(options)?;
        }
        Ok(())
    })
}

/// Datagrams a second that a socket receives.
fn received(service: &UdpSocket, time: Duration) -> Result<f64> {
    let mut headers = MultiHeaders::<()>::preallocate(64, None);
    let mut buffers = [[0; 512]; 64];
    let (mut count, begun) = (0, Instant::now());
    while begun.elapsed() < time {
        let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
        let flags = MsgFlags::MSG_WAITFORONE;
        match recvmmsg(service.as_raw_fd(), &mut headers, slices.iter_mut(), flags, None) {
            Ok(messages) => count += messages.count(),
            Err(nix::errno::Errno::EAGAIN) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

fn tagged(tag: &str) -> Vec<u8> {
    let mut message = vec![b'.'; MESSAGE];
    message[20..20 + tag.len()].copy_from_slice(tag.as_bytes());
    message
}

fn connections(args: &Args) -> Result<Table> {
    let note = "Connections of a 64-byte request and answer, and 64-byte requests over one connection. All ask for \
                the first byte: haproxy by `req.payload`, sslh by a regular expression, underpass by `@0:`. \
                A round in which a peer lost an answer does not count; a cell without a figure had no other.";
    let measures = vec![Measure::higher(SHORT_1), Measure::higher(SHORT_32), Measure::higher(KEEP)];
    let mut table = Table::new("TCP by connection", note, measures).base("haproxy");
    let between = [Between::Nobody, Between::Underpass("auto"), Between::Haproxy, Between::Sslh];
    let time = Duration::from_millis(if args.quick { 400 } else { 1200 });
    let mut port = 7000;
    rounds(if args.quick { 2 } else { 5 }, &between, |between| {
        port += 1;
        let (client, host) = pair()?;
        let target = SocketAddr::from((HOST, 9000));
        let _server = Server::start(&host, target, None)?;
        let listen = SocketAddr::from((HOST, port));
        let running = forwarder(&host, *between, listen, target)?;
        let to = if running.is_some() { listen } else { target };
        let clients = Clients { namespace: &client, to, cpu: None };
        // Its listener is open before it has proven the kernel path.
        clients.wait()?;
        let row = between.to_string();
        table.row(&row);
        for measure in [SHORT_1, SHORT_32, KEEP] {
            let rate = match measure {
                SHORT_1 => clients.short(1, time),
                SHORT_32 => clients.short(32, time),
                _ => clients.ping_pong(64, time).map(|times| times.len() as f64 / time.as_secs_f64()),
            };
            match rate {
                Ok(rate) => table.add(&row, measure, rate),
                // sslh 1.20 now and then cuts off the answer of a server that closes at once.
                Err(error) if *between == Between::Sslh => {
                    say(format_args!("{row} failed at {measure}: {error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })?;
    Ok(table)
}

fn forwarder(
    host: &Namespace,
    between: Between,
    listen: SocketAddr,
    to: SocketAddr,
) -> Result<Option<Process>> {
    let config = workplace()?.join(format!("mux-{}.conf", listen.port()));
    let mut command = match between {
        Between::Underpass(path) => {
            let mut command = underpass()?;
            command.args(["mux", "listen", &listen.to_string(), "--path", path]);
            command.args(["--route", &format!("@0:o={to}"), "--route", &format!("@0:e={to}")]);
            command
        }
        Between::Haproxy => {
            let text = format!(
                "global\n    maxconn 6000\ndefaults\n    mode tcp\n    option splice-auto\n    timeout connect 5s\n    \
                 timeout client 1h\n    timeout server 1h\nfrontend mux\n    bind {listen}\n    \
                 tcp-request inspect-delay 3s\n    tcp-request content accept if {{ req.len gt 0 }}\n    \
                 use_backend target if {{ req.payload(0,1) -m str o e }}\nbackend target\n    server target {to}\n"
            );
            fs::write(&config, text)?;
            let mut command = Command::new("haproxy");
            command.args(["-db", "-q", "-f"]).arg(&config);
            command
        }
        Between::Sslh => {
            let text = format!(
                "foreground: true;\nlisten: ( {{ host: \"{}\"; port: \"{}\"; }} );\nprotocols: ( {{ name: \"regex\"; \
                 host: \"{}\"; port: \"{}\"; regex_patterns: [ \"^[oe]\" ]; }} );\n",
                listen.ip(),
                listen.port(),
                to.ip(),
                to.port()
            );
            fs::write(&config, text)?;
            let mut command = Command::new("sslh-select");
            // It knows no space behind this option.
            command.arg(format!("-F{}", config.display()));
            command
        }
        Between::Nobody | Between::Socat | Between::Nginx => return Ok(None),
    };
    start(host, &mut command).map(Some)
}

fn messages(args: &Args) -> Result<Table> {
    let note = "One client sends messages of 290 bytes for three backends that read and forget, all on loopback. \
                Messages for each second of CPU time that the one in between takes, so that what the client and the \
                backends take does not count. The plain loop reads 256 KiB, sorts and writes vectors, in one \
                thread, without routes, lengths or replies.";
    let mut table = Table::new("TCP by message", note, vec![Measure::higher(MESSAGES)]).base("plain loop");
    let total = if args.quick { 1_000_000 } else { 4_000_000 };
    for round in 1..=if args.quick { 2 } else { 5 } {
        say(format_args!("messages, round {round}"));
        table.add("plain loop", MESSAGES, plain_loop(total)?);
        table.add("underpass", MESSAGES, by_message(total)?);
    }
    Ok(table)
}

/// Three backends that count messages.
fn sinks(host: &Namespace) -> Result<(Vec<SocketAddr>, Arc<AtomicU64>)> {
    let got = Arc::new(AtomicU64::new(0));
    let mut addresses = vec![];
    for _ in TAGS {
        let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        addresses.push(listener.local_addr()?);
        let got = Arc::clone(&got);
        thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let mut buffer = vec![0; 256 << 10];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                got.fetch_add(read as u64, Relaxed);
            }
        });
    }
    Ok((addresses, got))
}

/// Sends that many messages, tags in turn.
fn send(mut to: &TcpStream, total: usize) -> Result<()> {
    let batch: Vec<u8> = (0..1200).flat_map(|i| tagged(TAGS[i % 3])).collect();
    for _ in 0..total / 1200 {
        to.write_all(&batch)?;
    }
    Ok(())
}

fn wait_for(got: &AtomicU64, bytes: u64) -> Result<()> {
    let until = Instant::now() + Duration::from_mins(1);
    while got.load(Relaxed) < bytes {
        ensure!(Instant::now() < until, "only {} of {bytes} bytes came", got.load(Relaxed));
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn by_message(total: usize) -> Result<f64> {
    let host = Namespace::new()?;
    let (backends, got) = sinks(&host)?;
    let mut command = underpass()?;
    command.args(["mux", "listen", "127.0.0.1:7000", "--per", "message", "--frame", "fixed:290"]);
    for (tag, at) in TAGS.iter().zip(&backends) {
        command.args(["--route", &format!("@20:{tag}={at}")]);
    }
    let running = start(&host, &mut command)?;
    thread::sleep(Duration::from_millis(500));
    let client = host.enter(|| TcpStream::connect("127.0.0.1:7000"))?;
    let before = cpu_of(running.child.id())?;
    send(&client, total)?;
    let sent = total / 1200 * 1200;
    wait_for(&got, (sent * MESSAGE) as u64)?;
    Ok(sent as f64 / (cpu_of(running.child.id())? - before) / 1e6)
}

/// The CPU time that a process has taken, in seconds.
fn cpu_of(pid: u32) -> Result<f64> {
    let schedstat = |path: std::path::PathBuf| -> Result<f64> {
        let text = fs::read_to_string(path)?;
        Ok(text.split(' ').next().context("an empty schedstat")?.parse::<f64>()? / 1e9)
    };
    fs::read_dir(format!("/proc/{pid}/task"))?.map(|task| schedstat(task?.path().join("schedstat"))).sum()
}

fn plain_loop(total: usize) -> Result<f64> {
    let host = Namespace::new()?;
    let (backends, got) = sinks(&host)?;
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let to = listener.local_addr()?;
    let mut outs: Vec<TcpStream> =
        backends.iter().map(|at| host.enter(|| TcpStream::connect(at))).collect::<std::io::Result<_>>()?;
    let sorter = thread::spawn(move || -> Result<f64> {
        let (mut from, _) = listener.accept()?;
        let (mut buffer, mut filled) = (vec![0; 256 << 10], 0);
        loop {
            let read = from.read(&mut buffer[filled..])?;
            if read == 0 {
                break;
            }
            filled += read;
            let whole = filled / MESSAGE * MESSAGE;
            for (tag, out) in TAGS.iter().zip(&mut outs) {
                let messages =
                    buffer[..whole].chunks(MESSAGE).filter(|message| message[20..23] == *tag.as_bytes());
                let mut slices: Vec<_> = messages.map(IoSlice::new).collect();
                let mut slices = &mut slices[..];
                while !slices.is_empty() {
                    let most = slices.len().min(1024);
                    let written = out.write_vectored(&slices[..most])?;
                    IoSlice::advance_slices(&mut slices, written);
                }
            }
            buffer.copy_within(whole..filled, 0);
            filled -= whole;
        }
        let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
        let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
    });
    let client = host.enter(|| TcpStream::connect(to))?;
    send(&client, total)?;
    drop(client);
    let sent = total / 1200 * 1200;
    wait_for(&got, (sent * MESSAGE) as u64)?;
    let cpu = sorter.join().map_err(|_| anyhow::anyhow!("the plain loop broke"))??;
    Ok(sent as f64 / cpu / 1e6)
}

fn findings(tables: &[Table]) -> Vec<String> {
    let mut findings = vec![];
    let [times, moves, datagrams, connections, messages] = tables else { return findings };
    for (table, what) in [(times, "found"), (moves, "found and moved")] {
        for hook in ["XDP", "TC"] {
            let over = |row| Some(table.median(row, hook)? - table.median(BARE, hook)?);
            let rows = ["16 routes", "1,024 routes", "1,024 routes in 32 places"].map(over);
            if let [Some(few), Some(many), Some(places)] = rows {
                findings.push(format!(
                    "{hook}, {what}: {few:.0} ns over the bare program for 16 routes, {many:.0} for 1,024 in one \
                     place ({:.1} times), {places:.0} for 1,024 in 32 places ({:.1} times)",
                    many / few,
                    places / few
                ));
            }
        }
    }
    let mut ratio = |table: &Table, measure: &str, one: &str, other: &str| {
        if let (Some(a), Some(b)) = (table.median(one, measure), table.median(other, measure)) {
            findings.push(format!("{measure}: {one} {:.2} times {other}", a / b));
        }
    };
    for one in ["underpass tc", "underpass xdp"] {
        for other in ["nobody", "socat", "nginx stream"] {
            ratio(datagrams, PACKETS, one, other);
        }
    }
    for measure in [SHORT_1, SHORT_32, KEEP] {
        ratio(connections, measure, "underpass auto", "haproxy");
        ratio(connections, measure, "underpass auto", "sslh-select");
    }
    ratio(messages, MESSAGES, "underpass", "plain loop");
    findings
}
