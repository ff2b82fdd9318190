//! watch against real programs, each test in network namespaces of its own.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use underpass::lab::Namespace;

use crate::kit::eventually;

/// A running `underpass watch --json`.
pub struct Watch {
    child: Child,
    lines: JoinHandle<Vec<Value>>,
    notes: JoinHandle<String>,
}

impl Watch {
    /// Starts it and waits until it watches.
    pub fn start(args: &[&str]) -> Self {
        Self::start_in(None, args)
    }

    /// The same in a network namespace.
    pub fn start_in(namespace: Option<&Namespace>, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
        command.args(["watch", "--json"]).args(args);
        Self::start_by(namespace, command)
    }

    /// The same by a command that ends up as `underpass watch --json`.
    pub fn start_by(namespace: Option<&Namespace>, mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = match namespace {
            Some(namespace) => namespace.spawn(&mut command),
            None => command.spawn(),
        };
        let mut child = child.unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let lines = std::thread::spawn(move || {
            lines.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
        });
        let mut notes = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        while !seen.contains("watching") {
            assert_ne!(notes.read_line(&mut seen).unwrap(), 0, "watch did not start: {seen}");
        }
        let notes = std::thread::spawn(move || {
            notes.read_to_string(&mut seen).unwrap();
            seen
        });
        Self { child, lines, notes }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Ends it and returns what it told: its lines and its notes.
    pub fn end(mut self) -> (Vec<Value>, String) {
        self.signal(Signal::SIGINT);
        let status = self.child.wait().unwrap();
        let told = (self.lines.join().unwrap(), self.notes.join().unwrap());
        assert!(status.success(), "{status}: {}", told.1);
        told
    }
}

/// The network namespace, as a line names it.
pub fn number(namespace: &Namespace) -> u64 {
    use std::os::fd::AsFd as _;
    nix::sys::stat::fstat(namespace.as_fd()).unwrap().st_ino
}

/// The lines of an event in a namespace.
pub fn select<'a>(lines: &'a [Value], namespace: &Namespace, event: &str) -> Vec<&'a Value> {
    let number = number(namespace);
    lines.iter().filter(|line| line["netns"] == number && line["event"] == event).collect()
}

#[test]
fn curl_and_nc_are_named_with_their_exact_bytes() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let body = vec![b'x'; 300_000];
    let listener = namespace.enter(|| TcpListener::bind(("127.0.0.1", 0))).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn({
        let body = body.clone();
        move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let read = client.read(&mut request).unwrap();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            client.write_all(head.as_bytes()).unwrap();
            client.write_all(&body).unwrap();
            (read, head.len() + body.len())
        }
    });
    let mut curl = Command::new("curl");
    curl.args(["-s", "-o", "/dev/null", &format!("http://127.0.0.1:{port}/")]);
    let mut curl = namespace.spawn(&mut curl).unwrap();
    let curl_pid = curl.id();
    assert!(curl.wait().unwrap().success());
    let (received, sent) = server.join().unwrap();
    let (lines, _) = watch.end();

    let ends = select(&lines, &namespace, "close");
    let of = |pid: u32| *ends.iter().find(|line| line["pid"] == pid).unwrap_or_else(|| panic!("{ends:#?}"));
    let (client, server) = (of(curl_pid), of(std::process::id()));
    for (line, comm, direction, rx, tx) in
        [(client, Some("curl"), "outbound", sent, received), (server, None, "inbound", received, sent)]
    {
        if let Some(comm) = comm {
            assert_eq!(line["comm"], comm);
            assert!(line["exe"].as_str().unwrap().ends_with("/curl"), "{line}");
        }
        assert_eq!(line["direction"], direction, "{line}");
        assert_eq!(line["protocol"], "tcp");
        assert_eq!(line["attribution"], "kernel");
        assert_eq!(line["rx_bytes"], rx, "{line}");
        assert_eq!(line["tx_bytes"], tx, "{line}");
    }
    assert_eq!(client["remote"], format!("127.0.0.1:{port}"));
    assert_eq!(client["local"], server["remote"]);
    assert_eq!(select(&lines, &namespace, "connect").len(), 1);
    assert_eq!(select(&lines, &namespace, "accept").len(), 1);
}

#[test]
fn what_was_open_before_is_listed_with_its_process() {
    let namespace = Namespace::new().unwrap();
    let (mut ours, mut theirs) = namespace.enter(|| {
        let listener = TcpListener::bind(("::1", 0)).unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    });
    ours.write_all(b"before").unwrap();
    let watch = Watch::start(&["--pid", &std::process::id().to_string()]);
    theirs.read_exact(&mut [0; 6]).unwrap();
    ours.write_all(b" and after").unwrap();
    theirs.read_exact(&mut [0; 10]).unwrap();
    let remote = ours.peer_addr().unwrap().to_string();
    drop((ours, theirs));
    eventually("both ends are closed", || {
        let sockets = namespace.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp6")).unwrap();
        let mut states = sockets.lines().skip(1).filter_map(|line| line.split_whitespace().nth(3));
        // TIME_WAIT (include/net/tcp_states.h): the connection is over.
        states.all(|state| state == "06")
    });
    let (lines, _) = watch.end();
    let found = select(&lines, &namespace, "connect");
    assert_eq!(found.len(), 2, "{lines:#?}");
    assert!(found.iter().all(|line| line["attribution"] == "procfs" && line["pid"] == std::process::id()));
    let ends = select(&lines, &namespace, "close");
    let end = ends.iter().find(|line| line["remote"] == remote).unwrap();
    assert_eq!((&end["tx_bytes"], &end["rx_bytes"]), (&16.into(), &0.into()));
    assert_eq!(end.get("duration_ms"), None, "nobody knows when it began");
}

/// So that it empties its ring in time among hundreds of busy threads.
#[test]
fn it_runs_before_others_but_its_page_does_not() {
    let watch = Watch::start(&["--web", "127.0.0.1:0"]);
    let pid = watch.child.id();
    // Field 19 of proc_pid_stat(5); the second may hold anything, and ends with a bracket.
    let nice = |thread: std::fs::DirEntry| -> (i32, bool) {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap();
        let nice = stat.rsplit_once(") ").unwrap().1.split(' ').nth(16).unwrap().parse().unwrap();
        (nice, thread.file_name().to_str() == Some(&pid.to_string()))
    };
    let mut found = vec![];
    // The page's thread gives it up as the first it does.
    for _ in 0..500 {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        found = threads.map(|thread| nice(thread.unwrap())).collect();
        found.sort_unstable();
        if found == [(-20, true), (0, false)] {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(found, [(-20, true), (0, false)]);
    watch.end();
}

#[test]
fn nothing_is_left_when_it_ends() {
    let watch = Watch::start(&[]);
    let pid = watch.child.id();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(fds > 10);
    let (_, notes) = watch.end();
    assert!(notes.contains("connections seen"), "{notes}");
    let links = Command::new("bpftool").args(["link", "show"]).output();
    if let Ok(links) = links {
        assert!(!String::from_utf8_lossy(&links.stdout).contains(&format!("underpass({pid})")));
    }
}
