//! Through SOCKS5 proxies: curl through dante and microsocks, and proxies that misbehave.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
};

use tempfile::TempDir;

use super::{Path, ready};
use crate::kit::{
    Daemon, Family, Hosts, Stream, accept, connect, eventually, expect_end, expect_reset, fields, reset,
    underpass,
};

const USER: &str = "underpass-test";
const SECRET: &str = "k9-Zebra_41";
/// `openssl passwd -6 -salt underpass k9-Zebra_41`
const SHADOW: &str =
    "$6$underpass$lCmgQpEmQuRnVLnRSK1Z3Ytj7skHnCVkKSp6GoEio8x6ejrkJuzGpHtlmU3HKE9OWQJLNKsh9Xqspmu1ZjZ.B.";
/// Only the proxy's host knows this name.
const NAME: &str = "target.underpass.test";

/// A SOCKS5 server on the server's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Dante,
    Microsocks,
}

struct Proxy {
    address: SocketAddr,
    _daemon: Daemon,
    _folder: TempDir,
}

fn write(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

impl Proxy {
    /// Starts a server in a mount namespace of its own, where it knows [`NAME`] and [`USER`].
    fn start(hosts: &Hosts, server: Server, family: Family, login: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ip = Hosts::server_address(family);
        // Another one with each: the one before may still be ending.
        let port = 1080 + u16::from(login);
        let names = format!("127.0.0.1 localhost\n{ip} {NAME}\n");
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let shadow = fs::read_to_string("/etc/shadow").unwrap();
        let mut steps = vec![];
        for (name, text) in [
            ("hosts", names),
            // Nobody to ask: what the file does not know is unknown at once.
            ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n".into()),
            ("passwd", format!("{passwd}{USER}:x:64999:65534::/nonexistent:/bin/false\n")),
            ("shadow", format!("{shadow}{USER}:{SHADOW}:19000:0:99999:7:::\n")),
        ] {
            steps.push(format!("mount --bind {} /etc/{name}", write(&folder, name, &text)));
        }
        steps.push(match server {
            Server::Dante => {
                let method = if login { "username" } else { "none" };
                let config = format!(
                    "logoutput: stderr\ninternal: {ip} port = {port}\nexternal: eth0\nclientmethod: none\n\
                     socksmethod: {method}\nuser.privileged: root\nuser.unprivileged: nobody\n\
                     client pass {{ from: 0/0 to: 0/0 }}\nsocks pass {{ from: 0/0 to: 0/0 }}\n"
                );
                // Below the shell: it becomes another user, and with that loses the signal that
                // ends it when its parent does. The shell keeps it, and takes all along.
                format!(
                    "danted -p {} -f {}; exit $?",
                    write(&folder, "pid", ""),
                    write(&folder, "danted.conf", &config)
                )
            }
            Server::Microsocks => {
                let login = if login { format!(" -u {USER} -P {SECRET}") } else { String::new() };
                format!("exec microsocks -i {ip} -p {port}{login}")
            }
        });
        let mut command = Command::new("unshare");
        let daemon = Daemon::start(
            &hosts.server,
            command
                .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", &steps.join(" && ")])
                .stdout(Stdio::null()),
        );
        let address = SocketAddr::new(ip, port);
        eventually("the proxy listens", || hosts.relay.enter(|| TcpStream::connect(address)).is_ok());
        Self { address, _daemon: daemon, _folder: folder }
    }
}

/// A relay to a target through a proxy.
fn relay(
    hosts: &Hosts,
    path: Path,
    via: &str,
    to: &str,
    args: &[&str],
    password: Option<&str>,
) -> (Daemon, SocketAddr) {
    let mut command = underpass();
    command.args(["relay", "--listen", ":0", "--log-connections", "--path", path.word()]);
    command.args(["--to", to, "--via", via]).args(args);
    // Whatever can be logged is, to see that the password is not among it.
    command.env("RUST_LOG", "trace");
    if let Some(password) = password {
        command.env("UNDERPASS_PROXY_PASSWORD", password);
    }
    let relay = Daemon::start(&hosts.relay, &mut command);
    let port = ready(&relay).port();
    (relay, SocketAddr::new(Hosts::relay_address(Family::V4), port))
}

fn assert_secret(relay: &Daemon, secret: &str) {
    let log = relay.log().join("\n");
    assert!(!log.contains(secret), "the password is in the log:\n{log}");
    let command = fs::read(format!("/proc/{}/cmdline", relay.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&command).contains(secret), "the password is in the process list");
}

/// Answers `GET /N` with N bytes, and `PUT /` with the number of bytes that came,
/// if they are the right ones.
fn serve_http(listener: &TcpListener) {
    let Ok((stream, _)) = listener.accept() else { return };
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut request, mut length) = (String::new(), 0);
    reader.read_line(&mut request).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let line = line.trim().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let head =
        |length: u64| format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    if let Some(size) = request.strip_prefix("GET /") {
        let size = size.split(' ').next().unwrap().parse().unwrap();
        (&stream).write_all(head(size).as_bytes()).unwrap();
        // A client that has gone away is not the server's trouble.
        let _ = Stream::new(size).send(&stream, size);
    } else {
        let got = Stream::new(length).receive_all(reader.take(length)).unwrap().to_string();
        (&stream).write_all((head(got.len() as u64) + &got).as_bytes()).unwrap();
    }
    let _ = stream.shutdown(Shutdown::Write);
}

