//! What a relay spends, and how it ends: itself and the connections on it.

use std::{
    env, fs,
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;

use super::{Path, World, line_of, on_every_path, on_every_path_waiting, ready, to};
use crate::kit::{
    Daemon, Family, Hosts, Stream, accept, connect, eventually, exchange, expect_end, expect_reset,
    many_descriptors, underpass,
};

on_every_path!(thousands_idle);
on_every_path_waiting!(stop_with_grace, idle_timeout, connect_timeout, killed, out_of_descriptors);

/// Connections that do nothing cost the relay little memory of its own.
fn thousands_idle(path: Path, family: Family) {
    let many = if family == Family::V4 && matches!(path, Path::Kernel | Path::Splice) { 5000 } else { 1000 };
    let _descriptors = many_descriptors();
    let world = World::new(path, family);
    let open = || {
        let (client, mut server) = world.connect();
        (&client).write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        (client, server)
    };
    // What is needed once, for whatever connections there are.
    drop((0..64).map(|_| open()).collect::<Vec<_>>());
    let before = world.relay.memory();
    let all: Vec<_> = (0..many).map(|_| open()).collect();
    let each = world.relay.memory().saturating_sub(before) / many;
    let most = match path {
        Path::Kernel | Path::Splice => 4 << 10,
        // Not promised, but nothing speaks for more.
        Path::Copy | Path::Auto => 4 << 10,
    };
    assert!(each <= most, "an idle connection takes {each} bytes");
    // All of them work.
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    for (client, server) in &all {
        exchange(client, server, &mut there, &mut back, 100);
    }
    let address = all[0].0.local_addr().unwrap();
    drop(all);
    world.closed(address, 101, 100);
}

/// A relay that is told to stop accepts nothing, lets connections finish, and ends
/// those that do not.
fn stop_with_grace(path: Path, family: Family) {
    let mut world = World::with(path, family, &["--grace", "2s"]);
    let [(a, of_a), (b, of_b)] = [world.connect(), world.connect()];
    let [a_address, b_address] = [&a, &b].map(|stream| stream.local_addr().unwrap());
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    exchange(&a, &of_a, &mut there, &mut back, 100);
    world.relay.signal(if family == Family::V4 { Signal::SIGTERM } else { Signal::SIGINT });
    world.relay.line(" stopping ");
    assert!(connect(&world.hosts.client, world.listen).is_err(), "a stopping relay accepts nobody");
    exchange(&a, &of_a, &mut there, &mut back, 100_000);
    drop(a);
    expect_end(&of_a);
    drop(of_a);
    world.closed(a_address, 100_100, 100_100);
    // The other one does not finish.
    assert!(world.relay.wait().success());
    assert_eq!(line_of(&world.relay, b_address)["end"], "stopped");
    expect_end(&b);
    expect_end(&of_b);
}

/// Ends what is idle, and not what moves bytes one way only.
fn idle_timeout(path: Path, family: Family) {
    let world = World::with(path, family, &["--idle-timeout", "2s"]);
    let [(idle, of_idle), (busy, of_busy)] = [world.connect(), world.connect()];
    let [idle_address, busy_address] = [&idle, &busy].map(|stream| stream.local_addr().unwrap());
    (&idle).write_all(b"x").unwrap();
    (&of_idle).read_exact(&mut [0]).unwrap();
    let (mut sent, mut seen) = (Stream::new(1), Stream::new(1));
    for _ in 0..40 {
        sent.send(&busy, 10).unwrap();
        seen.receive(&of_busy, 10);
        std::thread::sleep(Duration::from_millis(100));
    }
    let line = line_of(&world.relay, idle_address);
    assert_eq!([&line["end"], &line["sent"]], ["idle", "1"], "{line:?}");
    expect_end(&idle);
    expect_end(&of_idle);
    drop((busy, of_busy));
    world.closed(busy_address, 400, 0);
}

/// A target that never answers.
fn connect_timeout(path: Path, family: Family) {
    let hosts = Hosts::new();
    let stuck = hosts.listen_stuck(family);
    let (relay, listen) = to(&hosts, path, family, stuck.address(), &["--connect-timeout", "500ms"]);
    let client = connect(&hosts.client, listen).unwrap();
    (&client).write_all(b"x").unwrap();
    expect_reset(&client);
    let line = line_of(&relay, client.local_addr().unwrap());
    assert_eq!(line["end"], "cannot connect: timed out", "{line:?}");
    refused(&hosts, path, family);
}

/// A target where nobody listens.
fn refused(hosts: &Hosts, path: Path, family: Family) {
    let nobody = SocketAddr::new(Hosts::server_address(family), 1);
    let (relay, listen) = to(hosts, path, family, nobody, &[]);
    match connect(&hosts.client, listen) {
        Ok(client) => expect_reset(&client),
        // It came at once.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    relay.line("cannot connect: Connection refused");
}

/// A relay that is killed leaves nothing behind in the kernel.
fn killed(path: Path, family: Family) {
    let mut world = World::new(path, family);
    let (client, server) = world.connect();
    let (mut there, mut back) = (Stream::new(1), Stream::new(2));
    for _ in 0..40 {
        exchange(&client, &server, &mut there, &mut back, 64);
    }
    let [programs, maps] = ["prog_id", "map_id"].map(|name| bpf_ids(world.relay.pid(), name));
    let has_kernel_path = matches!(path, Path::Kernel | Path::Auto);
    assert_eq!(!programs.is_empty() && !maps.is_empty(), has_kernel_path, "{programs:?} {maps:?}");
    world.relay.signal(Signal::SIGKILL);
    world.relay.wait();
    for mut end in [client, server] {
        // A FIN or a reset, as the kernel likes.
        assert!(matches!(end.read(&mut [0]), Ok(0) | Err(_)));
    }
    eventually("its programs are gone", || {
        aya::programs::loaded_programs().all(|program| !programs.contains(&program.unwrap().id()))
    });
    eventually("its maps are gone", || {
        aya::maps::loaded_maps().all(|map| !maps.contains(&map.unwrap().id()))
    });
}

/// The BPF objects that a process has open: `prog_id` or `map_id` in its descriptors.
fn bpf_ids(pid: u32, name: &str) -> Vec<u32> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = descriptors.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
    let ids = texts.filter_map(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().parse().ok()
    });
    ids.collect()
}

