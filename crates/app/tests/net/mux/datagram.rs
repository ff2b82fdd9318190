//! UDP in the kernel: both families, every hook, checksums with and without offloads.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process::Command,
    thread,
};

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use serde_json::Value;
use underpass::lab::Namespace;
use underpass_logic::packet::{checksum, udp::Datagram};

use super::{Folder, output};
use crate::kit::{Daemon, PATIENCE, eventually, underpass};

/// The ancestor's own case.
const ANCESTOR: [&str; 10] = [
    "--port",
    "5000",
    "--length",
    "290..=294",
    "--route",
    "@20:600=5001",
    "--route",
    "@20:601=5002",
    "--route",
    "@20:602=5003",
];

/// A client and a host with services, joined by a link.
struct Hosts {
    client: Namespace,
    host: Namespace,
}

impl Hosts {
    fn new() -> Self {
        let hosts = Self { client: Namespace::new().unwrap(), host: Namespace::new().unwrap() };
        hosts.client.join("eth0", &hosts.host, "eth0").unwrap();
        hosts.addresses("eth0", 1);
        hosts
    }

    /// Gives both ends of a link their addresses.
    fn addresses(&self, interface: &str, net: u8) {
        for (host, last) in [(&self.client, 1), (&self.host, 2)] {
            host.address(interface, IpAddr::from([10, 0, net, last]), 24).unwrap();
            host.address(interface, format!("fd00:{net}::{last}").parse::<IpAddr>().unwrap(), 64).unwrap();
        }
    }

    /// Sends without offloads: checksums are then complete on the wire, and checked.
    fn without_offloads(&self) {
        for host in [&self.client, &self.host] {
            offloads(host, "eth0", false);
        }
    }
}

fn offloads(host: &Namespace, interface: &str, on: bool) {
    let state = if on { "on" } else { "off" };
    let said = output(host, Command::new("ethtool").args(["-K", interface, "tx", state, "rx", state]));
    assert!(!said.contains("Cannot"), "{said}");
}

fn ip(host: &Namespace, arguments: &[&str]) {
    let output = host.enter(|| Command::new("ip").args(arguments).output()).unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An attachment that is removed when this is dropped.
struct Attached<'a> {
    host: &'a Namespace,
    said: String,
}

impl<'a> Attached<'a> {
    fn new(host: &'a Namespace, arguments: &[&str]) -> Self {
        let said = mux(host, &[&["attach", "eth0"], arguments].concat());
        assert!(said.contains("goes by"), "{said}");
        Self { host, said }
    }

    fn show(&self) -> Value {
        let all: Value = serde_json::from_str(&mux(self.host, &["show", "--json"])).unwrap();
        assert_eq!(all["attached"].as_array().unwrap().len(), 1, "{all}");
        assert_eq!(all["attached"][0]["works"], true, "{all}");
        all["attached"][0].clone()
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        mux(self.host, &["detach", "eth0"]);
    }
}

fn mux(host: &Namespace, arguments: &[&str]) -> String {
    output(host, underpass().arg("mux").args(arguments))
}

/// A service that sends back its port and what it got.
fn service(host: &Namespace, port: u16) {
    let socket = host.enter(|| UdpSocket::bind(("::", port))).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let answer = [port.to_string().as_bytes(), b":", &buffer[..length]].concat();
            let _ = socket.send_to(&answer, from);
        }
    });
}

