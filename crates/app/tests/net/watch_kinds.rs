//! Every way in which bytes leave a host: seen, right process, right count.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
};

use io_uring::{IoUring, opcode, types::Fd};
use serde_json::Value;
use underpass::lab::Namespace;

use super::watch::{Watch, select};

/// A Python program in a namespace; it prints what it did. Returns its pid and output.
pub fn python(namespace: &Namespace, program: &str, args: &[&str]) -> (u32, String) {
    let mut python = Command::new("python3");
    python.args(["-c", program]).args(args).stdout(Stdio::piped());
    let child = namespace.spawn(&mut python).unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}");
    (pid, String::from_utf8(output.stdout).unwrap())
}

/// The final bytes that a process sent and received by a protocol, over all its
/// connections.
fn sums(lines: &[Value], namespace: &Namespace, pid: u32, protocol: &str) -> (u64, u64) {
    let ends = select(lines, namespace, "close");
    let open = last_traffic(lines, namespace, &ends);
    let mine = ends.iter().chain(&open).filter(|line| line["pid"] == pid && line["protocol"] == protocol);
    mine.fold((0, 0), |(tx, rx), line| {
        (tx + line["tx_bytes"].as_u64().unwrap(), rx + line["rx_bytes"].as_u64().unwrap())
    })
}

/// The last totals of what did not end, as frames of AF_PACKET sockets.
fn last_traffic<'a>(lines: &'a [Value], namespace: &Namespace, ends: &[&Value]) -> Vec<&'a Value> {
    let mut last = std::collections::HashMap::new();
    for line in select(lines, namespace, "traffic") {
        last.insert(format!("{}{}{}{}", line["pid"], line["protocol"], line["local"], line["remote"]), line);
    }
    for line in ends {
        last.remove(&format!("{}{}{}{}", line["pid"], line["protocol"], line["local"], line["remote"]));
    }
    last.into_values().collect()
}

/// A server that reads all and says how much, in the test's own process.
fn sink(namespace: &Namespace, address: &str) -> (SocketAddr, std::thread::JoinHandle<u64>) {
    let listener = namespace.enter(|| TcpListener::bind((address, 0))).unwrap();
    let at = listener.local_addr().unwrap();
    let reader = std::thread::spawn(move || {
        let mut client = listener.accept().unwrap().0;
        std::io::copy(&mut client, &mut std::io::sink()).unwrap()
    });
    (at, reader)
}

#[test]
fn sendfile_splice_and_zerocopy_count_to_the_byte() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    for (way, family) in [("sendfile", "127.0.0.1"), ("splice", "::1"), ("zerocopy", "127.0.0.1")] {
        let (at, reader) = sink(&namespace, family);
        let program = r"
import os, socket, sys, tempfile
way, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = socket.create_connection((host, port))
f = tempfile.TemporaryFile(); f.write(os.urandom(3000017)); f.flush(); f.seek(0)
left, at = 3000017, 0
if way == 'sendfile':
    while left:
        n = os.sendfile(s.fileno(), f.fileno(), at, left); left -= n; at += n
elif way == 'splice':
    r, w = os.pipe()
    while left:
        n = os.splice(f.fileno(), w, min(left, 65536)); left -= n
        while n: n -= os.splice(r, s.fileno(), n)
else:
    s.setsockopt(socket.SOL_SOCKET, 60, 1)
    data = f.read()
    while data: data = data[s.send(data, 0x4000000):]
";
        let args = [way, family, &at.port().to_string()];
        let (pid, _) = python(&namespace, program, &args);
        assert_eq!(reader.join().unwrap(), 3_000_017);
        // Its socket is the only one of the process.
        let _ = pid;
    }
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let sent: Vec<_> = ends.iter().filter(|line| line["direction"] == "outbound").collect();
    assert_eq!(sent.len(), 3, "{ends:#?}");
    for line in sent {
        assert_eq!(line["tx_bytes"], 3_000_017, "{line}");
        assert!(line["comm"].as_str().unwrap().starts_with("python3"), "{line}");
        assert_eq!(line["attribution"], "kernel");
    }
}

#[test]
fn io_uring_is_named_and_counted() {
    let namespace = Namespace::new().unwrap();
    let Ok(mut ring) = IoUring::new(8) else {
        println!("skipped: this kernel does not allow io_uring");
        return;
    };
    let watch = Watch::start(&[]);
    let (at, reader) = sink(&namespace, "127.0.0.1");
    let stream = namespace.enter(|| std::net::TcpStream::connect(at)).unwrap();
    let udp = namespace.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    let to = namespace.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    udp.connect(to.local_addr().unwrap()).unwrap();
    let bytes = [7u8; 1000];
    for fd in [stream.as_raw_fd(), udp.as_raw_fd()] {
        for _ in 0..50 {
            let send = opcode::Send::new(Fd(fd), bytes.as_ptr(), bytes.len() as u32).build();
            // SAFETY: the bytes and the sockets live until the call has completed.
            unsafe { ring.submission().push(&send) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().next().unwrap().result(), 1000);
        }
    }
    let local = (stream.local_addr().unwrap().to_string(), udp.local_addr().unwrap().to_string());
    drop((stream, udp));
    assert_eq!(reader.join().unwrap(), 50_000);
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    for local in [local.0, local.1] {
        let end = ends.iter().find(|line| line["local"] == local).unwrap_or_else(|| panic!("{ends:#?}"));
        assert_eq!(end["tx_bytes"], 50_000, "{end}");
        assert_eq!(end["pid"], std::process::id());
    }
}