/// With few descriptors the clients that come too late are told so at once, those that
/// are there are served on, and when they leave others are served again.
fn out_of_descriptors(path: Path, family: Family) {
    let hosts = Hosts::new();
    let target = hosts.listen(family);
    let listen = SocketAddr::new(Hosts::relay_address(family), 0).to_string();
    let mut command = Command::new("setpriv");
    // Without CAP_SYS_RESOURCE the relay cannot raise the hard limit again.
    command.args(["--bounding-set=-sys_resource", "prlimit", "--nofile=340:340"]);
    command.arg(underpass().get_program()).args([
        "relay",
        "--path",
        path.word(),
        "--listen",
        &listen,
        "--to",
    ]);
    command.arg(target.local_addr().unwrap().to_string()).arg("--log-connections");
    let relay = Daemon::start(&hosts.relay, &mut command);
    let listen = ready(&relay);
    for _ in 0..2 {
        let mut served = vec![];
        let refused = (0..150).filter(|_| {
            let Ok(client) = connect(&hosts.client, listen) else { return true };
            // It may be reset before this.
            let _ = (&client).write(b"x");
            target.set_nonblocking(true).unwrap();
            let mut server = None;
            eventually("a client is served or refused", || {
                server = target.accept().ok().map(|(server, _)| server);
                server.is_some() || matches!((&client).peek_now(), Some(Ok(0) | Err(_)))
            });
            let was_refused = server.is_none();
            served.extend(server.map(|server| (client, server)));
            was_refused
        });
        let refused = refused.count();
        assert!(refused > 50 && served.len() > 20, "{refused} refused");
        let line = relay.line("a client is refused: ");
        assert!(line.contains("descriptors") || line.contains("Too many open files"), "{line}");
        let (mut there, mut back) = (Stream::new(1), Stream::new(2));
        let addresses: Vec<_> = served.iter().map(|(client, _)| client.local_addr().unwrap()).collect();
        for (client, server) in &served {
            server.set_nonblocking(false).unwrap();
            (&*server).read_exact(&mut [0]).unwrap();
            exchange(client, server, &mut there, &mut back, 1000);
        }
        drop(served);
        for address in addresses {
            assert_eq!(line_of(&relay, address)["end"], "closed");
        }
    }
}

