//! The multiplexer's scene of `underpass demo`: a source sends everything to one UDP
//! port, three services listen on others, and a tag at byte 20 says which is meant.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    demo::{Progress, Scene},
    lab::Namespace,
};

const PORT: u16 = 5000;
const SERVICES: [(&str, u16); 3] = [("600", 5001), ("601", 5002), ("602", 5003)];
/// What is sent and must not arrive, with its length.
const INVALID: [(&str, &str, usize); 3] =
    [("too short", "600", 289), ("too long", "601", 295), ("unknown tag", "603", 292)];
const ROUNDS: u64 = 2000;
const PATIENCE: Duration = Duration::from_secs(10);

/// Plays the scene.
///
/// # Errors
/// Where the namespaces or the attachment cannot be made, or an answer does not come.
pub(crate) fn scene(progress: &Progress) -> Result<Scene> {
    progress.say("joining two namespaces");
    let (source, host) = (Namespace::new()?, Namespace::new()?);
    source.join("eth0", &host, "eth0")?;
    let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    source.address("eth0", IpAddr::from(from), 24)?;
    host.address("eth0", IpAddr::from(to), 24)?;
    let got: Vec<Arc<AtomicU64>> =
        SERVICES.iter().map(|(_, port)| service(&host, to, *port)).collect::<Result<_>>()?;
    let mut arguments =
        vec!["attach".to_owned(), "eth0".into(), format!("--port={PORT}"), "--length=290..=294".into()];
    arguments.extend(SERVICES.iter().map(|(tag, port)| format!("--route=@20:{tag}={port}")));
    let attached = mux(&host, &arguments)?;

    progress.say("sending datagrams with tags, and some that are not valid");
    let begun = Instant::now();
    let sent = send(&source, (to, PORT));
    let took = begun.elapsed();
    let shown = mux(&host, &["show".into(), "--json".into()]);
    mux(&host, &["detach".into(), "eth0".into()])?;
    let (replies, shown) = (sent?, shown?);
    let shown: Value = serde_json::from_str(&shown).context("`mux show --json` is no JSON")?;
    let mine = shown["attached"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|it| it["port"] == PORT && it["replies"] == replies);
    let dropped = |why: &str| mine.map_or(0, |it| it["dropped"][why].as_u64().unwrap_or_default());
    let (length, route) = (dropped("wrong_length"), dropped("no_route"));

    let mut table = vec![["tag", "service", "sent", "arrived"].map(str::to_owned).to_vec()];
    let mut ok = replies == 3 * ROUNDS && length == 2 * ROUNDS && route == ROUNDS;
    for ((tag, port), got) in SERVICES.iter().zip(&got) {
        let arrived = got.load(Relaxed);
        ok &= arrived == ROUNDS;
        table.push(vec![(*tag).to_owned(), format!("port {port}"), ROUNDS.to_string(), arrived.to_string()]);
    }
    for (what, tag, _) in INVALID {
        table.push(vec![tag.to_owned(), format!("dropped: {what}"), ROUNDS.to_string(), "0".to_owned()]);
    }
    let figures = json!({
        "sent": 6 * ROUNDS, "arrived": got.iter().map(|got| got.load(Relaxed)).collect::<Vec<_>>(),
        "replies": replies, "dropped": { "wrong_length": length, "no_route": route },
        "seconds": took.as_secs_f64(),
    });
    Ok(Scene {
        name: "mux",
        ok,
        story: vec![
            format!(
                "Everything goes to UDP port {PORT}; a tag at byte 20 names the service; 290 to 294 bytes are valid."
            ),
            attached.trim().to_owned(),
            format!(
                "{replies} replies came from port {PORT}; {length} datagrams of a wrong length and {route} with an \
                 unknown tag were dropped in the kernel."
            ),
        ],
        table,
        figures: figures.as_object().cloned().unwrap_or_default(),
    })
}

fn mux(host: &Namespace, arguments: &[String]) -> Result<String> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    let output =
        host.enter(|| command.arg("mux").args(arguments).output()).context("cannot start this program")?;
    ensure!(
        output.status.success(),
        "mux {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A service that counts what it gets and sends it back. It ends with its socket's peer.
fn service(host: &Namespace, at: Ipv4Addr, port: u16) -> Result<Arc<AtomicU64>> {
    let socket = host.enter(|| UdpSocket::bind((at, port))).context("cannot open a service's port")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            counter.fetch_add(1, Relaxed);
            if socket.send_to(&buffer[..length], from).is_err() {
                break;
            }
        }
    });
    Ok(count)
}

/// Sends all rounds and returns how many replies came, each from the port that it was
/// sent to: the socket is connected and takes no others.
fn send(source: &Namespace, to: (Ipv4Addr, u16)) -> Result<u64> {
    let socket =
        source.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).context("cannot open a port")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut replies = 0;
    for _ in 0..ROUNDS {
        for (_, tag, length) in INVALID {
            socket.send(&payload(tag, length))?;
        }
        for (tag, _) in SERVICES {
            socket.send(&payload(tag, 290))?;
        }
        for _ in SERVICES {
            let length = socket.recv(&mut [0; 512]).context("a reply did not come")?;
            ensure!(length == 290, "a reply has {length} bytes");
            replies += 1;
        }
    }
    Ok(replies)
}

fn payload(tag: &str, length: usize) -> Vec<u8> {
    let mut payload = vec![b'.'; length];
    payload[20..20 + tag.len()].copy_from_slice(tag.as_bytes());
    payload
}