/// A connected socket of the client's: it takes replies only from where it sends to.
fn client(from: &Namespace, to: (IpAddr, u16)) -> UdpSocket {
    let socket = from.enter(|| {
        let any: IpAddr = if to.0.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        UdpSocket::bind((any, 0)).unwrap()
    });
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn payload(tag: &str, length: usize) -> Vec<u8> {
    let mut payload: Vec<u8> = (0..length).map(|i| i as u8).collect();
    payload[20..20 + tag.len()].copy_from_slice(tag.as_bytes());
    payload
}

/// Sends and gives the port of the service that answered.
fn ask(socket: &UdpSocket, payload: &[u8]) -> u16 {
    socket.send(payload).unwrap();
    answer(socket, Some(payload))
}

/// The port that answers, with what it got.
fn answer(socket: &UdpSocket, payload: Option<&[u8]>) -> u16 {
    let mut answer = vec![0; 65_536];
    let length = socket.recv(&mut answer).unwrap();
    let colon = answer.iter().position(|byte| *byte == b':').unwrap();
    if let Some(payload) = payload {
        assert_eq!(&answer[colon + 1..length], payload);
    }
    String::from_utf8_lossy(&answer[..colon]).parse().unwrap()
}

fn host_address(net: u8, six: bool) -> IpAddr {
    if six { format!("fd00:{net}::2").parse().unwrap() } else { [10, 0, net, 2].into() }
}

#[test]
fn tags_reach_their_services_and_replies_come_from_where_the_client_sent_to() {
    for hook in ["tc", "xdp", "xdp-generic"] {
        for offload in [true, false] {
            let hosts = Hosts::new();
            if !offload {
                hosts.without_offloads();
            }
            for port in [5001, 5002, 5003] {
                service(&hosts.host, port);
            }
            let attached = Attached::new(&hosts.host, &[&ANCESTOR[..], &["--hook", hook]].concat());
            for six in [false, true] {
                let socket = client(&hosts.client, (host_address(1, six), 5000));
                for (tag, length, port) in
                    [("600", 290, 5001), ("601", 294, 5002), ("602", 292, 5003), ("600", 294, 5001)]
                {
                    // What is not valid comes first, so that an answer to it would show.
                    for (tag, length) in [("600", 289), ("600", 295), ("603", 290), ("60", 290)] {
                        socket.send(&payload(tag, length)).unwrap();
                    }
                    let got = ask(&socket, &payload(tag, length));
                    assert_eq!(got, port, "{tag} by {hook}, offload {offload}, IPv6 {six}");
                }
            }
            let shown = attached.show();
            let packets = |index: usize| shown["routes"][index]["packets"].as_u64().unwrap();
            assert_eq!([packets(0), packets(1), packets(2)], [4, 2, 2], "{shown}");
            assert_eq!(shown["dropped"]["wrong_length"], 16, "{shown}");
            assert_eq!(shown["dropped"]["no_route"], 16, "{shown}");
            assert_eq!(shown["replies"], 8, "{shown}");
            assert_eq!(shown["flows"]["new"], 6, "{shown}");
            assert_eq!((&shown["hook"], &shown["port"]), (&hook.into(), &5000.into()));
        }
    }
}

/// Takes what arrives on an interface as it is on the wire.
fn capture(host: &Namespace, interface: &str) -> OwnedFd {
    let index = host.index(interface).unwrap();
    host.enter(|| {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: makes a socket, which is owned from here on.
        let socket =
            unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, all.into())) };
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index as i32;
        // SAFETY: the address has the size that is given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        socket2::SockRef::from(&socket).set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    })
}

/// The next datagram for a port in a capture.
fn captured(from: &OwnedFd, port: u16) -> Vec<u8> {
    loop {
        let mut frame = vec![0; 2048];
        let length = nix::unistd::read(from, &mut frame).unwrap();
        frame.truncate(length);
        if Datagram::parse(frame.as_slice()).is_ok_and(|datagram| datagram.udp.destination_port == port) {
            return frame;
        }
    }
}

