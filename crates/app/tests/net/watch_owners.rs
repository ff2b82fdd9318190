//! Whose a connection is: workers, passed and inherited sockets, short lives,
//! containers, renamed and killed processes.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;
use underpass::lab::Namespace;

use super::{
    watch::{Watch, number, select},
    watch_kinds::python,
};
use crate::kit::accept;

/// A Python server in the namespace that prints its port first.
fn server(namespace: &Namespace, program: &str) -> (std::process::Child, u16) {
    use std::io::BufRead as _;
    let mut python = Command::new("python3");
    python.args(["-c", program]).stdout(Stdio::piped());
    let mut child = namespace.spawn(&mut python).unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line.trim().parse().unwrap())
}

/// Talks to a server that answers with the pid of whoever answers.
fn ask(namespace: &Namespace, port: u16) -> (String, u32) {
    let mut stream = namespace.enter(|| TcpStream::connect(("127.0.0.1", port))).unwrap();
    let local = stream.local_addr().unwrap().to_string();
    stream.write_all(b"who?").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (local, answer.trim().parse().unwrap())
}

/// The server's side of the connections that came from the given addresses.
fn accepted<'a>(lines: &'a [Value], namespace: &Namespace) -> HashMap<String, &'a Value> {
    let ends = select(lines, namespace, "close").into_iter().filter(|line| line["direction"] == "inbound");
    ends.map(|line| (line["remote"].as_str().unwrap().to_owned(), line)).collect()
}

#[test]
fn pre_fork_workers_own_what_they_accept() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let (mut parent, port) = server(
        &namespace,
        r"
import os, socket, time
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(64)
for _ in range(4):
    if os.fork() == 0:
        while True:
            c = l.accept()[0]; c.recv(4); c.sendall(str(os.getpid()).encode()); c.close(); time.sleep(0.002)
print(l.getsockname()[1], flush=True)
import signal; signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL)); os.setpgid(0, 0)
while True: time.sleep(1)
",
    );
    let truth: Vec<_> = (0..60).map(|_| ask(&namespace, port)).collect();
    let workers: HashSet<_> = truth.iter().map(|(_, pid)| *pid).collect();
    for pid in &workers {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
    }
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (lines, _) = watch.end();
    let found = accepted(&lines, &namespace);
    assert!(workers.len() > 1, "the test needs several workers at work");
    for (remote, pid) in truth {
        let line = found.get(&remote).unwrap_or_else(|| panic!("{remote} was not seen"));
        assert_eq!((&line["pid"], &line["attribution"]), (&pid.into(), &"kernel".into()), "{line}");
        assert_eq!(
            (line["rx_bytes"].as_u64(), line["tx_bytes"].as_u64()),
            (Some(4), Some(pid.to_string().len() as u64))
        );
    }
}

#[test]
fn a_passed_socket_belongs_to_who_uses_it() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let (mut parent, port) = server(
        &namespace,
        r"
import os, socket
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
if os.fork() == 0:
    ours.close()
    while True:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        if not fds: break
        c = socket.socket(fileno=fds[0]); c.recv(4); c.sendall(str(os.getpid()).encode()); c.close()
    os._exit(0)
theirs.close()
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(64)
print(l.getsockname()[1], flush=True)
while True:
    c = l.accept()[0]; socket.send_fds(ours, [b'x'], [c.fileno()]); c.close()
",
    );
    let truth: Vec<_> = (0..20).map(|_| ask(&namespace, port)).collect();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (lines, _) = watch.end();
    let found = accepted(&lines, &namespace);
    for (remote, pid) in truth {
        assert_ne!(pid, parent.id());
        assert_eq!(found[&remote]["pid"], pid, "{:#?}", found[&remote]);
    }
}

#[test]
fn an_inherited_socket_belongs_to_the_child() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let (mut parent, port) = server(
        &namespace,
        r"
import socket, subprocess
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(64)
print(l.getsockname()[1], flush=True)
while True:
    c = l.accept()[0]; subprocess.Popen(['cat'], stdin=c, stdout=c); c.close()
",
    );
    let mut stream = namespace.enter(|| TcpStream::connect(("127.0.0.1", port))).unwrap();
    let local = stream.local_addr().unwrap().to_string();
    stream.write_all(b"echo me").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = vec![];
    stream.read_to_end(&mut back).unwrap();
    assert_eq!(back, b"echo me");
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (lines, _) = watch.end();
    let line = accepted(&lines, &namespace)[&local];
    assert_eq!(line["comm"], "cat", "{line}");
    assert!(line["exe"].as_str().unwrap().ends_with("/cat"), "{line}");
}