/// A web server on the server's host; it ends with the tests' process.
fn web(hosts: &Hosts, family: Family) -> SocketAddr {
    let listener = hosts.server.enter(|| TcpListener::bind((Hosts::server_address(family), 0))).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        loop {
            serve_http(&listener);
        }
    });
    address
}

/// Downloads with curl, and checks every byte.
fn download(hosts: &Hosts, from: SocketAddr, size: u64) {
    let url = format!("http://{from}/{size}");
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--max-time", "100", &url]).stdout(Stdio::piped());
    let mut curl = hosts.client.spawn(&mut command).unwrap();
    let got = Stream::new(size).receive_all(curl.stdout.take().unwrap()).unwrap();
    assert!(curl.wait().unwrap().success(), "curl failed after {got} bytes");
    assert_eq!(got, size);
}

/// Uploads with curl.
fn upload(hosts: &Hosts, to: SocketAddr, size: u64) {
    let url = format!("http://{to}/");
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--max-time", "100", "-X", "PUT", "-H", "Expect:"]);
    command.args(["--data-binary", "@-", &url]);
    let mut curl = hosts.client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap();
    let mut to_curl = curl.stdin.take().unwrap();
    thread::spawn(move || {
        let mut stream = Stream::new(size);
        while stream.count < size {
            to_curl.write_all(stream.next((size - stream.count).min(64 << 10) as usize)).unwrap();
        }
    });
    let output = curl.wait_with_output().unwrap();
    assert!(output.status.success(), "curl failed");
    assert_eq!(String::from_utf8_lossy(&output.stdout), size.to_string());
}

fn a_gib_through_dante(path: Path) {
    let hosts = Hosts::new();
    let (proxy, web) = (Proxy::start(&hosts, Server::Dante, Family::V4, false), web(&hosts, Family::V4));
    let (relay, listen) =
        relay(&hosts, path, &format!("socks5://{}", proxy.address), &web.to_string(), &[], None);
    download(&hosts, listen, 1 << 30);
    upload(&hosts, listen, 50 << 20);
    let line =
        relay.find("a download", |line| line.contains(" connection ") && line.contains("received=10737"));
    assert!(line.contains("end=\"closed\""), "{path:?}: {line}");
}

#[test]
fn a_gib_through_dante_copy() {
    a_gib_through_dante(Path::Copy);
}

#[test]
fn a_gib_through_dante_splice() {
    a_gib_through_dante(Path::Splice);
}

#[test]
fn a_gib_through_dante_kernel() {
    a_gib_through_dante(Path::Kernel);
}

#[test]
fn a_gib_through_dante_auto() {
    a_gib_through_dante(Path::Auto);
}