#[test]
fn checksums_are_right_on_the_wire_behind_a_second_link() {
    for client_offloads in [true, false] {
        let hosts = Hosts::new();
        let server = Namespace::new().unwrap();
        hosts.host.join("eth1", &server, "eth0").unwrap();
        for (host, interface, last) in [(&hosts.host, "eth1", 1), (&server, "eth0", 2)] {
            host.address(interface, IpAddr::from([10, 0, 2, last]), 24).unwrap();
            host.address(interface, format!("fd00:2::{last}").parse::<IpAddr>().unwrap(), 64).unwrap();
        }
        for family in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            hosts.host.enter(|| std::fs::write(format!("/proc/sys/net/{family}"), "1")).unwrap();
        }
        ip(&hosts.client, &["route", "add", "10.0.2.0/24", "via", "10.0.1.2"]);
        ip(&hosts.client, &["-6", "route", "add", "fd00:2::/64", "via", "fd00:1::2"]);
        ip(&server, &["route", "add", "default", "via", "10.0.2.1"]);
        ip(&server, &["-6", "route", "add", "default", "via", "fd00:2::1"]);
        offloads(&hosts.client, "eth0", client_offloads);
        offloads(&hosts.host, "eth1", false);
        service(&server, 5001);
        let attached = Attached::new(&hosts.host, &ANCESTOR);
        assert!(attached.said.contains("by tc"), "{}", attached.said);
        let wire = capture(&server, "eth0");
        for to in [host_address(2, false), host_address(2, true)] {
            let socket = client(&hosts.client, (to, 5000));
            for length in 290..=294 {
                assert_eq!(ask(&socket, &payload("600", length)), 5001);
                let mut frame = captured(&wire, 5001);
                let datagram = Datagram::parse(frame.as_slice()).unwrap();
                let at = datagram.udp.header + 6;
                let carried = u16::from_be_bytes([frame[at], frame[at + 1]]);
                frame[at..at + 2].fill(0);
                let right = checksum::compute(frame.as_slice(), &datagram.ip).unwrap();
                assert_eq!(carried, if right == 0 { 0xffff } else { right }, "to {to}, {length} bytes");
            }
        }
    }
}

#[test]
fn the_hook_is_chosen_with_a_reason() {
    let hosts = Hosts::new();
    let attached = Attached::new(&hosts.host, &ANCESTOR);
    assert!(attached.said.contains("by tc: it is virtual (veth)"), "{}", attached.said);
    drop(attached);
    let attached = Attached::new(&hosts.host, &[&ANCESTOR[..], &["--hook", "xdp"]].concat());
    assert!(attached.said.contains("by xdp: --hook xdp says so"), "{}", attached.said);
}

#[test]
fn routes_change_live_and_the_rest_is_passed_dropped_or_sent_on() {
    let hosts = Hosts::new();
    for port in [5000, 5001, 5002, 5009] {
        service(&hosts.host, port);
    }
    let socket = client(&hosts.client, (host_address(1, false), 5000));
    let attached = Attached::new(&hosts.host, &["--port", "5000", "--route", "@0:a=5001"]);
    assert_eq!(ask(&socket, b"a"), 5001);
    // A stream that never stops while routes change, twice for each table.
    let to = (host_address(1, false), 5000);
    let busy = client(&hosts.client, to);
    let sender = thread::spawn(move || {
        let mut ports = vec![];
        for _ in 0..4000 {
            ports.push(ask(&busy, b"a"));
        }
        ports
    });
    for round in 0..6 {
        let port = if round % 2 == 0 { "@0:a=5002" } else { "@0:a=5001" };
        let said =
            mux(&hosts.host, &["attach", "eth0", "--port", "5000", "--route", port, "--route", "@5:zz=5001"]);
        assert!(said.contains("by 2 routes"), "{said}");
    }
    let ports = sender.join().unwrap();
    assert!(
        ports.iter().all(|port| [5001, 5002].contains(port)),
        "a datagram met no route while routes changed"
    );
    assert_eq!(attached.show()["routes"][0]["packets"], 4001, "a counter was lost while routes changed");
    for (default, port) in [("pass", 5000), ("5009", 5009)] {
        let arguments = ["attach", "eth0", "--port", "5000", "--route", "@0:a=5001", "--default", default];
        mux(&hosts.host, &arguments);
        assert_eq!(ask(&socket, b"b"), port);
        assert_eq!(ask(&socket, b"a"), 5001);
    }
    drop(attached);
    assert_eq!(ask(&socket, b"a"), 5000, "detached, and still rewritten");
}

#[test]
fn a_service_that_is_not_there_is_reported_for_the_port_that_was_spoken_to() {
    let hosts = Hosts::new();
    let attached = Attached::new(&hosts.host, &["--port", "5000", "--route", "@0:a=5001"]);
    for six in [false, true] {
        let socket = client(&hosts.client, (host_address(1, six), 5000));
        socket.send(b"a").unwrap();
        let error = socket.recv(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "IPv6: {six}");
    }
    assert_eq!(attached.show()["errors"], 2);
}

