//! The shortcut's scene of `underpass demo`: two ends in a control group of the demo's
//! own exchange messages, by TCP over loopback and by the shortcut. Every byte that
//! comes back is compared with what was sent.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{
    Scope, Shortcut,
    cgroup::Temporary,
    measure::{Style, exchanges, loopback},
};
use crate::{
    demo::{Progress, Scene},
    lab::Namespace,
};

const SIZES: [usize; 3] = [64, 4096, 65_536];
/// Enough to be accelerated before the times count.
const WARM: usize = 1000;
const COUNT: usize = 6000;

/// What one way of one size took.
struct Row {
    way: &'static str,
    size: usize,
    p50: Duration,
    p99: Duration,
}

pub(crate) fn scene(progress: &Progress) -> Result<Scene> {
    let cgroup = Temporary::new("demo")?;
    let namespace = Namespace::new()?;
    cgroup.enter().context("cannot enter the demo's control group")?;
    let mut rows = vec![];
    let mut measure = |way| -> Result<()> {
        for size in SIZES {
            progress.say(format_args!("{COUNT} exchanges of {size} bytes by {way}"));
            let mut times = exchanges(loopback(&namespace)?, Style::Polls, size, (WARM, COUNT))?;
            times.sort_unstable();
            rows.push(Row { way, size, p50: times[COUNT / 2], p99: times[COUNT * 99 / 100] });
        }
        Ok(())
    };
    measure("TCP")?;
    let shortcut = Shortcut::start(cgroup.path(), &Scope::default())?;
    measure("shortcut")?;
    let figures = shortcut.summary().total;
    let ok = figures.accelerated == SIZES.len() as u64 && figures.redirected_bytes > figures.tcp_bytes;
    Ok(scene_of(&rows, figures.redirected_bytes, figures.tcp_bytes, ok))
}

fn scene_of(rows: &[Row], redirected: u64, tcp: u64, ok: bool) -> Scene {
    let head = ["bytes", "way", "p50", "p99", "verified"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    let mut ways = vec![];
    for Row { way, size, p50, p99 } in rows {
        let us = |time: &Duration| format!("{:.1} us", time.as_secs_f64() * 1e6);
        table.push(vec![size.to_string(), (*way).into(), us(p50), us(p99), "yes".into()]);
        ways.push(json!({
            "way": way, "bytes": size, "p50_us": p50.as_secs_f64() * 1e6, "p99_us": p99.as_secs_f64() * 1e6,
        }));
    }
    let story = vec![
        "Two ends in one control group exchange messages: by TCP over loopback, then with the".into(),
        format!(
            "shortcut. It took {redirected} bytes from socket to socket; {tcp} went by TCP before it saw"
        ),
        "that these are requests and responses.".into(),
    ];
    let figures = json!({ "ways": ways, "redirected_bytes": redirected, "tcp_bytes": tcp });
    Scene { name: "shortcut", ok, story, table, figures: figures.as_object().cloned().unwrap_or_default() }
}