/// Downloads by address and by a name that only the proxy knows, with the password
/// from the environment and from a file; then with a wrong one.
fn login(server: Server, family: Family) {
    const SIZE: u64 = 1_000_000;
    let hosts = Hosts::new();
    let web = web(&hosts, family);
    let by_name = format!("{NAME}:{}", web.port());
    {
        let proxy = Proxy::start(&hosts, server, family, false);
        let via = format!("socks5://{}", proxy.address);
        for to in [web.to_string(), by_name.clone()] {
            let (_relay, listen) = relay(&hosts, Path::Auto, &via, &to, &[], None);
            download(&hosts, listen, SIZE);
        }
    }
    let proxy = Proxy::start(&hosts, server, family, true);
    let via = format!("socks5://{USER}@{}", proxy.address);
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder, "password", &format!("{SECRET}\n"));
    for (args, password) in [(vec![], Some(SECRET)), (vec!["--via-password-file", &file], None)] {
        let (relay, listen) = relay(&hosts, Path::Auto, &via, &by_name, &args, password);
        download(&hosts, listen, SIZE);
        assert_secret(&relay, SECRET);
    }
    let wrong = "not-the-Password";
    let (with_wrong, listen) = relay(&hosts, Path::Auto, &via, &by_name, &[], Some(wrong));
    assert!(end(&hosts, &with_wrong, listen).contains("rejected the user or the password"));
    assert_secret(&with_wrong, wrong);
    // And none at all.
    let via = format!("socks5://{}", proxy.address);
    let (without, listen) = relay(&hosts, Path::Auto, &via, &by_name, &[], None);
    assert!(end(&hosts, &without, listen).contains("does it want a user and a password?"));
}