#[test]
fn flows_are_bounded_and_the_least_recently_used_makes_room() {
    let hosts = Hosts::new();
    service(&hosts.host, 5001);
    let attached = Attached::new(&hosts.host, &["--port", "5000", "--route", "@0:a=5001", "--flows", "256"]);
    for _ in 0..1000 {
        let socket = client(&hosts.client, (host_address(1, false), 5000));
        assert_eq!(ask(&socket, b"a"), 5001);
    }
    let flows = &attached.show()["flows"];
    assert_eq!((&flows["room"], &flows["lost"]), (&256.into(), &0.into()));
    // A port may come again while it is still known.
    assert!((900..=1000).contains(&flows["new"].as_u64().unwrap()), "{flows}");
    assert!(flows["known"].as_u64().unwrap() <= 256, "{flows}");
    let said =
        mux(&hosts.host, &["attach", "eth0", "--port", "5000", "--route", "@0:a=5001", "--flows", "512"]);
    assert!(said.contains("--flows") && said.contains("256"), "{said}");
}

#[test]
fn fragments_are_routed_by_their_first_and_reassembled() {
    let hosts = Hosts::new();
    service(&hosts.host, 5001);
    let attached =
        Attached::new(&hosts.host, &["--port", "5000", "--route", "@20:600=5001", "--length", "..=9000"]);
    for six in [false, true] {
        let socket = client(&hosts.client, (host_address(1, six), 5000));
        assert_eq!(ask(&socket, &payload("600", 8000)), 5001, "IPv6: {six}");
    }
    assert_eq!(attached.show()["routes"][0]["packets"], 2);
}

/// Three datagrams with a tag each, sent in one: the kernel cuts them apart behind TC, unless
/// the sender's interface does not take such packets.
#[test]
fn datagrams_sent_in_one_are_dropped_and_counted_or_cut_apart_before() {
    let hosts = Hosts::new();
    for port in [5001, 5002, 5003] {
        service(&hosts.host, port);
    }
    let attached = Attached::new(&hosts.host, &[&ANCESTOR[..], &["--hook", "tc"]].concat());
    let all = ["600", "601", "602"].map(|tag| payload(tag, 290)).concat();
    for six in [false, true] {
        for (segmentation, dropped, answers) in [("on", 1, 0), ("off", 0, 3)] {
            let said = output(
                &hosts.client,
                Command::new("ethtool").args(["-K", "eth0", "tx-udp-segmentation", segmentation]),
            );
            assert!(!said.contains("Cannot"), "{said}");
            let before = attached.show()["dropped"]["segmented"].as_u64().unwrap();
            let socket = client(&hosts.client, (host_address(1, six), 5000));
            setsockopt(&socket, UdpGsoSegment, &290).unwrap();
            socket.send(&all).unwrap();
            let mut ports: Vec<u16> = (0..answers).map(|_| answer(&socket, None)).collect();
            ports.sort_unstable();
            assert_eq!(ports, [5001, 5002, 5003][..answers]);
            let counted = || attached.show()["dropped"]["segmented"].as_u64().unwrap() - before;
            eventually("it is counted", || counted() == dropped);
        }
    }
}

fn unbound(host: &Namespace, port: u16, name: &str, answer: &str) -> (Daemon, Folder) {
    let folder = Folder::new(name);
    let text = format!(
        "server:\n interface: 10.0.1.2@{port}\n do-daemonize: no\n use-syslog: no\n chroot: \"\"\n username: \"\"\n \
         pidfile: \"\"\n directory: \"{}\"\n access-control: 0.0.0.0/0 allow\n module-config: \"iterator\"\n \
         local-zone: \"{name}.\" static\n local-data: \"{name}. A {answer}\"\nremote-control:\n control-enable: no\n",
        folder.path("")
    );
    let configuration = folder.write("unbound.conf", &text);
    let daemon = Daemon::start(host, Command::new("unbound").args(["-d", "-c", &configuration]));
    daemon.line("start of service");
    (daemon, folder)
}