/// Looks at what has come without waiting for it.
trait PeekNow {
    fn peek_now(self) -> Option<io::Result<usize>>;
}

impl PeekNow for &TcpStream {
    fn peek_now(self) -> Option<io::Result<usize>> {
        self.set_nonblocking(true).unwrap();
        let seen = self.peek(&mut [0]);
        self.set_nonblocking(false).unwrap();
        if matches!(&seen, Err(error) if error.kind() == ErrorKind::WouldBlock) { None } else { Some(seen) }
    }
}

/// A copy of the binary that every user may run, wherever the source lies.
struct Public(PathBuf);

impl Public {
    fn binary() -> Self {
        let mut random = fastrand::Rng::new();
        let path = env::temp_dir().join(format!("underpass-{:016x}", random.u64(..)));
        fs::copy(underpass().get_program(), &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    /// The command as the user nobody, without any capability.
    fn as_nobody(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--"]);
        command.arg(&self.0);
        command
    }
}

impl Drop for Public {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn without_privileges_auto_goes_on_without_the_kernel_path() {
    let (hosts, binary) = (Hosts::new(), Public::binary());
    let target = hosts.listen(Family::V4);
    for path in ["auto", "splice", "copy"] {
        let mut command = binary.as_nobody();
        command.args(["relay", "--listen", ":0", "--log-connections", "--path", path, "--to"]);
        let relay = Daemon::start(&hosts.relay, command.arg(target.local_addr().unwrap().to_string()));
        let line = relay.line(" ready ");
        if path == "auto" {
            assert!(line.contains("kernel=\"not used: ") && line.contains("CAP_"), "{line}");
        }
        let listen = SocketAddr::new(Hosts::relay_address(Family::V4), ready(&relay).port());
        let client = connect(&hosts.client, listen).unwrap();
        let server = accept(&target);
        let (mut there, mut back) = (Stream::new(1), Stream::new(2));
        for _ in 0..40 {
            exchange(&client, &server, &mut there, &mut back, 64);
        }
        exchange(&client, &server, &mut there, &mut back, 4 << 20);
        drop((client, server));
        relay.line("end=\"closed\"");
    }
}

#[test]
fn without_privileges_the_kernel_path_is_refused() {
    let (hosts, binary) = (Hosts::new(), Public::binary());
    let mut command = binary.as_nobody();
    command.args(["relay", "--listen", ":0", "--path", "kernel", "--to", "127.0.0.1:1"]);
    let mut relay = Daemon::start(&hosts.relay, &mut command);
    assert_eq!(relay.wait().code(), Some(3));
    let line = relay.line("underpass: --path kernel cannot be used here: ");
    assert!(line.contains("CAP_BPF") && line.contains("CAP_NET_ADMIN"), "{line}");
}

#[test]
fn without_privileges_low_ports_are_refused() {
    let (hosts, binary) = (Hosts::new(), Public::binary());
    let mut command = binary.as_nobody();
    let mut relay =
        Daemon::start(&hosts.relay, command.args(["relay", "--listen", ":80", "--to", "127.0.0.1:1"]));
    assert_eq!(relay.wait().code(), Some(3));
    relay.line("cannot listen on :80: ports below 1024 need CAP_NET_BIND_SERVICE");
}

/// A full disk below the log must not end what is logged.
#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let hosts = Hosts::new();
    let target = hosts.listen(Family::V4);
    let mut command = underpass();
    command.args(["relay", "--listen", "10.0.1.2:4000", "--log-connections"]);
    command.args(["--to", &target.local_addr().unwrap().to_string()]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut relay = hosts.relay.spawn(command.stderr(full)).unwrap();
    let to = "10.0.1.2:4000".parse().unwrap();
    let mut client = None;
    eventually("it listens", || {
        client = connect(&hosts.client, to).ok();
        client.is_some()
    });
    for _ in 0..3 {
        let client = client.take().unwrap_or_else(|| connect(&hosts.client, to).unwrap());
        let server = accept(&target);
        exchange(&client, &server, &mut Stream::new(1), &mut Stream::new(2), 1000);
    }
    assert!(matches!(relay.try_wait(), Ok(None)), "it has ended");
    relay.kill().unwrap();
    relay.wait().unwrap();
}
