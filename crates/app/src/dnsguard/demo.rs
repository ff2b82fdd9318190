//! dnsguard's scene of `underpass demo`: a host asks a resolver over a wire on which an
//! injector answers first. Without the guard the host believes the forgery, with it the
//! truth. A thread plays both the injector and the resolver behind it.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RData, RecordType},
};
use serde_json::json;

use super::forgery::{HONEST, INJECTORS, Injector, answer};
use crate::{
    demo::{Progress, Scene},
    lab::Namespace,
};

const CLIENT: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 1);
/// Google's: the rules for it are the strictest.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
const TRUTH: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
const FORGED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
const PATIENCE: Duration = Duration::from_secs(5);

/// One row of the table.
struct Row {
    injector: &'static str,
    without: IpAddr,
    with: IpAddr,
}

pub(crate) fn scene(progress: &Progress) -> Result<Scene> {
    let (client, beyond) = (Namespace::new()?, Namespace::new()?);
    client.join("eth0", &beyond, "eth0")?;
    client.address("eth0", CLIENT, 24)?;
    beyond.address("eth0", RESOLVER, 24)?;
    // Takes the queries, which the wire answers; without it the host would refuse them.
    let _silent = beyond.enter(|| UdpSocket::bind((RESOLVER, 53)))?;
    let wire = Wire::start(&beyond)?;
    let mut rows = vec![];
    for injector in INJECTORS {
        progress.say(format_args!("the injector {} answers first", injector.name));
        *wire.injector.lock().map_err(|_| anyhow::anyhow!("the wire broke"))? = Some(injector);
        let without = ask(&client)?;
        let guard = Guard::attach(&client)?;
        let with = ask(&client).with_context(|| format!("guarded from {}", injector.name))?;
        drop(guard);
        rows.push(Row { injector: injector.name, without, with });
    }
    Ok(scene_of(&rows))
}

fn scene_of(rows: &[Row]) -> Scene {
    let mut table = vec![["injector", "without the guard", "with it"].map(str::to_owned).to_vec()];
    let mut figures = vec![];
    for row in rows {
        table.push(vec![row.injector.to_owned(), row.without.to_string(), row.with.to_string()]);
        figures.push(json!({ "injector": row.injector, "without": row.without, "with": row.with }));
    }
    let ok = rows.iter().all(|row| row.without == IpAddr::V4(FORGED) && row.with == IpAddr::V4(TRUTH));
    let mut map = serde_json::Map::new();
    map.insert("injectors".to_owned(), figures.into());
    Scene {
        name: "dnsguard",
        ok,
        story: vec![
            format!("A host asks {RESOLVER} for an address; an injector on the path answers first."),
            format!("{FORGED} is forged, {TRUTH} is true."),
        ],
        table,
        figures: map,
    }
}

/// Asks the resolver as any program does and takes the first answer.
fn ask(client: &Namespace) -> Result<IpAddr> {
    let socket = client.enter(|| UdpSocket::bind((CLIENT, 0)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect((RESOLVER, 53))?;
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii("www.example.org.")?, RecordType::A));
    socket.send(&query.to_vec()?)?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("no answer came")?;
    let message = Message::from_vec(&buffer[..length])?;
    match message.answers.first().map(|record| &record.data) {
        Some(RData::A(address)) => Ok(IpAddr::V4(address.0)),
        other => anyhow::bail!("expected an address, got {other:?}"),
    }
}

/// The guard on the client, attached by this very program.
struct Guard<'a>(&'a Namespace);

impl<'a> Guard<'a> {
    fn attach(client: &'a Namespace) -> Result<Self> {
        run(client, &["attach", "eth0"])?;
        Ok(Self(client))
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // `underpass down` removes it if this does not.
        let _ = run(self.0, &["detach", "eth0"]);
    }
}

fn run(client: &Namespace, args: &[&str]) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("dnsguard").args(args).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = client.spawn(&mut command)?.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A thread at the far end that answers queries twice: forged, then true.
struct Wire {
    injector: Arc<Mutex<Option<Injector>>>,
    stop: Arc<AtomicBool>,
}

impl Wire {
    fn start(beyond: &Namespace) -> Result<Self> {
        let socket = beyond.frames("eth0")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let injector = Arc::new(Mutex::new(None));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&injector), Arc::clone(&stop));
        thread::spawn(move || {
            let mut frame = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                let Ok(length) = (&socket).read(&mut frame) else { continue };
                let query = &frame[..length];
                let forger: Option<Injector> = shared.lock().ok().and_then(|injector| *injector);
                let forged = forger.and_then(|forger| answer(query, &forger, FORGED.into(), false));
                let truth = answer(query, &HONEST, TRUTH.into(), true);
                for reply in [forged, truth].into_iter().flatten() {
                    // A host that is gone hears nothing.
                    let _ = (&socket).write_all(&reply);
                }
            }
        });
        Ok(Self { injector, stop })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