#[test]
fn real_name_servers_share_one_port_by_the_name_that_is_asked_for() {
    let hosts = Hosts::new();
    let _one = unbound(&hosts.host, 5301, "one.example", "192.0.2.1");
    let _two = unbound(&hosts.host, 5302, "two.example", "192.0.2.2");
    // The question starts at byte 12: a length, then the first label.
    let routes = ["--port", "53", "--route", "@12:0x036f6e65=5301", "--route", "@12:0x0374776f=5302"];
    let _attached = Attached::new(&hosts.host, &routes);
    for (name, answer) in [("one.example", "192.0.2.1\n"), ("two.example", "192.0.2.2\n")] {
        let mut dig = Command::new("dig");
        dig.args(["@10.0.1.2", name, "+short", "+tries=1", "+timeout=10"]);
        assert_eq!(output(&hosts.client, &mut dig), answer);
    }
    let mut dig = Command::new("dig");
    dig.args(["@10.0.1.2", "six.example", "+short", "+tries=1", "+timeout=1"]);
    assert!(output(&hosts.client, &mut dig).contains("timed out"));
}

#[test]
fn wrong_attachments_are_refused_with_the_reason() {
    let host = Namespace::new().unwrap();
    let routes = ["--port", "5000", "--route", "@0:a=1"];
    for (arguments, reason) in [
        (
            &["attach", "nowhere0", "--port", "5000", "--route", "@0:a=1"][..],
            "there is no interface \"nowhere0\"",
        ),
        (&["attach", "lo", "--port", "0", "--route", "@0:a=1"], "'0' is no port"),
        (&["attach", "lo", "--port", "5000"], "--route"),
        (&["attach", "lo", "--port", "1", "--route", "tls=2"], "--route 'tls=2'"),
        (&["attach", "lo", "--port", "1", "--route", "@0:a=2", "--route", "@0:a=3"], "contradicts"),
        (&["attach", "lo", "--port", "1", "--route", "@0:a=2", "--length", "0"], "bytes end at 1"),
        (&["attach", "lo", "--port", "1", "--route", "@0:a=2", "--default", "reject"], "'drop' or 'pass'"),
        (&["detach", "lo"], "mux is not attached to 'lo'"),
    ] {
        let output = host.enter(|| underpass().arg("mux").args(arguments).output()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
    let output = host.enter(|| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--bounding-set", "-all", "--inh-caps", "-all", env!("CARGO_BIN_EXE_underpass")]);
        setpriv.args(["mux", "attach", "lo"]).args(routes).output()
    });
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
}

#[test]
fn status_lists_it_and_down_removes_it() {
    let host = Namespace::new().unwrap();
    // A bpffs of its own: `down` removes what other tests have attached, too.
    let script = "mount -t bpf bpf /sys/fs/bpf && $0 mux attach lo --port 5000 --route @0:a=5001 && $0 status \
                  && $0 down && $0 status && $0 mux show && ls /sys/fs/bpf && tc qdisc show dev lo";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_underpass")]);
    let said = output(&host, &mut command);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].starts_with("lo: port 5000 goes by 1 routes, by tc"), "{said}");
    assert!(lines[1].starts_with("mux") && lines[1].contains("lo"), "{said}");
    assert_eq!(
        &lines[2..5],
        ["mux lo: detached from tc", "nothing is attached, nothing runs", "mux is attached to no interface"]
    );
    assert!(!said.contains("clsact"), "{said}");
}

#[test]
fn a_sender_on_the_same_host_is_served_by_the_loopback() {
    let host = Namespace::new().unwrap();
    service(&host, 5001);
    let said = mux(&host, &["attach", "lo", "--port", "5000", "--route", "@0:a=5001"]);
    assert!(said.contains("by tc"), "{said}");
    for to in [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16])] {
        assert_eq!(ask(&client(&host, (to, 5000)), b"a"), 5001);
    }
    eventually("it is detached", || mux(&host, &["detach", "lo"]).contains("no longer"));
}