#[test]
fn datagrams_are_counted_by_process_and_peer() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    for (any, host) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "::ffff:127.0.0.1")] {
        let server = namespace.enter(|| UdpSocket::bind((any, 0))).unwrap();
        let other = namespace.enter(|| UdpSocket::bind((any, 0))).unwrap();
        let ports = [&server, &other].map(|socket| socket.local_addr().unwrap().port().to_string());
        let program = r"
import socket, sys
host, one, two = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ':' in host else socket.AF_INET
c = socket.socket(family, socket.SOCK_DGRAM); c.connect((host, one))
for _ in range(10): c.send(b'x' * 1000)
u = socket.socket(family, socket.SOCK_DGRAM)
for _ in range(20):
    u.sendto(b'y' * 500, (host, one)); u.sendto(b'z' * 300, (host, two))
";
        let (pid, _) = python(&namespace, program, &[host, &ports[0], &ports[1]]);
        let mut buffer = [0; 2000];
        for _ in 0..30 {
            server.recv_from(&mut buffer).unwrap();
        }
        let _ = pid;
    }
    let pid = std::process::id();
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    let mut sent: Vec<_> = ends
        .iter()
        .filter(|line| line["protocol"] == "udp" && line["direction"] == "outbound")
        .map(|line| line["tx_bytes"].as_u64().unwrap())
        .collect();
    sent.sort_unstable();
    assert_eq!(sent, [6000, 6000, 6000, 10000, 10000, 10000, 10000, 10000, 10000], "{ends:#?}");
    let mapped =
        ends.iter().filter(|line| line["remote"].as_str().is_some_and(|at| at.starts_with("127.0.0.1:")));
    assert!(mapped.count() >= 6, "IPv4-mapped addresses are shown as IPv4: {ends:#?}");
    let received: u64 =
        ends.iter().filter(|line| line["pid"] == pid).map(|line| line["rx_bytes"].as_u64().unwrap()).sum();
    assert_eq!(received, 3 * (10 * 1000 + 20 * 500), "{ends:#?}");
}

#[test]
fn sendmmsg_and_recvmmsg_count_every_message() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let program = r"
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
class iovec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
class msghdr(ctypes.Structure): _fields_ = [('name', ctypes.c_void_p), ('namelen', ctypes.c_uint), ('iov', ctypes.POINTER(iovec)), ('iovlen', ctypes.c_size_t), ('control', ctypes.c_void_p), ('controllen', ctypes.c_size_t), ('flags', ctypes.c_int)]
class mmsghdr(ctypes.Structure): _fields_ = [('hdr', msghdr), ('len', ctypes.c_uint)]
r = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); r.bind(('127.0.0.1', 0))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(r.getsockname())
def vector():
    buffers = [ctypes.create_string_buffer(700) for _ in range(8)]
    iovs = [iovec(ctypes.addressof(b), 700) for b in buffers]
    many = (mmsghdr * 8)()
    for m, i in zip(many, iovs): m.hdr.iov = ctypes.pointer(i); m.hdr.iovlen = 1
    return many, buffers, iovs
many, *keep = vector()
for _ in range(5):
    assert libc.sendmmsg(s.fileno(), many, 8, 0) == 8
    got, *kept = vector()
    assert libc.recvmmsg(r.fileno(), got, 8, 0, None) == 8
";
    let (pid, _) = python(&namespace, program, &[]);
    let (lines, _) = watch.end();
    let ends: Vec<_> =
        select(&lines, &namespace, "close").into_iter().filter(|line| line["protocol"] == "udp").collect();
    let sum = |field: &str| ends.iter().map(|line| line[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("tx_bytes"), sum("rx_bytes")), (28000, 28000), "{ends:#?}");
    let _ = pid;
}

#[test]
fn icmp_raw_packets_and_frames_are_counted() {
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&["--interval", "100ms"]);
    let mut ping = Command::new("ping");
    ping.args(["-c", "5", "-i", "0.01", "-s", "1000", "127.0.0.1"]).stdout(Stdio::null());
    let mut ping = namespace.spawn(&mut ping).unwrap();
    let ping_pid = ping.id();
    assert!(ping.wait().unwrap().success());
    let program = r"
