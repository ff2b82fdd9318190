//! watch's scene of `underpass demo`: four processes send to a server in a network
//! namespace of their own; the watch names each with its bytes, and both are compared
//! with what the server received.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::output::bytes;
use crate::{
    demo::{Progress, Scene},
    lab::Namespace,
};

/// Who talks, and how many bytes each sends.
const TALKERS: [(&str, u64); 4] = [("alice", 20_000_003), ("bob", 1_234_567), ("carol", 4096), ("dave", 1)];

pub(crate) fn scene(progress: &Progress) -> Result<Scene> {
    let namespace = Namespace::new()?;
    progress.say("starting to watch");
    let watch = Watched::start()?;
    let listener = namespace.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let to = listener.local_addr()?;
    let server = thread::spawn(move || receive(&listener));
    progress.say("four processes talk");
    let mut pids = HashMap::new();
    for (name, count) in TALKERS {
        let mut child = talk(&namespace, name, count, to)?;
        pids.insert(name, child.id());
        child.wait().with_context(|| format!("{name} did not end"))?;
    }
    let received = server.join().map_err(|_| anyhow::anyhow!("the server failed"))??;
    let seen = watch.end()?;
    Ok(scene_of(&received, &pids, &seen))
}

/// Compares, for each talker, what watch says with what the server received.
fn scene_of(received: &HashMap<String, u64>, pids: &HashMap<&str, u32>, seen: &[Value]) -> Scene {
    let mut table =
        vec![["process", "pid", "sent", "watch says", "told by", "right"].map(str::to_owned).to_vec()];
    let mut processes = vec![];
    let mut ok = true;
    for (name, _) in TALKERS {
        let pid = pids[name];
        let line = seen.iter().find(|line| line["event"] == "close" && line["pid"] == pid);
        let counted = line.and_then(|line| line["tx_bytes"].as_u64());
        let local = line.and_then(|line| line["local"].as_str());
        // The server knows each client by its address.
        let truth = local.and_then(|local| received.get(local)).copied();
        let right = line.is_some_and(|line| line["comm"] == name) && truth.is_some() && truth == counted;
        ok &= right;
        let say = |count: Option<u64>| count.map_or_else(|| "nothing".to_owned(), bytes);
        table.push(vec![
            name.to_owned(),
            pid.to_string(),
            say(truth),
            say(counted),
            line.and_then(|line| line["attribution"].as_str()).unwrap_or("-").to_owned(),
            if right { "yes" } else { "NO" }.to_owned(),
        ]);
        processes
            .push(json!({"process": name, "pid": pid, "received": truth, "counted": counted, "ok": right}));
    }
    let total: u64 = received.values().sum();
    let expected: u64 = TALKERS.iter().map(|(_, count)| count).sum();
    ok &= total == expected;
    let mut figures = serde_json::Map::new();
    figures.insert("processes".to_owned(), Value::Array(processes));
    figures.insert("bytes".to_owned(), total.into());
    let story = vec![
        "Four processes rename themselves, connect, send, and are gone within milliseconds.".to_owned(),
        "The kernel keeps owner and count with each socket; no program runs per packet.".to_owned(),
    ];
    Scene { name: "watch", ok, story, table, figures }
}

/// Receives from each talker until it closes, and says how much came from which address.
fn receive(listener: &TcpListener) -> Result<HashMap<String, u64>> {
    let mut received = HashMap::new();
    for _ in TALKERS {
        let (mut client, from) = listener.accept()?;
        received.insert(from.to_string(), io::copy(&mut client, &mut io::sink())?);
    }
    Ok(received)
}

fn talk(namespace: &Namespace, name: &str, count: u64, to: SocketAddr) -> Result<Child> {
    let program = format!(
        "printf {name} > /proc/self/comm; exec 3<>/dev/tcp/{}/{}; head -c {count} /dev/zero >&3",
        to.ip(),
        to.port()
    );
    namespace.spawn(Command::new("bash").args(["-c", &program])).context("cannot start bash")
}

/// A running `underpass watch --json`.
struct Watched {
    child: Child,
    lines: thread::JoinHandle<Vec<Value>>,
    /// Kept open, so that its notes find a reader.
    _notes: BufReader<std::process::ChildStderr>,
}

impl Watched {
    fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["watch", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start underpass watch")?;
        let (Some(out), Some(notes)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("underpass watch has no output");
        };
        let lines = thread::spawn(move || {
            let lines = BufReader::new(out).lines().map_while(Result::ok);
            lines.filter_map(|line| serde_json::from_str(&line).ok()).collect()
        });
        let mut notes = BufReader::new(notes);
        let mut said = String::new();
        while !said.contains("watching") {
            if notes.read_line(&mut said)? == 0 {
                child.wait()?;
                bail!("underpass watch does not start: {}", said.trim());
            }
        }
        Ok(Self { child, lines, _notes: notes })
    }

    /// Ends it and returns its lines.
    fn end(mut self) -> Result<Vec<Value>> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)
            .context("cannot end underpass watch")?;
        self.child.wait()?;
        self.lines.join().map_err(|_| anyhow::anyhow!("underpass watch's lines cannot be read"))
    }
}
