//! dnsguard between real resolvers and an injector that answers first.
//!
//! client - wire - resolver: the wire is a thread that carries every frame from one side
//! to the other. Told to, it answers a query with forgeries before it carries it on, so
//! that they always come first.

mod guard;
mod truth;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use underpass::{
    dnsguard::forgery::{Injector, answer, set_checksums},
    lab::Namespace,
};
use underpass_logic::packet::udp::Datagram;

const UNDERPASS: &str = env!("CARGO_BIN_EXE_underpass");
/// The resolver has Google's addresses: their rules are the strictest.
const GOOGLE: [&str; 2] = ["8.8.8.8", "2001:4860:4860::8888"];
const TRUTH: [&str; 2] = ["203.0.113.80", "2001:db8:80::80"];
const FORGED: [&str; 2] = ["203.0.113.66", "2001:db8:66::66"];
/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// The two hosts and the wire between them.
struct Lab {
    client: Namespace,
    resolver: Namespace,
    wire: Wire,
    guarded: bool,
}

impl Lab {
    /// Both hosts with addresses; servers are started by the test.
    fn new() -> Self {
        let [client, middle, resolver] = [(); 3].map(|()| Namespace::new().unwrap());
        client.join("eth0", &middle, "left").unwrap();
        middle.join("right", &resolver, "eth0").unwrap();
        for (host, v4, v6) in [(&client, "8.8.8.1", "2001:4860:4860::1"), (&resolver, GOOGLE[0], GOOGLE[1])] {
            host.address("eth0", address(v4), 24).unwrap();
            host.address("eth0", address(v6), 64).unwrap();
        }
        let wire = Wire::start(&middle);
        Self { client, resolver, wire, guarded: false }
    }

    /// Runs a command on the client and gives what it printed.
    fn run(&self, command: &mut Command) -> String {
        text(&self.output(command))
    }

    fn output(&self, command: &mut Command) -> Output {
        self.client
            .spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
            .unwrap()
            .wait_with_output()
            .unwrap()
    }

