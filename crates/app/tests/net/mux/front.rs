//! What relay and `mux listen` do around a connection: the PROXY protocol, with haproxy before
//! and nginx behind it, who is let in, how many, and what `mux show` tells.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use underpass::lab::Namespace;

use super::{Folder, host, listen, output, service};
use crate::kit::{Daemon, accept, connect, eventually, expect_end, fields, underpass};

/// What stands behind: it answers with who it was told the client is.
fn nginx(host: &Namespace, folder: &Folder) -> Daemon {
    let text = format!(
        "daemon off; master_process off; pid {}; error_log stderr notice; events {{}}\n\
         http {{ access_log off; server {{ listen 127.0.0.1:8080 proxy_protocol; \
         return 200 '$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port\\n'; }} }}\n",
        folder.path("nginx.pid"),
    );
    let configuration = folder.write("nginx.conf", &text);
    let daemon = Daemon::start(host, Command::new("nginx").args(["-c", &configuration, "-e", "stderr"]));
    eventually("nginx listens", || host.enter(|| TcpStream::connect("127.0.0.1:8080")).is_ok());
    daemon
}

/// What stands before: port 9001 sends headers of version 1, port 9002 of version 2.
fn haproxy(host: &Namespace, folder: &Folder, to: SocketAddr) -> Daemon {
    let listen = |port: u16, send: &str| {
        format!("listen to{port}\n    bind 127.0.0.1:{port}\n    server under {to} {send}\n")
    };
    let text = format!(
        "defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 1m\n    timeout server 1m\n{}{}",
        listen(9001, "send-proxy"),
        listen(9002, "send-proxy-v2"),
    );
    let configuration = folder.write("haproxy.conf", &text);
    let daemon = Daemon::start(host, Command::new("haproxy").args(["-db", "-q", "-f", &configuration]));
    eventually("haproxy listens", || host.enter(|| TcpStream::connect("127.0.0.1:9002")).is_ok());
    daemon
}

/// Asks over HTTP; the answer, and the port that it was asked from.
fn ask(host: &Namespace, port: u16) -> (String, String) {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "20", "--noproxy", "*", "-w", "%{local_port}"]);
    let said = output(host, curl.arg(format!("http://127.0.0.1:{port}/")));
    let (answer, from) = said.split_once('\n').unwrap_or_else(|| panic!("curl said {said}"));
    (answer.to_owned(), from.to_owned())
}

/// A relay or a multiplexer before nginx.
fn forwarder(host: &Namespace, function: &str, more: &[&str]) -> (Daemon, SocketAddr) {
    if function == "mux" {
        return listen(host, &[&["--route", "http=127.0.0.1:8080"], more].concat());
    }
    let to = if function == "relay by name" { "localhost:8080" } else { "127.0.0.1:8080" };
    let relay = ["relay", "--listen", "127.0.0.1:0", "--to", to, "--log-connections"];
    let daemon = Daemon::start(host, underpass().args(relay).args(more));
    let address = fields(&daemon.line("ready"))["listen"].parse().unwrap();
    (daemon, address)
}

#[test]
fn who_the_client_is_goes_from_haproxy_to_nginx() {
    for function in ["relay", "relay by name", "mux"] {
        for version in ["v1", "v2"] {
            let (host, folder) = (host(), Folder::new(&format!("front-{version}-{}", function.len())));
            let _nginx = nginx(&host, &folder);
            // By our own knowledge.
            let (_daemon, to) = forwarder(&host, function, &["--proxy-protocol", version]);
            let (answer, from) = ask(&host, to.port());
            assert_eq!(answer, format!("127.0.0.1 {from} {}", to.port()), "{function} {version}");
            // By haproxy's.
            let both = ["--accept-proxy-protocol", "--proxy-protocol", version];
            let (daemon, to) = forwarder(&host, function, &both);
            let _haproxy = haproxy(&host, &folder, to);
            for port in [9001, 9002] {
                let (answer, from) = ask(&host, port);
                assert_eq!(answer, format!("127.0.0.1 {from} {port}"), "{function} {version}");
                daemon.line(&format!("client=127.0.0.1:{from}"));
            }
        }
    }
}

#[test]
fn a_client_without_the_header_is_turned_away() {
    let host = host();
    let at = service(&host, "http").to_string();
    let accept = ["--accept-proxy-protocol", "--connect-timeout", "500ms"];
    let (relay, _) = forwarder(&host, "relay", &accept);
    let arguments = ["--route", &format!("http={at}"), "--peek-timeout", "500ms", "--accept-proxy-protocol"];
    let (mux, _) = listen(&host, &arguments);
    let frames = ["--per", "message", "--frame", "fixed:9", "--route", &format!("@0:a={at}")];
    let (messages, _) = listen(&host, &[&frames[..], &accept].concat());
    for daemon in [&relay, &mux, &messages] {
        let to = fields(&daemon.line("ready"))["listen"].parse().unwrap();
        let mut wrong = connect(&host, to).unwrap();
        wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // The end or a reset, as something is unread.
        assert!(!matches!(wrong.read(&mut [0]), Ok(1..)));
        daemon.line("sent no PROXY protocol header");
        let mut slow = connect(&host, to).unwrap();
        slow.write_all(b"PROXY TCP4 192.0.2.1").unwrap();
        assert!(!matches!(slow.read(&mut [0]), Ok(1..)));
    }
}