#[test]
fn processes_of_milliseconds_are_named() {
    const PROCESSES: usize = 300;
    let namespace = Namespace::new().unwrap();
    let listener = namespace.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    let reader = std::thread::spawn(move || {
        for _ in 0..PROCESSES {
            let mut got = String::new();
            listener.accept().unwrap().0.read_to_string(&mut got).unwrap();
        }
    });
    let watch = Watch::start(&[]);
    let mut truth = HashMap::new();
    let mut children = vec![];
    for i in 0..PROCESSES {
        let mut bash = Command::new("bash");
        bash.args(["-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf %0{}d 7 >&3", i + 1)]);
        let child = namespace.spawn(&mut bash).unwrap();
        truth.insert(u64::from(child.id()), i as u64 + 1);
        children.push(child);
    }
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    reader.join().unwrap();
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let sent = ends.iter().filter(|line| line["direction"] == "outbound");
    let found: HashMap<_, _> = sent
        .map(|line| {
            assert_eq!(line["comm"], "bash", "{line}");
            assert!(line["exe"].as_str().unwrap().ends_with("/bash"), "{line}");
            (line["pid"].as_u64().unwrap(), line["tx_bytes"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(found, truth);
}

/// A cgroup of the test's own that is removed when it ends.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
        });
        let path = root.expect("a mounted cgroup2").join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Whoever was in it has ended; the kernel may need a moment to notice.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Talks from inside a cgroup of this name in a network namespace, and gives back how
/// watch told of it.
fn from_a_cgroup(name: &str) -> Value {
    let namespace = Namespace::new().unwrap();
    let cgroup = Cgroup::new(name);
    let watch = Watch::start(&[]);
    let listener = namespace.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Of shells this one starts the program: busybox has an nc of its own.
    let mut shell = Command::new("bash");
    shell.args([
        "-c",
        &format!("echo $$ > '{}/cgroup.procs'; echo hello | nc -N 127.0.0.1 {port}", cgroup.0.display()),
    ]);
    let mut shell = namespace.spawn(&mut shell).unwrap();
    let mut got = String::new();
    accept(&listener).read_to_string(&mut got).unwrap();
    assert_eq!(got, "hello\n");
    assert!(shell.wait().unwrap().success());
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let line = ends.iter().find(|line| line["comm"] == "nc").unwrap_or_else(|| panic!("{ends:#?}"));
    assert_eq!(line["cgroup"], format!("/{name}"), "{line}");
    assert_eq!(line["netns"], number(&namespace));
    assert_eq!(line["tx_bytes"], 6);
    (*line).clone()
}

#[test]
fn a_container_is_told_by_its_cgroup_and_namespace() {
    let pid = std::process::id();
    let digits = format!("{:064x}", (0xabc_u128 << 64) + u128::from(pid));
    for (name, container) in [
        (format!("docker-{digits}.scope"), format!("docker:{}", &digits[..12])),
        (format!("lxc.payload.web-{pid}"), format!("lxc:web-{pid}")),
        (format!("machine-web\\x2d{pid}.scope"), format!("machine:web-{pid}")),
    ] {
        assert_eq!(from_a_cgroup(&name)["container"], container);
    }
    assert_eq!(
        from_a_cgroup(&format!("underpass-{pid}.service"))["unit"],
        format!("underpass-{pid}.service")
    );
}

#[test]
fn renamed_and_killed_processes_are_told() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let listener = namespace.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut python = Command::new("python3");
    let program = r"
import socket, sys, time
open('/proc/self/comm', 'w').write('renamed')
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
s.sendall(b'k' * 12345)
time.sleep(60)
";
    python.args(["-c", program, &port.to_string()]);
    let mut child = namespace.spawn(&mut python).unwrap();
    let mut stream = listener.accept().unwrap().0;
    stream.read_exact(&mut [0; 12345]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    drop(stream);
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let line = ends.iter().find(|line| line["direction"] == "outbound").unwrap();
    assert_eq!((&line["comm"], &line["tx_bytes"]), (&"renamed".into(), &12345.into()), "{line}");
    assert_eq!(line["pid"].as_u64(), Some(child.id().into()));
}

#[test]
fn filters_hold_in_the_kernel() {
    let namespace = Namespace::new().unwrap();
    let program = r"
import socket, sys
open('/proc/self/comm', 'w').write(sys.argv[1])
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()
c = socket.create_connection(l.getsockname()); c.sendall(b'x')
six = socket.socket(socket.AF_INET6); six.bind(('::1', 0)); six.listen()
d = socket.create_connection(six.getsockname()[:2]); d.sendall(b'x')
print(l.getsockname()[1], c.getsockname()[1])
";
    for (args, remotes) in [
        (["--process", "wanted"], 4),
        (["--process", "unwanted"], 0),
        (["--remote", "::1"], 2),
        (["--remote", "127.0.0.0/8"], 2),
        (["--remote", "10.0.0.0/8"], 0),
        (["--no-loopback", "--json"], 0),
    ] {
        let watch = Watch::start(if args[0] == "--no-loopback" { &args[..1] } else { &args });
        python(&namespace, program, &["wanted"]);
        let (lines, _) = watch.end();
        let ends = select(&lines, &namespace, "close");
        assert_eq!(ends.len(), remotes, "{args:?}: {ends:#?}");
    }
}

/// An address that only a reverse look-up names.
const NUMBERED: Ipv4Addr = Ipv4Addr::new(44, 77, 0, 9);

/// unbound on 127.0.0.1:53 of the namespace, with a chain of aliases.
struct Unbound {
    child: std::process::Child,
    folder: PathBuf,
}

impl Unbound {
    fn start(namespace: &Namespace) -> Self {
        let folder = std::env::temp_dir().join(format!("underpass-watch-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = folder.join("unbound.conf");
        let text = format!(
            "server:\n interface: 127.0.0.1\n do-daemonize: no\n username: \"\"\n chroot: \"\"\n directory: \"{0}\"\n pidfile: \"\"\n \
             use-syslog: no\n logfile: \"\"\n access-control: 127.0.0.0/8 allow\n do-not-query-localhost: yes\n \
             local-data-ptr: \"{NUMBERED} numbered.example.com\"\n \
             auth-zone:\n name: \"example.com\"\n zonefile: \"{0}/zone\"\n for-downstream: yes\n for-upstream: no\n",
            folder.display()
        );
        fs::write(&config, text).unwrap();
        let zone = "@ 300 IN SOA ns. me. 1 3600 600 86400 300\n@ 300 IN NS ns.\nwww 300 IN CNAME host\n\
                    host 300 IN A 127.0.0.9\nsix 300 IN AAAA ::1\n";
        fs::write(folder.join("zone"), format!("$ORIGIN example.com.\n{zone}")).unwrap();
        let mut unbound = Command::new("unbound");
        unbound.arg("-c").arg(&config).stderr(Stdio::null());
        let child = namespace.spawn(&mut unbound).unwrap();
        for _ in 0..250 {
            if namespace.enter(|| TcpStream::connect("127.0.0.1:53")).is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Self { child, folder }
    }
}

impl Drop for Unbound {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn remote_names_come_from_real_answers() {
    let namespace = Namespace::new().unwrap();
    let unbound = Unbound::start(&namespace);
    let watch = Watch::start(&[]);
    // The address is asked for over UDP, then over TCP; www is an alias.
    for (options, host, address) in [
        ("", "host.example.com", "127.0.0.9"),
        ("options use-vc", "six.example.com", "::1"),
        ("", "www.example.com", "127.0.0.9"),
    ] {
        let resolver = unbound.folder.join("resolv.conf");
        fs::write(&resolver, format!("nameserver 127.0.0.1\n{options}\n")).unwrap();
        let listener = namespace.enter(|| TcpListener::bind((address, 8080))).unwrap();
        let accept = std::thread::spawn(move || drop(listener.accept().unwrap()));
        let mut shell = Command::new("unshare");
        let program = format!(
            "mount --bind {} /etc/resolv.conf && exec nc -N {host} 8080 </dev/null",
            resolver.display()
        );
        shell.args(["-m", "sh", "-c", &program]);
        assert!(namespace.spawn(&mut shell).unwrap().wait().unwrap().success(), "{host}");
        accept.join().unwrap();
    }
    let (lines, _) = watch.end();
    let names: Vec<_> = select(&lines, &namespace, "connect")
        .into_iter()
        .filter(|line| line["remote"].as_str().is_some_and(|remote| remote.ends_with(":8080")))
        .map(|line| (line["remote_name"].as_str().unwrap_or("-"), line["comm"].as_str().unwrap()))
        .collect();
    assert_eq!(names, [("host.example.com", "nc"), ("six.example.com", "nc"), ("www.example.com", "nc")]);
}

#[test]
fn what_no_answer_has_named_is_looked_up_in_reverse() {
    let namespace = Namespace::new().unwrap();
    namespace.address("lo", NUMBERED, 32).unwrap();
    let unbound = Unbound::start(&namespace);
    let resolver = unbound.folder.join("resolv.conf");
    fs::write(&resolver, "nameserver 127.0.0.1\n").unwrap();
    let mut shell = Command::new("unshare");
    let program = format!(
        "mount --bind {} /etc/resolv.conf && exec {} watch --json --reverse --interval 50ms --remote {NUMBERED}",
        resolver.display(),
        env!("CARGO_BIN_EXE_underpass")
    );
    shell.args(["-m", "sh", "-c", &program]);
    let watch = Watch::start_by(Some(&namespace), shell);
    let listener = namespace.enter(|| TcpListener::bind((NUMBERED, 0))).unwrap();
    let mut client = namespace.enter(|| TcpStream::connect(listener.local_addr().unwrap())).unwrap();
    let mut served = listener.accept().unwrap().0;
    // It lives until the name must be known: a resolver may take its time.
    for _ in 0..40 {
        client.write_all(b"x").unwrap();
        served.read_exact(&mut [0]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    drop((client, served));
    let (lines, notes) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let end = ends.iter().find(|line| line["direction"] == "outbound");
    let end = end.unwrap_or_else(|| panic!("{lines:#?} {notes}"));
    assert_eq!(end["remote_name"], "numbered.example.com", "{lines:#?} {notes}");
}
