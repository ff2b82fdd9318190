//! TCP by connection, with real servers and clients, and with hostile ones.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use underpass::lab::Namespace;

use super::{Folder, host, listen, output, service};
use crate::kit::{Daemon, PATIENCE, connect, eventually, expect_end};

/// Says something in pieces, finishes, and returns what came back.
fn ask(host: &Namespace, to: SocketAddr, pieces: &[&[u8]]) -> String {
    let mut stream = connect(host, to).unwrap();
    for piece in pieces {
        stream.write_all(piece).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// Names and what each said, as a service gives it back.
fn said(name: &str, pieces: &[&[u8]]) -> String {
    String::from_utf8_lossy(&[name.as_bytes(), b":", &pieces.concat()].concat()).into_owned()
}

fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &prefixed(value)].concat()
}

/// A ClientHello as a browser with a post-quantum key share sends it, with padding
/// before the server's name.
fn hello(name: &str, alpn: &str, padding: usize, record: usize) -> Vec<u8> {
    let mut extensions = extension(0x0033, &[0x5a; 1216]);
    extensions.extend(extension(21, &vec![0; padding]));
    extensions.extend(extension(0, &prefixed(&[&[0][..], &prefixed(name.as_bytes())].concat())));
    extensions.extend(extension(16, &prefixed(&[&[alpn.len() as u8], alpn.as_bytes()].concat())));
    let mut body = [&[3, 3][..], &[7; 32], &[32], &[9; 32]].concat();
    body.extend(prefixed(&[0x13, 1, 0x13, 2]));
    body.extend([1, 0]);
    body.extend(prefixed(&extensions));
    let handshake = [&[1, 0][..], &prefixed(&body)].concat();
    handshake.chunks(record).flat_map(|part| [&[22, 3, 1][..], &prefixed(part)].concat()).collect()
}

/// What a real client sends first, started with where to connect to.
fn captured_hello(host: &Namespace, client: impl FnOnce(u16) -> Command) -> Vec<u8> {
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let mut client = client(listener.local_addr().unwrap().port());
    let client = client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut client = host.spawn(client).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut header = [0; 5];
    stream.read_exact(&mut header).unwrap();
    let mut record = vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))];
    stream.read_exact(&mut record).unwrap();
    drop((stream, listener));
    client.wait().unwrap();
    [&header[..], &record].concat()
}

fn s_client(name: &str, port: u16) -> Command {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-servername", name]);
    command.args(["-alpn", "h2,http/1.1"]);
    command
}

/// A browser that prints a page of a name in `.example`, all of which are this host.
fn browser(folder: &Folder, name: &str, port: u16) -> Command {
    let mut command = Command::new("chromium");
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]);
    command.args(["--host-resolver-rules=MAP *.example 127.0.0.1", "--ignore-certificate-errors"]);
    command.args([&format!("--user-data-dir={}", folder.path("browser")), "--dump-dom"]);
    command.arg(format!("https://{name}:{port}/"));
    command
}

