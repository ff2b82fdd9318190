//! What runs tells `underpass status` of itself: over an abstract Unix socket named
//! `underpass/FUNCTION/PID`, which is gone when the process is, whatever ended it.
//! Abstract names belong to a network namespace: status sees what runs in its own.
//! Only root and the user who runs a thing are answered.

use std::{
    fs,
    io::Read as _,
    os::{linux::net::SocketAddrExt as _, unix::net as unix},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, net::UnixListener};

/// A process that does not answer within this is reported as such.
const PATIENCE: Duration = Duration::from_secs(2);

/// Something that runs, as it tells it.
pub(crate) struct Running {
    pub pid: u32,
    pub told: Result<Value>,
}

/// Answers `underpass status` until it is dropped. `describe` tells what runs.
///
/// # Errors
/// Where the socket cannot be made.
pub(crate) async fn answer(function: &str, describe: impl AsyncFn() -> Value) -> Result<()> {
    let name = format!("underpass/{function}/{}", std::process::id());
    let listener = unix::UnixListener::bind_addr(&unix::SocketAddr::from_abstract_name(&name)?)
        .with_context(|| format!("cannot make the socket @{name}"))?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let own = nix::unistd::geteuid().as_raw();
    loop {
        let (mut asker, _) = listener.accept().await?;
        if !asker.peer_cred().is_ok_and(|asker| [0, own].contains(&asker.uid())) {
            continue;
        }
        let text = describe().await.to_string();
        // Whoever asked may have left, or be slow: nobody else shall wait for that.
        let _ = tokio::time::timeout(PATIENCE, asker.write_all(text.as_bytes())).await;
    }
}

/// Asks all that runs of a function in this network namespace.
///
/// # Errors
/// Where /proc/net/unix cannot be read.
pub(crate) fn ask(function: &str) -> Result<Vec<Running>> {
    let table = fs::read_to_string("/proc/net/unix").context("cannot read /proc/net/unix")?;
    let prefix = format!("@underpass/{function}/");
    let mut pids: Vec<u32> =
        table.lines().filter_map(|line| line.split_once(&prefix)?.1.trim().parse().ok()).collect();
    // A socket is listed once for itself and once for each connection.
    pids.sort_unstable();
    pids.dedup();
    Ok(pids.into_iter().map(|pid| Running { pid, told: ask_one(function, pid) }).collect())
}

fn ask_one(function: &str, pid: u32) -> Result<Value> {
    let address = unix::SocketAddr::from_abstract_name(format!("underpass/{function}/{pid}"))?;
    let mut stream = unix::UnixStream::connect_addr(&address).context("cannot ask it")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("it does not answer")?;
    anyhow::ensure!(!text.is_empty(), "it answers only root and the user who runs it");
    serde_json::from_str(&text).context("its answer is no JSON")
}