/// The relay's only client is reset: why, as the log has it.
fn end(hosts: &Hosts, relay: &Daemon, listen: SocketAddr) -> String {
    match connect(&hosts.client, listen) {
        Ok(client) => expect_reset(&client),
        // It came at once.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    fields(&relay.line(" connection "))["end"].clone()
}

#[test]
fn dante_over_ipv4() {
    login(Server::Dante, Family::V4);
}

#[test]
fn dante_over_ipv6() {
    login(Server::Dante, Family::V6);
}

#[test]
fn microsocks_over_ipv4() {
    login(Server::Microsocks, Family::V4);
}

#[test]
fn microsocks_over_ipv6() {
    login(Server::Microsocks, Family::V6);
}

/// Targets that a proxy does not reach.
#[test]
fn unreachable_targets() {
    let hosts = Hosts::new();
    for server in [Server::Dante, Server::Microsocks] {
        let proxy = Proxy::start(&hosts, server, Family::V4, false);
        let via = format!("socks5://{}", proxy.address);
        for (to, expected) in [
            ("10.0.2.2:9", "was refused by 10.0.2.2:9 (reply 5)"),
            ("no-such-name.underpass.test:9", "no-such-name.underpass.test:9"),
        ] {
            let (relay, listen) = relay(&hosts, Path::Auto, &via, to, &[], None);
            let end = end(&hosts, &relay, listen);
            assert!(
                end.contains(&proxy.address.to_string()) && end.contains(expected),
                "{server:?} {to}: {end}"
            );
        }
    }
}

/// The proxy itself is not there.
#[test]
fn no_proxy() {
    let hosts = Hosts::new();
    let (relay, listen) = relay(&hosts, Path::Auto, "socks5://10.0.2.2:9", "10.0.2.2:10", &[], None);
    let end = end(&hosts, &relay, listen);
    assert!(end.contains("cannot connect to 10.0.2.2:9") && end.contains("refused"), "{end}");
}

const GREETING: &[u8] = &[5, 0];
/// An answer of success, bound to an IPv4 address.
const DONE: &[u8] = &[5, 0, 0, 1, 10, 0, 2, 2, 1, 2];

/// A proxy that sends each of `answers` after something came from the relay, then
/// hangs up if it should; it ends some time after its last client.
fn misbehaving(hosts: &Hosts, answers: &[&[u8]], hangs_up: bool) -> SocketAddr {
    let listener = hosts.listen(Family::V4);
    let address = listener.local_addr().unwrap();
    let answers: Vec<_> = answers.iter().map(|answer| answer.to_vec()).collect();
    thread::spawn(move || {
        let mut held = vec![];
        while let Ok((mut stream, _)) = listener.accept() {
            for answer in &answers {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(answer);
            }
            if !hangs_up {
                held.push(stream);
            }
        }
    });
    address
}

/// Such a proxy has its message, within the connect timeout; the client is reset.
fn check_misbehaving(hosts: &Hosts, answers: &[&[u8]], hangs_up: bool, expected: &str) {
    let via = format!("socks5://{}", misbehaving(hosts, answers, hangs_up));
    let (relay, listen) =
        relay(hosts, Path::Copy, &via, "10.0.2.2:10", &["--connect-timeout", "700ms"], None);
    let end = end(hosts, &relay, listen);
    assert!(end.contains(expected), "{answers:?}: {end}");
}

#[test]
fn proxies_that_hang() {
    let hosts = Hosts::new();
    for answers in [&[][..], &[GREETING], &[GREETING, &DONE[..5]]] {
        check_misbehaving(&hosts, answers, false, "not reached within 700ms");
    }
}

#[test]
fn proxies_that_speak_garbage() {
    let hosts = Hosts::new();
    let garbage = b"HTTP/1.1 400 Bad Request\r\n\r\n";
    let expected = "does not speak SOCKS5: its answer begins with byte 72, not 5";
    check_misbehaving(&hosts, &[garbage], false, expected);
    check_misbehaving(&hosts, &[GREETING, garbage], false, expected);
    // A way to log in that was not offered, and none.
    check_misbehaving(&hosts, &[&[5, 2]], false, "the proxy");
    check_misbehaving(&hosts, &[&[5, 0xff]], false, "does it want a user and a password?");
}

#[test]
fn proxies_that_die() {
    let hosts = Hosts::new();
    for answers in [&[&[][..]][..], &[GREETING, &[]], &[GREETING, &DONE[..7]]] {
        check_misbehaving(&hosts, answers, true, "broke off in the middle of its answer");
    }
}

/// Each of the reply codes (RFC 1928, 6).
#[test]
fn proxies_that_refuse() {
    let hosts = Hosts::new();
    for (code, expected) in [
        (1, "failed to reach 10.0.2.2:10 (general failure, reply 1)"),
        (2, "does not allow connections to 10.0.2.2:10 (reply 2)"),
        (3, "cannot reach the network of 10.0.2.2:10 (reply 3)"),
        (4, "cannot reach the host of 10.0.2.2:10 (reply 4)"),
        (5, "was refused by 10.0.2.2:10 (reply 5)"),
        (6, "could not reach 10.0.2.2:10: the TTL expired on the way (reply 6)"),
        (7, "does not support CONNECT (reply 7)"),
        (8, "does not support addresses like that of 10.0.2.2:10 (reply 8)"),
    ] {
        check_misbehaving(&hosts, &[GREETING, &[5, code, 0, 1, 0, 0, 0, 0, 0, 0]], false, expected);
    }
}

/// Bytes of the target that come together with the proxy's answer, which comes in
/// every legal shape; then the proxy dies, or ends as it should.
fn answer_and_bytes_together(path: Path) {
    const BYTES: usize = 100_000;
    let hosts = Hosts::new();
    let listener = hosts.listen(Family::V4);
    let via = format!("socks5://{}", listener.local_addr().unwrap());
    let (relay, listen) = relay(&hosts, path, &via, "10.0.2.2:10", &[], None);
    let of_name: Vec<u8> = [&[5, 0, 0, 3, 4][..], b"name", &[1, 2]].concat();
    let of_ipv6: Vec<u8> = [&[5, 0, 0, 4][..], &[9; 16], &[1, 2]].concat();
    for (answer, dies) in [(DONE, false), (&of_name[..], true), (&of_ipv6[..], false), (DONE, true)] {
        let client = connect(&hosts.client, listen).unwrap();
        Stream::new(1).send(&client, 500).unwrap();
        let mut proxy = accept(&listener);
        let mut asked = [0; 3];
        proxy.read_exact(&mut asked).unwrap();
        assert_eq!(asked, [5, 1, 0]);
        proxy.write_all(GREETING).unwrap();
        let mut asked = [0; 10];
        proxy.read_exact(&mut asked).unwrap();
        assert_eq!(asked, [5, 1, 0, 1, 10, 0, 2, 2, 0, 10]);
        proxy.write_all(&[answer, Stream::new(2).peek(BYTES)].concat()).unwrap();
        Stream::new(1).receive(&proxy, 500);
        Stream::new(2).receive(&client, BYTES as u64);
        if dies {
            reset(proxy);
            expect_reset(&client);
        } else {
            drop(proxy);
            expect_end(&client);
        }
    }
    drop(relay);
}

#[test]
fn answer_and_bytes_together_copy() {
    answer_and_bytes_together(Path::Copy);
}

#[test]
fn answer_and_bytes_together_splice() {
    answer_and_bytes_together(Path::Splice);
}

#[test]
fn answer_and_bytes_together_kernel() {
    answer_and_bytes_together(Path::Kernel);
}

#[test]
fn answer_and_bytes_together_auto() {
    answer_and_bytes_together(Path::Auto);
}
