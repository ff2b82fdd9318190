//! The shortcut: real programs in a control group of the test's own.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use underpass::{
    lab::Namespace,
    shortcut::{Scope, Shortcut, cgroup::Temporary, summary::Figures},
};

/// How soon a connection is accelerated depends on how busy the machine is; that more
/// than this is redirected in the end does not.
const MUCH: u64 = 1 << 20;

/// A namespace, a control group, and the shortcut for it if it is on.
struct Place {
    shortcut: Option<Shortcut>,
    cgroup: Temporary,
    namespace: Namespace,
}

impl Place {
    fn new(on: bool) -> Self {
        let cgroup = Temporary::new("test").unwrap();
        let shortcut = on.then(|| Shortcut::start(cgroup.path(), &Scope::default()).unwrap());
        Self { shortcut, cgroup, namespace: Namespace::new().unwrap() }
    }

    /// Starts a program in the control group and the namespace.
    fn spawn(&self, program: &str, args: &[&str]) -> Running {
        self.spawn_in(&self.namespace, program, args)
    }

    fn spawn_in(&self, namespace: &Namespace, program: &str, args: &[&str]) -> Running {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.cgroup.path().join("cgroup.procs"))
            .arg(program)
            .args(args)
            .process_group(0)
            .stdout(Stdio::piped());
        let mut child = namespace.spawn(&mut shell).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Running { child, output }
    }

    fn python(&self, script: &str, args: &[&str]) -> Running {
        self.python_in(&self.namespace, script, args)
    }

    fn python_in(&self, namespace: &Namespace, script: &str, args: &[&str]) -> Running {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut").join(script);
        self.spawn_in(namespace, "python3", &[&[script.to_str().unwrap()], args].concat())
    }
}

/// A program that ends with its test.
struct Running {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Waits until it has ended well; returns what else it printed.
    fn finish(mut self) -> String {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "it ended badly, after {rest}");
        rest.trim().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It leads a process group: its workers end with it.
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// With the shortcut and without, over both families.
fn everywhere(f: impl Fn(&Place, &str)) {
    for on in [true, false] {
        for address in ["127.0.0.1", "::1"] {
            println!("{address}, shortcut {}", if on { "on" } else { "off" });
            f(&Place::new(on), address);
        }
    }
}

impl Place {
    /// The sums so far, where the shortcut is on.
    fn figures(&self) -> Option<Figures> {
        self.shortcut.as_ref().map(|shortcut| {
            let figures = shortcut.summary().total;
            println!("{figures:?}");
            figures
        })
    }

    /// Runs a program that must end well; returns what it printed.
    fn run(&self, program: &str, args: &[&str]) -> String {
        self.spawn(program, args).finish()
    }