import os, socket, time
comm = open('/proc/self/comm', 'w'); comm.write('raw'); comm.flush()
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
for _ in range(10): raw.sendto(b'r' * 500, ('127.0.0.1', 0))
six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 254)
for _ in range(10): six.sendto(b's' * 400, ('::1', 0))
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
frames.bind(('lo', 0x0800))
for _ in range(10): frames.send(b'\0' * 12 + b'\x08\x00' + b'f' * 286)
print(os.getpid())
time.sleep(0.5)
";
    let (_, pid) = python(&namespace, program, &[]);
    let pid: u32 = pid.trim().parse().unwrap();
    let (lines, _) = watch.end();
    assert_eq!(sums(&lines, &namespace, ping_pid, "icmp").0, 5 * 1008, "{lines:#?}");
    assert_eq!(sums(&lines, &namespace, pid, "ip-253").0, 5000, "{lines:#?}");
    assert_eq!(sums(&lines, &namespace, pid, "ip-254").0, 4000, "{lines:#?}");
    assert_eq!(sums(&lines, &namespace, pid, "packet").0, 3000, "{lines:#?}");
    let seen = select(&lines, &namespace, "connect");
    let of = |pid: u32, protocol: &str| {
        *seen
            .iter()
            .find(|line| line["pid"] == pid && line["protocol"] == protocol)
            .unwrap_or_else(|| panic!("{seen:#?}"))
    };
    assert_eq!(of(ping_pid, "icmp")["comm"], "ping");
    assert_eq!(of(ping_pid, "icmp")["remote"], Ipv4Addr::LOCALHOST.to_string());
    assert_eq!(of(pid, "ip-253")["remote"], "127.0.0.1");
    assert_eq!(of(pid, "ip-254")["remote"], "::1");
    assert_eq!(of(pid, "packet")["comm"], "raw");
}

#[test]
fn sctp_is_counted_where_the_kernel_has_it() {
    // SAFETY: a plain system call with integers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP) };
    if fd < 0 {
        println!("skipped: this kernel has no SCTP");
        return;
    }
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(fd) };
    let namespace = Namespace::new().unwrap();
    let watch = Watch::start(&[]);
    let program = r"
import socket
l = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132); l.bind(('127.0.0.1', 0)); l.listen()
c = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132); c.connect(l.getsockname())
a = l.accept()[0]
c.sendall(b'x' * 1000)
assert len(a.recv(2000)) == 1000
";
    python(&namespace, program, &[]);
    let (lines, _) = watch.end();
    let ends = select(&lines, &namespace, "close");
    assert!(ends.iter().any(|line| line["protocol"] == "sctp" && line["tx_bytes"] == 1000), "{ends:#?}");
}

/// What the kernel connects of its own accord: a further subflow of an MPTCP connection
/// is opened by a worker thread.
#[test]
fn a_connection_of_the_kernels_own_is_shown_as_such() {
    let namespace = Namespace::new().unwrap();
    if !namespace.enter(|| std::path::Path::new("/proc/sys/net/mptcp").exists()) {
        println!("skipped: this kernel has no MPTCP");
        return;
    }
    for last in 1..=3 {
        namespace.address("lo", Ipv4Addr::new(10, 77, 0, last), 32).unwrap();
    }
    for args in ["limits set subflow 4 add_addr_accepted 4", "endpoint add 10.77.0.3 dev lo subflow"] {
        let mut ip = Command::new("ip");
        ip.arg("mptcp").args(args.split(' '));
        assert!(namespace.spawn(&mut ip).unwrap().wait().unwrap().success(), "{args}");
    }
    let watch = Watch::start(&[]);
    let program = r"
import socket, time
def mptcp(): return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
l = mptcp(); l.bind(('10.77.0.2', 0)); l.listen()
c = mptcp(); c.bind(('10.77.0.1', 0)); c.connect(l.getsockname()); s = l.accept()[0]
c.sendall(b'x' * 1000); s.recv(1000, socket.MSG_WAITALL)
def subflows(): return open('/proc/net/tcp').read().count(' 03004D0A:')
for _ in range(1000):
    if subflows(): break
    time.sleep(0.02)
c.close(); s.close()
";
    let (pid, _) = python(&namespace, program, &[]);
    let (lines, notes) = watch.end();
    let told = select(&lines, &namespace, "connect");
    let of = |local: &str| {
        let line = told.iter().find(|line| {
            line["protocol"] == "tcp" && line["local"].as_str().is_some_and(|at| at.starts_with(local))
        });
        *line.unwrap_or_else(|| panic!("{local}: {lines:#?} {notes}"))
    };
    assert_eq!(of("10.77.0.1:")["comm"], "python3");
    let own = of("10.77.0.3:")["comm"].as_str().unwrap();
    assert!(own.starts_with("[kworker/") && own.ends_with(']'), "{own}");
    let whole = told.iter().find(|line| line["protocol"] == "mptcp").unwrap();
    assert_eq!(whole["pid"], pid, "{whole}");
}
