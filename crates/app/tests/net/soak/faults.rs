//! What is done to all that runs, one thing after the other.

use std::{
    fmt,
    fs::File,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use nix::sys::resource::{Resource, setrlimit};
use underpass::lab::Namespace;

use super::{
    Tally,
    load::{Ask, DISK, Place, RELAYS, whole},
};
use crate::kit::{Daemon, connect, eventually, underpass};

type Fault = fn(&mut Place, &Tally);

const FAULTS: [(&str, Fault); 9] = [
    ("link down and up", link_down),
    ("relay killed", |place, tally| restart(place, tally, Place::restart_relay)),
    ("interface removed", interface_removed),
    ("disk full", disk_full),
    ("link down and up", link_down),
    ("descriptors exhausted", descriptors_exhausted),
    ("mux killed", |place, tally| restart(place, tally, Place::restart_mux)),
    ("watch killed", |place, tally| restart(place, tally, Place::restart_watch)),
    ("all attached anew", |place, _| place.attach_again()),
];

/// How often each was.
#[derive(Default)]
pub struct Faults(usize);

impl Faults {
    pub fn next(&mut self, place: &mut Place, tally: &Tally) {
        let (_, fault) = FAULTS[self.0 % FAULTS.len()];
        self.0 += 1;
        fault(place, tally);
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts: Vec<(&str, usize)> = vec![];
        for nth in 0..self.0 {
            let (name, _) = FAULTS[nth % FAULTS.len()];
            match counts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        let counts: Vec<_> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        f.write_str(&counts.join(", "))
    }
}

fn link_down(place: &mut Place, tally: &Tally) {
    let _over = tally.fault();
    ip(&place.shared.hosts.relay, &["link", "set", "eth1", "down"]);
    thread::sleep(Duration::from_millis(300));
    ip(&place.shared.hosts.relay, &["link", "set", "eth1", "up"]);
    // Addresses of IPv6 go with the link; routes come back after a moment.
    thread::sleep(Duration::from_millis(200));
}

fn restart(place: &mut Place, tally: &Tally, f: fn(&mut Place)) {
    let _over = tally.fault();
    f(place);
}

/// An interface that is guarded and multiplexed goes away; then there is another of its
/// name. What was attached to the first is detached all the same.
fn interface_removed(place: &mut Place, _: &Tally) {
    let hosts = &place.shared.hosts;
    for _ in 0..2 {
        hosts.server.join("gone0", &hosts.relay, "gone1").unwrap();
        succeed(&hosts.server, &["dnsguard", "attach", "gone0", "--resolver", "any"]);
        succeed(&hosts.server, &["mux", "attach", "gone0", "--port", "6000", "--route", "@0:x=6001"]);
        ip(&hosts.server, &["link", "del", "gone0"]);
        succeed(&hosts.server, &["dnsguard", "detach", "gone0"]);
        succeed(&hosts.server, &["mux", "detach", "gone0"]);
    }
}

/// Where nothing can be written: each says so, or goes on without.
fn disk_full(place: &mut Place, _: &Tally) {
    let hosts = &place.shared.hosts;
    let filler = format!("{DISK}/filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    let object = format!("{DISK}/guard.o");
    let output = run(&hosts.client, underpass().args(["dnsguard", "export", &object]));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    // A log that cannot be written must not stop who writes it.
    let log = File::options().append(true).create(true).open(format!("{DISK}/log")).unwrap();
    let mut relay = underpass();
    relay.args(["relay", "--listen", "10.0.1.2:4009", "--log-connections", "--to", &place.shared.service]);
    let mut relay = hosts.relay.spawn(relay.stdin(Stdio::null()).stderr(log)).unwrap();
    let to = "10.0.1.2:4009".parse().unwrap();
    eventually("a relay without a log listens", || connect(&hosts.client, to).is_ok());
    for seed in 0..5 {
        whole(hosts, to, Ask::Answer, seed, 100_000).expect("a relay without a log");
    }
    relay.kill().unwrap();
    relay.wait().unwrap();
    drop(file);
    std::fs::remove_file(filler).unwrap();
    let _ = std::fs::remove_file(object);
    std::fs::remove_file(format!("{DISK}/log")).unwrap();
}

/// More clients than descriptors: some wait or are refused, and afterwards all is as before.
fn descriptors_exhausted(place: &mut Place, _: &Tally) {
    use std::os::unix::process::CommandExt as _;
    let hosts = &place.shared.hosts;
    let mut relay = underpass();
    relay.args(["relay", "--listen", "10.0.1.2:4008", "--to", &place.shared.service]);
    // SAFETY: one system call between fork and exec.
    unsafe { relay.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 128, 128)?)) };
    let relay = Daemon::start(&hosts.relay, &mut relay);
    relay.line(" ready ");
    let to = "10.0.1.2:4008".parse().unwrap();
    let crowd: Vec<TcpStream> = (0..200).filter_map(|_| connect(&hosts.client, to).ok()).collect();
    thread::sleep(Duration::from_millis(200));
    drop(crowd);
    eventually("a relay that had no descriptors left serves again", || {
        whole(hosts, to, Ask::Answer, 3, 100_000).is_ok()
    });
    // Rubbish in the middle of it all, and who leaves at once.
    for relay in RELAYS {
        let Ok(mut stream) = connect(&hosts.client, relay.parse().unwrap()) else { continue };
        let _ = stream.write_all(&[0xff; 3000]);
        let _ = stream.read(&mut [0]);
    }
}

pub fn succeed(host: &Namespace, arguments: &[&str]) -> String {
    let output = run(host, underpass().args(arguments));
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

fn run(host: &Namespace, command: &mut Command) -> Output {
    host.enter(|| command.output()).unwrap()
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

fn ip(host: &Namespace, arguments: &[&str]) {
    let output = run(host, Command::new("ip").args(arguments));
    assert!(output.status.success(), "ip {arguments:?}: {}", text(&output));
}
