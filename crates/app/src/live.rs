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

use crate::status::Item;

/// A process that does not answer within this is reported as such.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// What runs of a function in this network namespace, for `underpass status`. `told` makes
/// an item of what a process tells; one that does not answer is an item as well.
///
/// # Errors
/// Where /proc/net/unix cannot be read.
pub(crate) fn items(function: &'static str, told: impl Fn(u32, &Value) -> Told) -> Result<Vec<Item>> {
    let item = |pid| match ask(function, pid) {
        Ok(value) => {
            let Told { on, why } = told(pid, &value);
            Item { function, on, path: text(&value, "path"), why, works: true, details: Some(value) }
        }
        Err(error) => Item {
            function,
            on: format!("pid {pid}"),
            path: String::new(),
            why: format!("{error:#}"),
            works: false,
            details: None,
        },
    };
    Ok(pids(function)?.into_iter().map(item).collect())
}

/// What those of a function that run in this network namespace tell, each with its `pid`;
/// one that does not answer is left out.
///
/// # Errors
/// Where /proc/net/unix cannot be read.
pub(crate) fn told(function: &str) -> Result<Vec<Value>> {
    let with_pid = |pid| {
        let mut told = ask(function, pid).ok()?;
        told["pid"] = pid.into();
        Some(told)
    };
    Ok(pids(function)?.into_iter().filter_map(with_pid).collect())
}

/// What an item says of a process, beside its path.
pub(crate) struct Told {
    pub on: String,
    pub why: String,
}

/// A text among what a process tells.
pub(crate) fn text(told: &Value, key: &str) -> String {
    told[key].as_str().unwrap_or_default().to_owned()
}

fn pids(function: &str) -> Result<Vec<u32>> {
    let table = fs::read_to_string("/proc/net/unix").context("cannot read /proc/net/unix")?;
    let prefix = format!("@underpass/{function}/");
    let mut pids: Vec<u32> =
        table.lines().filter_map(|line| line.split_once(&prefix)?.1.trim().parse().ok()).collect();
    // A socket is listed once for itself and once for each connection.
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

fn ask(function: &str, pid: u32) -> Result<Value> {
    let address = unix::SocketAddr::from_abstract_name(format!("underpass/{function}/{pid}"))?;
    let mut stream = unix::UnixStream::connect_addr(&address).context("cannot ask it")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("it does not answer")?;
    anyhow::ensure!(!text.is_empty(), "it answers only root and the user who runs it");
    serde_json::from_str(&text).context("its answer is no JSON")
}
