//! Nothing is missed in silence: every end is told, or counted as lost.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    sync::{Mutex, PoisonError},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use underpass::lab::Namespace;

use super::{
    watch::{Watch, select},
    watch_kinds::python,
};

/// What the connections of a test have on both sides: nobody else's pass the filter,
/// so that every lost end is one of theirs.
const NETWORK: &str = "127.99.0.0/16";

/// The watch sees the whole host: one test at a time has such connections.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Opens, uses and ends so many connections by each of four threads. 5 bytes go one way.
fn connect(namespace: &Namespace, each: usize) {
    std::thread::scope(|scope| {
        for thread in 1..=4 {
            scope.spawn(move || {
                let ours = SocketAddr::from((Ipv4Addr::new(127, 99, 0, thread), 0));
                let theirs = SocketAddr::from((Ipv4Addr::new(127, 99, 1, thread), 7000));
                let listener = namespace.enter(|| std::net::TcpListener::bind(theirs)).unwrap();
                namespace.enter(|| {
                    for _ in 0..each {
                        let mut client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                        client.bind(&ours.into()).unwrap();
                        client.connect(&theirs.into()).unwrap();
                        client.write_all(b"ping!").unwrap();
                        let mut served = listener.accept().unwrap().0;
                        served.read_exact(&mut [0; 5]).unwrap();
                        // The server closes first: its ports are few, the client's are many.
                        drop(served);
                        client.read_to_end(&mut vec![]).unwrap();
                    }
                });
            });
        }
    });
}

/// Checks that each of `count` ends was told with the right figures or counted as lost,
/// and returns how many were lost.
fn account(lines: &[Value], namespace: &Namespace, count: u64, notes: &str) -> u64 {
    let lost = |what: &str| lines.iter().filter_map(|line| line["lost"][what].as_u64()).max().unwrap_or(0);
    let ends = select(lines, namespace, "close");
    // Seen alive, and its end lost: told so, with the totals that were last read.
    let (unseen, seen): (Vec<_>, Vec<_>) = ends.into_iter().partition(|line| line["unseen"] == true);
    let told = seen.len() as u64;
    println!(
        "{told} ends seen, {} lost, {} unseen, {} state changes missed",
        lost("events"),
        unseen.len(),
        lost("changes")
    );
    assert!(told + lost("events") <= count, "an end is in both counts: {notes}");
    assert!(
        told + lost("events") + lost("changes") >= count,
        "{} ends are in no count: {notes}",
        count - told - lost("events")
    );
    assert!(unseen.len() as u64 <= lost("events") + lost("changes"), "{notes}");
    for line in seen {
        assert_eq!(line["pid"], std::process::id());
        let sent = if line["direction"] == "outbound" { 5 } else { 0 };
        assert_eq!(
            (line["tx_bytes"].as_u64(), line["rx_bytes"].as_u64()),
            (Some(sent), Some(5 - sent)),
            "{line}"
        );
    }
    lost("events")
}

#[test]
fn fifty_thousand_short_connections_are_all_counted() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&["--remote", NETWORK]);
    connect(&namespace, 12_500);
    let (lines, notes) = watch.end();
    account(&lines, &namespace, 100_000, &notes);
}

#[test]
fn what_a_stopped_reader_misses_is_counted() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&["--remote", NETWORK]);
    watch.signal(Signal::SIGSTOP);
    // The ring has 2 MiB a CPU, from 4 to 32: for two CPUs room for less than 30,000 ends.
    let cpus = std::thread::available_parallelism().unwrap().get().clamp(2, 16).next_power_of_two();
    connect(&namespace, 2500 * cpus);
    watch.signal(Signal::SIGCONT);
    let (lines, notes) = watch.end();
    let lost = account(&lines, &namespace, 20_000 * cpus as u64, &notes);
    assert!(lost > 5000 * cpus as u64, "the ring holds no more than it can: {notes}");
}

#[test]
fn an_ordinary_user_with_two_capabilities_watches() {
    let namespace = Namespace::new().unwrap();
    // The user may not look into the folder of the build.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.path().join("underpass");
    fs::copy(env!("CARGO_BIN_EXE_underpass"), &binary).unwrap();
    let mut setpriv = Command::new("setpriv");
    let capabilities =
        ["--inh-caps", "--ambient-caps", "--bounding-set"].map(|set| [set, "-all,+bpf,+perfmon"]);
    setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]);
    setpriv.args(capabilities.as_flattened()).arg(&binary).args(["watch", "--json"]);
    let watch = Watch::start_by(None, setpriv);
    let program = r"
import socket
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()
c = socket.create_connection(l.getsockname()); s = l.accept()[0]
c.sendall(b'x' * 1000); s.recv(1000, socket.MSG_WAITALL); s.sendall(b'y' * 10); c.recv(10)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))
v = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); v.connect(u.getsockname())
v.send(b'z' * 300)
";
    let (pid, _) = python(&namespace, program, &[]);
    let (lines, notes) = watch.end();
    // UDP without the hooks that take CAP_NET_ADMIN: flows end when they are idle.
    let last = |protocol: &str, event: &str| {
        let mut mine = select(&lines, &namespace, event).into_iter();
        mine.rfind(|line| {
            line["pid"] == pid && line["protocol"] == protocol && line["direction"] == "outbound"
        })
    };
    let tcp = last("tcp", "close").unwrap_or_else(|| panic!("{lines:#?} {notes}"));
    assert_eq!((&tcp["tx_bytes"], &tcp["rx_bytes"]), (&1000.into(), &10.into()), "{tcp}");
    assert_eq!((&tcp["comm"], &tcp["attribution"]), (&"python3".into(), &"kernel".into()));
    assert!(tcp["exe"].as_str().unwrap().contains("python3"), "{tcp}");
    let udp = last("udp", "traffic").unwrap_or_else(|| panic!("{lines:#?} {notes}"));
    assert_eq!(udp["tx_bytes"], 300, "{udp}");
    assert!(notes.contains("missing: cgroup hooks"), "{notes}");
}