#[test]
fn every_match_reaches_its_service_and_near_misses_go_to_the_default() {
    let host = host();
    let names = ["exact", "wild", "alpn", "tls", "ssh", "vhost", "http", "bytes", "hex", "default"];
    let at: Vec<String> = names.iter().map(|name| service(&host, name).to_string()).collect();
    let matches = [
        "sni:www.example.org",
        "sni:*.example.net",
        "alpn:acme-tls/1",
        "tls",
        "ssh",
        "http-host:a.example",
        "http",
        "@4:magic",
        "@0:0x00ff",
    ];
    let routes: Vec<String> =
        matches.iter().zip(&at).flat_map(|(route, at)| ["--route".into(), format!("{route}={at}")]).collect();
    let mut arguments: Vec<&str> = routes.iter().map(String::as_str).collect();
    arguments.extend(["--default", &at[9]]);
    let (_mux, to) = listen(&host, &arguments);
    for (first, name) in [
        (hello("www.example.org", "h2", 0, 16384), "exact"),
        (hello("WWW.example.org", "h2", 0, 100), "exact"),
        (hello("a.b.example.net", "h2", 0, 16384), "wild"),
        (hello("example.net", "h2", 0, 16384), "tls"),
        (hello("other.example.org", "acme-tls/1", 0, 16384), "alpn"),
        (hello("www.example.org", "acme-tls/1", 0, 1), "exact"),
        (hello("x", "acme-tls/11", 0, 16384), "tls"),
        (b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(), "ssh"),
        (b"SSX-2.0".to_vec(), "default"),
        (b"GET / HTTP/1.1\r\nHost: A.example:80\r\n\r\n".to_vec(), "vhost"),
        (b"GET / HTTP/1.1\r\nHost: b.a.example\r\n\r\n".to_vec(), "http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), "http"),
        (b"EHLO a.example\r\n".to_vec(), "default"),
        (b"1234magic".to_vec(), "bytes"),
        (b"1234magix".to_vec(), "default"),
        (b"\x00\xff".to_vec(), "hex"),
        (b"\x00\xfe".to_vec(), "default"),
    ] {
        assert_eq!(ask(&host, to, &[&first]), said(name, &[&first]), "{}", String::from_utf8_lossy(&first));
    }
}

/// What sslh's sample configuration and haproxy's manual tell apart, in their order.
#[test]
fn documented_cases_of_sslh_and_haproxy_reach_their_services() {
    let host = host();
    let at = |name| service(&host, name).to_string();
    let routes: Vec<String> = [
        ("ssh", "ssh"),
        ("http", "http"),
        ("sni:im.example.net", "im"),                 // sslh: sni_hostnames
        ("alpn:xmpp-client", "xmpp over tls"),        // sslh: alpn_protocols
        ("alpn:acme-tls/1", "acme"),                  // haproxy: req.ssl_alpn acme-tls/1
        ("sni:*.acme.invalid", "letsencrypt"),        // sslh: "*.*.acme.invalid"
        ("tls", "tls"),                               // haproxy: req.ssl_hello_type 1
        ("@2:0x38", "openvpn"),                       // sslh: "^\x00[\x0D-\xFF]\x38"
        ("@0:<?xml", "xmpp"),                         // sslh: "jabber"
        ("@0:0x0300", "rdp"),                         // haproxy: req.rdp_cookie
        ("@0:0x0d0a0d0a000d0a515549540a", "proxied"), // haproxy: PROXY protocol, version 2
    ]
    .map(|(route, name)| format!("--route={route}={}", at(name)))
    .into();
    let default = at("timeout");
    let mut arguments: Vec<&str> = routes.iter().map(String::as_str).collect();
    arguments.extend(["--default", &default, "--peek-timeout", "300ms"]);
    let (_mux, to) = listen(&host, &arguments);
    let openvpn = b"\x00\x2a\x38\x9d\x11\x02\x03\x04\x05\x06\x07\x08";
    for (first, name) in [
        (b"SSH-2.0-PuTTY_Release_0.78\r\n".to_vec(), "ssh"),
        (b"SSH-1.99-x\n".to_vec(), "ssh"),
        (b"OPTIONS * HTTP/1.0\r\n\r\n".to_vec(), "http"),
        (hello("im.example.net", "xmpp-client", 0, 16384), "im"),
        (hello("other.example.net", "xmpp-client", 0, 16384), "xmpp over tls"),
        (hello("other.example.net", "acme-tls/1", 0, 16384), "acme"),
        (hello("a.b.acme.invalid", "h2", 0, 16384), "letsencrypt"),
        (hello("other.example.net", "h2", 0, 16384), "tls"),
        (openvpn.to_vec(), "openvpn"),
        (b"<?xml version='1.0'?><stream:stream xmlns='jabber:client'>".to_vec(), "xmpp"),
        (b"\x03\x00\x00\x2b\x26\xe0Cookie: mstshash=user\r\n".to_vec(), "rdp"),
        (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c".to_vec(), "proxied"),
        (b"something else".to_vec(), "timeout"),
        (vec![], "timeout"), // sslh: on-timeout; haproxy: inspect-delay
    ] {
        let mut stream = connect(&host, to).unwrap();
        stream.write_all(&first).unwrap();
        if first.is_empty() {
            std::thread::sleep(Duration::from_millis(600));
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), said(name, &[&first]));
    }
}

#[test]
fn a_client_hello_cut_at_every_byte_reaches_its_service() {
    let (host, folder) = (host(), Folder::new("mux-hello"));
    let (right, wrong) = (service(&host, "right").to_string(), service(&host, "wrong").to_string());
    let route = format!("sni:www.example={right}");
    let (_mux, to) = listen(&host, &["--route", &route, "--default", &wrong]);
    let openssl = captured_hello(&host, |port| s_client("www.example", port));
    let chromium = captured_hello(&host, |port| browser(&folder, "www.example", port));
    assert!(chromium.len() > 1500, "a key share of ML-KEM-768 alone has 1184 bytes: {}", chromium.len());
    for hello in [openssl, chromium, hello("www.example", "h2", 0, 500)] {
        for at in 1..hello.len() {
            let pieces = hello.split_at(at);
            let pieces = [pieces.0, pieces.1];
            assert_eq!(ask(&host, to, &pieces), said("right", &pieces), "cut at {at}");
        }
        let bytes: Vec<&[u8]> = hello.chunks(1).collect();
        assert_eq!(ask(&host, to, &bytes), said("right", &bytes));
    }
}

#[test]
fn a_hello_that_is_too_long_goes_by_what_has_come() {
    let host = host();
    let (tls, default) = (service(&host, "tls").to_string(), service(&host, "default").to_string());
    let routes = ["--route", &format!("sni:www.example.org={default}"), "--route", &format!("tls={tls}")];
    let (_mux, to) = listen(&host, &routes);
    let hello = hello("www.example.org", "h2", 60_000, 16_384);
    assert!(hello.len() > 60_000);
    assert_eq!(ask(&host, to, &[&hello]), said("tls", &[&hello]));
}

#[test]
fn a_silent_client_goes_to_the_default_and_without_one_is_closed() {
    let host = host();
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let default = listener.local_addr().unwrap().to_string();
    let route = format!("ssh={default}");
    let (_mux, to) = listen(&host, &["--route", &route, "--default", &default, "--peek-timeout", "200ms"]);
    let mut client = connect(&host, to).unwrap();
    let begun = Instant::now();
    let (mut server, _) = listener.accept().unwrap();
    assert!(
        begun.elapsed() > Duration::from_millis(100),
        "the server was reached before the client was silent"
    );
    server.write_all(b"220 hello\r\n").unwrap();
    let mut greeting = [0; 11];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 hello\r\n");

    let (_mux, to) = listen(&host, &["--route", &route, "--peek-timeout", "200ms"]);
    expect_end(&connect(&host, to).unwrap());
}

#[test]
fn a_trickle_is_cut_off_and_disturbs_nobody() {
    let host = host();
    let at = service(&host, "tls").to_string();
    let route = format!("sni:www.example.org={at}");
    let (mux, to) = listen(&host, &["--route", &route, "--peek-timeout", "1s"]);
    let hello = hello("www.example.org", "h2", 0, 16384);
    let mut slow = connect(&host, to).unwrap();
    let begun = Instant::now();
    let mut cut_off = false;
    for byte in hello.chunks(1) {
        std::thread::sleep(Duration::from_millis(20));
        if slow.write_all(byte).is_err() {
            cut_off = true;
            break;
        }
        if begun.elapsed() < Duration::from_millis(800) {
            assert_eq!(ask(&host, to, &[&hello]), said("tls", &[&hello]));
        }
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(cut_off, "a trickle was waited for beyond the peek timeout");
    mux.line("no route takes it");
}

#[test]
fn the_number_of_undecided_connections_is_bounded() {
    let host = host();
    let at = service(&host, "ssh").to_string();
    let route = format!("ssh={at}");
    let (mux, to) = listen(&host, &["--route", &route, "--max-undecided", "50", "--peek-timeout", "30s"]);
    let before = mux.memory();
    let waiting: Vec<TcpStream> = (0..50).map(|_| connect(&host, to).unwrap()).collect();
    for mut stream in &waiting {
        stream.write_all(b"S").unwrap();
    }
    // What comes on top is closed at once, as there is nothing to decide by.
    eventually("one more is closed at once", || {
        let stream = connect(&host, to).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        matches!((&stream).read(&mut [0]), Ok(0))
    });
    assert!(mux.memory() < before + (4 << 20), "50 undecided connections took megabytes");
    for (index, mut stream) in waiting.iter().enumerate() {
        stream.write_all(b"SH-2.0").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "ssh:SSH-2.0", "number {index}");
    }
}

#[test]
fn a_client_that_leaves_early_and_a_target_that_is_not_there_are_counted() {
    let host = host();
    let (mut mux, to) =
        listen(&host, &["--route", "ssh=127.0.0.1:1", "--route", "http=no-such-host.invalid:1"]);
    drop(connect(&host, to).unwrap());
    let mut client = connect(&host, to).unwrap();
    client.write_all(b"SSH-2.0\r\n").unwrap();
    let end = client.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    let mut client = connect(&host, to).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let end = client.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    mux.line("no-such-host.invalid");
    mux.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(mux.wait().success());
    assert!(mux.line("decisions").contains("left=1"));
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn certificate(folder: &Folder, name: &str) {
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args([
            "-days",
            "2",
            "-subj",
            &format!("/CN={name}"),
            "-addext",
            &format!("subjectAltName=DNS:{name}"),
        ])
        .args([
            "-keyout",
            &folder.path(&format!("{name}.key")),
            "-out",
            &folder.path(&format!("{name}.crt")),
        ]));
}

fn nginx(host: &Namespace, folder: &Folder) -> Daemon {
    let site = |port: u16, name: &str| {
        format!(
            "server {{ listen 127.0.0.1:{port} ssl http2; server_name {name}; ssl_certificate {0}.crt; \
             ssl_certificate_key {0}.key; location / {{ return 200 'site {name}\\n'; }} }}\n",
            folder.path(name)
        )
    };
    let configuration = folder.write(
        "nginx.conf",
        &format!(
            "daemon off; master_process off; pid {}; error_log stderr notice; events {{}}\n\
             http {{ access_log off; {} {} server {{ listen 127.0.0.1:8080; return 200 'plain $host\\n'; }} }}\n",
            folder.path("nginx.pid"),
            site(8441, "one.example"),
            site(8442, "two.example"),
        ),
    );
    let daemon = Daemon::start(host, Command::new("nginx").args(["-c", &configuration, "-e", "stderr"]));
    eventually("nginx listens", || host.enter(|| TcpStream::connect("127.0.0.1:8080")).is_ok());
    daemon
}

#[test]
fn real_servers_and_clients_share_one_port() {
    let (host, folder) = (host(), Folder::new("mux-servers"));
    certificate(&folder, "one.example");
    certificate(&folder, "two.example");
    let _nginx = nginx(&host, &folder);
    let _sshd = sshd(&host, &folder);
    let (_mux, to) = listen(
        &host,
        &[
            "--route",
            "sni:one.example=127.0.0.1:8441",
            "--route",
            "sni:*.example=127.0.0.1:8442",
            "--route",
            "alpn:h2=127.0.0.1:8442",
            "--route",
            "ssh=127.0.0.1:2222",
            "--route",
            "http=127.0.0.1:8080",
        ],
    );
    let port = to.port();
    let curl = |url: &str, more: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "20", "--noproxy", "*"]).args(more);
        for name in ["one.example", "two.example", "plain.example"] {
            command.args(["--resolve", &format!("{name}:{port}:127.0.0.1")]);
        }
        for name in ["one.example", "two.example"] {
            if url.contains(name) {
                command.args(["--cacert", &folder.path(&format!("{name}.crt"))]);
            }
        }
        output(&host, command.arg(url))
    };
    assert_eq!(curl(&format!("https://one.example:{port}/"), &[]), "site one.example\n");
    assert_eq!(curl(&format!("https://two.example:{port}/"), &["--http1.1"]), "site two.example\n");
    assert_eq!(curl(&format!("http://plain.example:{port}/"), &[]), "plain plain.example\n");
    for name in ["one.example", "two.example"] {
        let page = output(&host, &mut browser(&folder, name, port));
        assert!(page.contains(&format!("site {name}")), "{page}");
    }
    let s_client = |more: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-connect", &to.to_string()]).args(more).stdin(Stdio::null());
        output(&host, &mut command)
    };
    assert!(s_client(&["-servername", "one.example"]).contains("CN = one.example"));
    assert!(s_client(&["-noservername", "-alpn", "h2"]).contains("CN = two.example"));
    assert!(!s_client(&["-noservername"]).contains("CN ="), "no name and no protocol: there is no route");
    let ssh = output(
        &host,
        Command::new("ssh").args(["-i", &folder.path("user"), "-p", &port.to_string()]).args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
            "-o",
            "BatchMode=yes",
            "root@127.0.0.1",
            "echo came through",
        ]),
    );
    assert_eq!(ssh, "came through\n");
}

fn sshd(host: &Namespace, folder: &Folder) -> Daemon {
    for key in ["host", "user"] {
        run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &folder.path(key)]));
    }
    fs::create_dir_all("/run/sshd").unwrap();
    let configuration = folder.write(
        "sshd.conf",
        &format!(
            "ListenAddress 127.0.0.1:2222\nHostKey {}\nAuthorizedKeysFile {}\nPidFile {}\nUsePAM no\n\
             StrictModes no\nPermitRootLogin prohibit-password\n",
            folder.path("host"),
            folder.path("user.pub"),
            folder.path("sshd.pid"),
        ),
    );
    let daemon = Daemon::start(host, Command::new("/usr/sbin/sshd").args(["-D", "-e", "-f", &configuration]));
    eventually("sshd listens", || host.enter(|| TcpStream::connect("127.0.0.1:2222")).is_ok());
    daemon
}