    /// Waits until something listens on a port of the namespace.
    fn wait_for(&self, port: u16) {
        // Local address and port, remote ones, and the state: 0A is LISTEN.
        let end = format!(":{port:04X}");
        let listens = |line: &str| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            fields.len() > 3 && fields[1].ends_with(&end) && fields[3] == "0A"
        };
        for _ in 0..500 {
            let tables = self.namespace.enter(|| {
                ["tcp", "tcp6"]
                    .map(|name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap())
            });
            if tables.concat().lines().any(listens) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("nothing listens on port {port}");
    }
}

fn exchange(place: &Place, address: &str, target: &str, rounds: &str, max_size: &str) {
    let mut server = place.python("exchange.py", &["server", address, "0", rounds, max_size, "1"]);
    let port = server.line();
    let client = place.python("exchange.py", &["client", target, &port, rounds, max_size, "1"]);
    same(server, client);
}

fn same(server: Running, client: Running) {
    let client: Vec<_> = client.finish().split(' ').map(str::to_owned).collect();
    let server: Vec<_> = server.finish().split(' ').map(str::to_owned).collect();
    assert_eq!(client[0], server[1], "what the client sent is what the server received");
    assert_eq!(server[0], client[1], "what the server sent is what the client received");
}

#[test]
fn what_is_exchanged_is_the_same_with_and_without() {
    for on in [true, false] {
        for (address, target) in
            [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::ffff:127.0.0.1")]
        {
            let place = Place::new(on);
            exchange(&place, address, target, "1000", "300000");
            let Some(figures) = place.figures() else { continue };
            assert_eq!(figures.accelerated, 1, "{address} {target}");
            assert!(figures.redirected_bytes > MUCH, "{address} {target}");
        }
    }
}

/// Ports whose bytes are each other's, swapped.
#[test]
fn ports_1_and_256_are_not_confused() {
    let place = Place::new(true);
    let args = |role| [role, "127.0.0.1", "256", "300", "1000", "1", "1"];
    let mut server = place.python("exchange.py", &args("server"));
    assert_eq!(server.line(), "256");
    same(server, place.python("exchange.py", &args("client")));
    let summary = place.shortcut.as_ref().unwrap().summary();
    assert_eq!((summary.total.accelerated, summary.groups[0].port), (1, 256));
}

/// The same addresses and ports in two namespaces, at the same time.
#[test]
fn namespaces_do_not_meet() {
    let place = Place::new(true);
    let other = Namespace::new().unwrap();
    let start = |namespace, role, seed| {
        let args = [role, "127.0.0.1", "7000", "1000", "100000", seed, "7001"];
        place.python_in(namespace, "exchange.py", &args)
    };
    let (mut a, mut b) = (start(&place.namespace, "server", "1"), start(&other, "server", "2"));
    assert_eq!((a.line(), b.line()), ("7000".into(), "7000".into()));
    let (c, d) = (start(&place.namespace, "client", "1"), start(&other, "client", "2"));
    same(a, c);
    same(b, d);
    assert_eq!(place.figures().unwrap().accelerated, 2);
}

#[test]
fn connections_that_exist_are_left_alone() {
    let mut place = Place::new(false);
    let mut server = place.python("exchange.py", &["server", "127.0.0.1", "0", "2000", "50000", "1"]);
    let port = server.line();
    let client = place.python("exchange.py", &["client", "127.0.0.1", &port, "2000", "50000", "1"]);
    // It takes a while to get to the end; established it is before the first exchange.
    std::thread::sleep(std::time::Duration::from_millis(400));
    place.shortcut = Some(Shortcut::start(place.cgroup.path(), &Scope::default()).unwrap());
    same(server, client);
    assert_eq!(place.figures().unwrap().accelerated, 0);
}

#[test]
fn connections_churn() {
    for address in ["127.0.0.1", "::1"] {
        let place = Place::new(true);
        let churn = place.python("churn.py", &[address, "5000"]);
        assert_eq!(churn.finish(), "5000");
        let figures = place.figures().unwrap();
        let left: u64 = figures.left_alone.values().sum();
        assert_eq!(figures.accelerated + left, 5000, "each is counted once");
        assert!(figures.accelerated > 100, "many were accelerated");
        assert_eq!(figures.accelerated_now, 0);
    }
}

#[test]
fn readers_that_fall_behind_get_everything() {
    everywhere(|place, address| {
        let slow = place.python("slow.py", &[address, "40"]).finish();
        let (same, most) = slow.split_once(' ').unwrap();
        assert_eq!(same, "True");
        assert!(most.parse::<u64>().unwrap() < 24 << 20, "the sender is stopped: {most}");
        let Some(figures) = place.figures() else { return };
        assert_eq!(figures.accelerated, 1);
        assert!(figures.tcp_bytes > 30 << 20, "the rest went by TCP");
    });
}

#[test]
fn programs_that_wait_in_recv_are_left_alone_unless_accepted() {
    let place = Place::new(true);
    assert_eq!(place.python("blocking.py", &["127.0.0.1", "200"]).finish(), "True 0");
    let figures = place.figures().unwrap();
    assert_eq!((figures.accelerated, figures.left_alone["blocking-recv"]), (0, 1));

    for address in ["127.0.0.1", "::1"] {
        let cgroup = Temporary::new("test").unwrap();
        let scope = Scope { accepted: underpass_abi::shortcut::HABIT_BLOCKS, ..Scope::default() };
        let shortcut = Some(Shortcut::start(cgroup.path(), &scope).unwrap());
        let place = Place { shortcut, cgroup, namespace: Namespace::new().unwrap() };
        let printed = place.python("blocking.py", &[address, "200"]).finish();
        println!("same, EAGAIN from recv: {printed}");
        assert!(printed.starts_with("True "), "{printed}");
        assert_eq!(place.figures().unwrap().accelerated, 1);
    }
}

#[test]
fn redis() {
    everywhere(|place, address| {
        let server = place.spawn("redis-server", &["--port", "6399", "--bind", address, "--save", ""]);
        place.wait_for(6399);
        let benchmark = |args: &[&str]| {
            place.run("redis-benchmark", &[&["-h", address, "-p", "6399", "-q"], args].concat())
        };
        benchmark(&["-t", "incr", "-n", "30000", "-c", "10"]);
        benchmark(&["-t", "incr", "-n", "50000", "-c", "5", "-P", "16"]);
        benchmark(&["-t", "set,get", "-n", "5000", "-c", "5", "-d", "20000"]);
        let count = place.run("redis-cli", &["-h", address, "-p", "6399", "get", "counter:__rand_int__"]);
        assert_eq!(count, "80000", "every increment arrived once");
        drop(server);
        let Some(figures) = place.figures() else { return };
        assert!(figures.accelerated >= 10, "the clients' connections are accelerated");
        assert!(figures.redirected_bytes > MUCH);
    });
}

#[test]
fn nginx() {
    let files = tempfile();
    let size = |name| if name == "small" { 612 } else { 1 << 20 };
    for name in ["small", "large"] {
        let bytes: Vec<u8> = (0..size(name)).map(|i: usize| (i * i % 251) as u8).collect();
        std::fs::write(files.join(name), bytes).unwrap();
    }
    let config = format!(
        "daemon off; error_log stderr; pid {0}/pid; worker_processes 2; events {{}}\n\
         http {{ access_log off; client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f;\n\
         uwsgi_temp_path {0}/u; scgi_temp_path {0}/s; keepalive_requests 1000000; sendfile on;\n\
         server {{ listen 8099; listen [::1]:8099; root {0}; }} }}",
        files.display()
    );
    std::fs::write(files.join("conf"), config).unwrap();
    everywhere(|place, address| {
        let server = place.spawn("nginx", &["-c", files.join("conf").to_str().unwrap(), "-e", "stderr"]);
        place.wait_for(8099);
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        for name in ["small", "large"] {
            // One connection, many requests; every body is compared.
            let url = format!("http://{host}:8099/{name}?n=[1-60]");
            let bodies = format!("curl -sSf '{url}' | sha256sum");
            let expected =
                format!("for i in $(seq 60); do cat {}; done | sha256sum", files.join(name).display());
            assert_eq!(place.run("sh", &["-c", &bodies]), place.run("sh", &["-c", &expected]));
            let load = place.run("wrk", &["-t1", "-c8", "-d1s", &format!("http://{host}:8099/{name}")]);
            assert!(!load.contains("Non-2xx") && !load.contains("Socket errors"), "{load}");
        }
        drop(server);
        let Some(figures) = place.figures() else { return };
        // The load lasts for a second, in which a busy machine answers but a few times.
        assert!(figures.accelerated > 0, "wrk's connections are accelerated");
    });
    std::fs::remove_dir_all(files).unwrap();
}

#[test]
fn postgresql() {
    let folder = tempfile();
    let bin = std::fs::read_dir("/usr/lib/postgresql").unwrap().next().unwrap().unwrap().path().join("bin");
    let tool = |name: &str| bin.join(name).to_str().unwrap().to_owned();
    Command::new("chown").arg("postgres").arg(&folder).status().unwrap();
    everywhere(|place, address| {
        let data = folder.join("data");
        // It refuses to run as root.
        let user = |args: &[&str]| {
            let mut all = vec!["--reuid=postgres", "--regid=postgres", "--init-groups"];
            all.extend(args);
            place.spawn("setpriv", &all)
        };
        let at = data.to_str().unwrap();
        user(&[&tool("initdb"), "--no-sync", "-A", "trust", "-D", at]).finish();
        let server =
            user(&[&tool("postgres"), "-D", at, "-p", "5499", "-h", address, "-c", "fsync=off", "-k", at]);
        place.wait_for(5499);
        let connect = ["-h", address, "-p", "5499", "-U", "postgres", "postgres"];
        let pgbench = |args: &[&str]| user(&[&[tool("pgbench").as_str()], args, &connect].concat()).finish();
        pgbench(&["-i", "-q", "-s", "1"]);
        pgbench(&["-n", "-c", "4", "-t", "300"]);
        pgbench(&["-n", "-S", "-c", "4", "-t", "1000", "-M", "prepared"]);
        let count = user(
            &[&[tool("psql").as_str()], &["-Atc", "select count(*) from pgbench_history"][..], &connect]
                .concat(),
        );
        assert_eq!(count.finish(), "1200", "every transaction arrived once");
        // Told to end at once, it takes its children with it.
        let _ = Command::new("kill").args(["-INT", &server.child.id().to_string()]).status();
        server.finish();
        std::fs::remove_dir_all(&data).unwrap();
        let Some(figures) = place.figures() else { return };
        // How many depends on how the machine runs both ends: an end that waits in recv
        // is left alone.
        assert!(figures.accelerated > 0, "pgbench's connections are accelerated");
    });
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn node_http() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut/http.mjs");
    everywhere(|place, address| {
        assert_eq!(place.run("node", &[script.to_str().unwrap(), address, "400"]), "400");
        let Some(figures) = place.figures() else { return };
        assert!(figures.accelerated > 0 && figures.redirected_bytes > MUCH);
    });
}

/// Go reads and writes without waiting inside of the kernel, and sends files by sendfile.
#[test]
fn go_http() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut/http.go");
    let folder = tempfile();
    let program = folder.join("http");
    let built = Command::new("go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("GOCACHE", folder.join("cache"))
        .env("GOFLAGS", "-mod=mod")
        .status();
    assert!(built.unwrap().success(), "it does not build");
    everywhere(|place, address| {
        assert_eq!(place.run(program.to_str().unwrap(), &[address, "400"]), "400");
        let Some(figures) = place.figures() else { return };
        assert!(figures.accelerated > 0 && figures.redirected_bytes > MUCH);
    });
    std::fs::remove_dir_all(folder).unwrap();
}

/// At either end, and on no other port.
#[test]
fn only_chosen_ports_are_accelerated() {
    for (port, source, accelerated) in [("7100", "7200", 1), ("7101", "7100", 1), ("7101", "7201", 0)] {
        let cgroup = Temporary::new("test").unwrap();
        let scope = Scope { ports: vec![7100, 25_601], ..Scope::default() };
        let shortcut = Some(Shortcut::start(cgroup.path(), &scope).unwrap());
        let place = Place { shortcut, cgroup, namespace: Namespace::new().unwrap() };
        let mut server = place.python("exchange.py", &["server", "127.0.0.1", port, "300", "20000", "1"]);
        assert_eq!(server.line(), port);
        same(
            server,
            place.python("exchange.py", &["client", "127.0.0.1", port, "300", "20000", "1", source]),
        );
        let figures = place.figures().unwrap();
        assert_eq!(figures.accelerated, accelerated, "from {source} to {port}");
        assert_eq!(figures.left_alone.values().sum::<u64>(), 0, "out of scope is not counted");
    }
}

/// Streams are left to TCP, whatever the size of their writes.
#[test]
fn iperf3() {
    everywhere(|place, address| {
        let server = place.spawn("iperf3", &["-s", "-p", "5299", "-B", address]);
        place.wait_for(5299);
        for way in [&["-l", "128K"][..], &["-l", "128K", "-R"], &["-l", "64", "-N"]] {
            let printed = place.run("iperf3", &[&["-c", address, "-p", "5299", "-n", "20M"], way].concat());
            assert!(printed.contains("receiver"), "{printed}");
        }
        drop(server);
        let Some(figures) = place.figures() else { return };
        assert!(figures.redirected_bytes < 1 << 20, "the streams went by TCP");
        assert!(figures.tcp_bytes > 50 << 20);
    });
}

/// A relay between client and server, all three in scope.
#[test]
fn through_a_relay() {
    everywhere(|place, address| {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let mut server = place.python("exchange.py", &["server", address, "0", "600", "200000", "1"]);
        let (target, listen) = (format!("{host}:{}", server.line()), format!("{host}:7399"));
        let underpass = env!("CARGO_BIN_EXE_underpass");
        let relay =
            place.spawn(underpass, &["relay", "--listen", &listen, "--to", &target, "--path", "copy"]);
        place.wait_for(7399);
        same(server, place.python("exchange.py", &["client", address, "7399", "600", "200000", "1"]));
        drop(relay);
        let Some(figures) = place.figures() else { return };
        assert_eq!(figures.accelerated, 2, "both of its connections are accelerated");
    });
}

fn tempfile() -> std::path::PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("underpass-shortcut-{}-{number}", std::process::id()));
    std::fs::create_dir(&path).unwrap();
    path
}

/// The real binary, with pins in a bpffs of the test's own: attached, used, its helper
/// killed, detached in the middle of a connection.
#[test]
fn attached_for_good() {
    let cgroup = Temporary::new("test").unwrap();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut");
    // The helper process detaches itself: it ends with the namespace of processes, and
    // that with this test, however it ends.
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "sh", "-eu"])
        .arg(scripts.join("attached.sh"))
        .arg(env!("CARGO_BIN_EXE_underpass"))
        .arg(cgroup.path())
        .arg(scripts.join("exchange.py"))
        .output()
        .unwrap();
    let (printed, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{printed}\n{errors}");
    assert!(output.status.success());
    assert!(printed.ends_with("all is well\n"));
}