#[test]
fn messages_carry_the_header_before_them() {
    let host = host();
    let backend = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let route = format!("@0:a={}", backend.local_addr().unwrap());
    let frames = ["--per", "message", "--frame", "fixed:3", "--route", &route];
    for when_full in ["wait", "drop"] {
        let more = ["--accept-proxy-protocol", "--proxy-protocol", "v1", "--when-full", when_full];
        let (_mux, to) = listen(&host, &[&frames[..], &more].concat());
        let mut client = connect(&host, to).unwrap();
        // Byte by byte as far as the middle of the first message.
        let header = b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 443\r\n";
        for byte in header.iter().chain(b"a") {
            client.write_all(&[*byte]).unwrap();
        }
        client.write_all(b"bcaBC").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = vec![];
        accept(&backend).read_to_end(&mut got).unwrap();
        assert_eq!(
            got.escape_ascii().to_string(),
            [&header[..], b"abcaBC"].concat().escape_ascii().to_string()
        );
    }
}

#[test]
fn only_some_are_let_in_and_only_so_many() {
    let host = host();
    for function in ["relay", "mux"] {
        let (daemon, to) = forwarder(&host, function, &["--allow", "192.0.2.0/24", "--allow", "2001:db8::1"]);
        expect_end(&connect(&host, to).unwrap());
        daemon.line("127.0.0.1 is in no network of --allow");
        let backend = host.enter(|| TcpListener::bind("127.0.0.1:8080")).unwrap();
        let (daemon, to) = forwarder(&host, function, &["--allow", "127.0.0.0/8", "--max-connections", "1"]);
        let mut first = connect(&host, to).unwrap();
        first.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let served = accept(&backend);
        expect_end(&connect(&host, to).unwrap());
        daemon.line("1 connections are open, as many as --max-connections allows");
        drop((first, served));
        daemon.line("connection client=");
        let mut again = connect(&host, to).unwrap();
        again.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        accept(&backend);
    }
}

fn show(host: &Namespace) -> Value {
    let shown = output(host, underpass().args(["mux", "show", "--json"]));
    serde_json::from_str(&shown).unwrap_or_else(|e| panic!("{e}: {shown}"))
}

#[test]
fn show_tells_connections_and_messages_by_route_and_reason() {
    let host = host();
    let (ssh, default) = (service(&host, "ssh").to_string(), service(&host, "default").to_string());
    let (_mux, to) = listen(&host, &["--route", &format!("ssh={ssh}"), "--default", &default]);
    for first in ["SSH-2.0-x\r\n", "GET / HTTP/1.1\r\n\r\n", "GET /"] {
        let mut client = connect(&host, to).unwrap();
        client.write_all(first.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        client.read_to_end(&mut vec![]).unwrap();
    }
    eventually("all is counted", || show(&host)["listening"][0]["counts"]["finished"] == 3);
    let shown = &show(&host)["listening"][0];
    assert_eq!(shown["listen"], to.to_string());
    assert_eq!(shown["routes"][0], serde_json::json!({"match": "ssh", "to": ssh, "connections": 1}));
    assert_eq!(shown["routes"][1], serde_json::json!({"match": "default", "to": default, "connections": 2}));
    assert_eq!([&shown["no_route"], &shown["silent"], &shown["left"]], [0, 0, 0]);
    let said = output(&host, underpass().args(["mux", "show"]));
    assert!(said.contains(&format!("{to} by connection: pid")), "{said}");
    assert!(said.lines().any(|line| line.contains("ssh") && line.ends_with(" 1")), "{said}");
}

#[test]
fn show_tells_of_messages_while_they_flow() {
    let host = host();
    let backend = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let route = format!("@0:a={}", backend.local_addr().unwrap());
    let (_mux, to) = listen(&host, &["--per", "message", "--frame", "fixed:3", "--route", &route]);
    let mut client = connect(&host, to).unwrap();
    client.write_all(b"abcxyzabc").unwrap();
    let mut got = [0; 6];
    accept(&backend).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abcabc");
    eventually("both are counted, and what was dropped", || {
        let shown = &show(&host)["listening"][0];
        shown["routes"][0]["messages"] == 2 && shown["messages"]["dropped_no_route"] == 1
    });
}

#[test]
fn garbage_goes_to_the_default_and_takes_no_memory() {
    let host = host();
    let default = service(&host, "default").to_string();
    let routes = ["sni:a.example", "alpn:h2", "ssh", "http-host:a.example"]
        .map(|it| format!("--route={it}={default}"));
    let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
    let (mux, to) = listen(&host, &[&routes[..], &["--default", &default]].concat());
    let mut random = fastrand::Rng::with_seed(11);
    let before = mux.memory();
    let clients: Vec<_> = (0..200)
        .map(|i| {
            let mut garbage: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(100_000).collect();
            // Some of it begins as something would.
            let beginnings: [&[u8]; 5] =
                [b"", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x40\x00\x01\x00\xff\xff", b"GET ", b"SSH"];
            let beginning = beginnings[i % 5];
            garbage[..beginning.len()].copy_from_slice(beginning);
            let mut client = connect(&host, to).unwrap();
            thread::spawn(move || {
                // The service counts bytes; a reset would lose some.
                client.write_all(&garbage).unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = vec![];
                client.read_to_end(&mut answer).unwrap();
                assert!(answer == [b"default:", &garbage[..]].concat(), "garbage was changed");
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert!(mux.memory() < before + (32 << 20), "20 MB of garbage took more than 32 MiB");
    thread::sleep(Duration::from_millis(50));
    eventually("nothing is left of it", || show(&host)["listening"][0]["counts"]["open"] == 0);
}