    fn guard(&mut self, args: &[&str]) -> String {
        self.guarded = true;
        let output = self.output(Command::new(UNDERPASS).args(["dnsguard", "attach", "eth0"]).args(args));
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    fn unguard(&mut self) {
        self.guarded = false;
        let output = self.output(Command::new(UNDERPASS).args(["dnsguard", "detach", "eth0"]));
        assert!(output.status.success(), "{}", text(&output));
    }

    /// What `show` says of this client's interface.
    fn show(&self) -> Value {
        let shown = self.run(Command::new(UNDERPASS).args(["dnsguard", "show", "--json"]));
        let shown: Value = serde_json::from_str(&shown).unwrap();
        // Other tests attach at the same time, in other namespaces: their interface is
        // of another number or named after where it is.
        let here = pin_of(&self.client);
        let status: Vec<_> = shown["attached"].as_array().unwrap().clone();
        status.into_iter().find(|one| one["id"] == here).unwrap_or(Value::Null)
    }

    fn dig(&self, server: &str, args: &[&str]) -> String {
        let server = format!("@{server}");
        let mut dig = Command::new("dig");
        dig.args([&server, "+short", "+tries=2", "+time=3"]).args(args);
        self.run(&mut dig).trim().to_owned()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.guarded {
            let _ = self.output(Command::new(UNDERPASS).args(["dnsguard", "detach", "eth0"]));
        }
    }
}

/// The key of a namespace's `eth0` among the pins.
fn pin_of(namespace: &Namespace) -> String {
    let index = namespace.index("eth0").unwrap();
    namespace.enter(|| underpass::pins::interface_key(index)).unwrap()
}

/// A thread that carries frames both ways.
struct Wire {
    forgeries: Arc<Mutex<Vec<Injector>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    fn start(middle: &Namespace) -> Self {
        let (left, right) = (middle.frames("left").unwrap(), middle.frames("right").unwrap());
        let forgeries = Arc::new(Mutex::new(vec![]));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&forgeries), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut frame = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let mut ready = [&left, &right].map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
                poll(&mut ready, PollTimeout::from(100_u16)).unwrap();
                let readable = ready.map(|one| one.any().unwrap_or(false));
                // An interface that goes down says so once.
                if readable[0]
                    && let Ok(length) = (&left).read(&mut frame)
                {
                    for injector in shared.lock().unwrap().iter() {
                        for forged in FORGED {
                            if let Some(forged) = answer(&frame[..length], injector, address(forged), false) {
                                let _ = (&left).write_all(&forged);
                            }
                        }
                    }
                    carry(&mut frame[..length], &right);
                }
                if readable[1]
                    && let Ok(length) = (&right).read(&mut frame)
                {
                    carry(&mut frame[..length], &left);
                }
            }
        });
        Self { forgeries, stop, thread: Some(thread) }
    }

    /// From now on every query is answered by these first.
    fn inject(&self, injectors: &[Injector]) {
        *self.forgeries.lock().unwrap() = injectors.to_vec();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Sends a frame on. What a host hands to a veth may lack its checksum, which only that
/// veth's other end forgives.
fn carry(frame: &mut [u8], to: &socket2::Socket) {
    if let Ok(datagram) = Datagram::parse(&*frame) {
        set_checksums(frame, &datagram.ip).unwrap();
    }
    // A host that is not there any more takes nothing.
    let _ = (&*to).write_all(frame);
}

/// A server that ends with its owner.
struct Server(Child);

impl Server {
    fn start(host: &Namespace, command: &mut Command) -> Self {
        // SAFETY: prctl is safe to call between fork and exec.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(command, || {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn_in(host))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

trait SpawnIn {
    fn spawn_in(&mut self, host: &Namespace) -> Child;
}

impl SpawnIn for Command {
    fn spawn_in(&mut self, host: &Namespace) -> Child {
        host.spawn(self)
            .unwrap_or_else(|error| panic!("{}: {error}; run ./dev setup test", self.get_program().display()))
    }
}

/// knot as the authority for example.org on port 5300 of the loopback interface, and
/// unbound as the resolver at Google's addresses.
fn unbound(host: &Namespace, folder: &Path) -> Vec<Server> {
    let mut servers = vec![knot(host, folder, &["127.0.0.1@5300"])];
    let config = folder.join("unbound.conf");
    fs::write(
        &config,
        format!(
            "server:\n  chroot: \"\"\n  username: \"\"\n  directory: \"{folder}\"\n  pidfile: \"\"\n  \
             use-syslog: no\n  interface: {}\n  interface: {}\n  access-control: 0.0.0.0/0 allow\n  \
             access-control: ::/0 allow\n  do-not-query-localhost: no\n  module-config: iterator\n  \
             local-zone: \"example.org.\" nodefault\n  num-threads: 1\nremote-control:\n  \
             control-enable: no\nstub-zone:\n  name: \"example.org\"\n  stub-addr: 127.0.0.1@5300\n",
            GOOGLE[0],
            GOOGLE[1],
            folder = folder.display()
        ),
    )
    .unwrap();
    servers.push(Server::start(host, Command::new("unbound").arg("-d").arg("-c").arg(&config)));
    servers
}

fn knot(host: &Namespace, folder: &Path, listen: &[&str]) -> Server {
    let long = "x".repeat(200);
    let mut zone = String::from(
        "$ORIGIN example.org.\n$TTL 300\n@ SOA ns hostmaster 1 3600 600 86400 300\n@ NS ns\nns A 127.0.0.1\n",
    );
    for line in [
        format!("www A {}", TRUTH[0]),
        format!("www AAAA {}", TRUTH[1]),
        "*.w A 192.0.2.1".to_owned(),
        "*.w AAAA 2001:db8::1".to_owned(),
        "*.w TXT \"some text\"".to_owned(),
        "*.only TXT \"no address here\"".to_owned(),
        "*.chain CNAME hop.example.org.".to_owned(),
        "hop CNAME end.example.org.".to_owned(),
        "end A 192.0.2.2".to_owned(),
        "end AAAA 2001:db8::2".to_owned(),
        format!("*.large TXT {}", vec![format!("\"{long}\""); 6].join(" ")),
        format!(
            "*.many A {}",
            (1..20).map(|n| format!("192.0.2.{n}")).collect::<Vec<_>>().join("\n*.many A ")
        ),
    ] {
        zone.push_str(&line);
        zone.push('\n');
    }
    fs::write(folder.join("example.org.zone"), zone).unwrap();
    let config = folder.join("knot.conf");
    let listen = listen.iter().map(|at| format!("{at:?}")).collect::<Vec<_>>().join(", ");
    fs::write(
        &config,
        format!(
            "server:\n  listen: [{listen}]\n  rundir: \"{folder}\"\n  udp-workers: 1\n  tcp-workers: 1\n  \
             background-workers: 1\ndatabase:\n  storage: \"{folder}\"\nzone:\n  - domain: example.org\n    \
             storage: \"{folder}\"\n    file: example.org.zone\n    dnssec-signing: on\n    zonefile-load: difference\n    \
             zonefile-sync: -1\n    journal-content: all\n",
            folder = folder.display()
        ),
    )
    .unwrap();
    Server::start(host, Command::new("knotd").arg("-c").arg(&config))
}

/// Waits until a server answers, which nothing tells.
fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come up");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Serves a line over HTTP at an address of the client, which so has both sites.
fn site(client: &Namespace, at: &str, line: &'static str) {
    client.address("lo", address(at), if at.contains(':') { 128 } else { 32 }).unwrap();
    let listener = client.enter(|| TcpListener::bind(SocketAddr::new(address(at), 80))).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { break };
            let _ = stream.read(&mut [0; 1024]);
            let length = line.len();
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{line}");
        }
    });
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
