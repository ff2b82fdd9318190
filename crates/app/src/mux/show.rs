//! `mux show`: what is attached, and what it has counted.

use anyhow::Context as _;
use aya::maps::{HashMap, MapData, PerCpuArray};
use serde::Serialize;
use serde_json::Value;
use underpass_abi::mux::{Flow, SpokenTo, counter};
use underpass_logic::mux::table;

use super::{
    attach::{self, MUX},
    datagram,
    route::Lengths,
};
use crate::{
    attachment::{Found, pinned},
    error::Result,
    live::{self, text},
};

#[derive(Debug, Serialize)]
struct Report {
    attached: Vec<Shown>,
    /// What each `mux listen` tells of itself.
    listening: Vec<Value>,
}

/// One interface.
#[derive(Debug, Serialize)]
struct Shown {
    interface: String,
    hook: &'static str,
    why: String,
    works: bool,
    port: u16,
    /// The valid lengths of a payload, in bytes.
    length: String,
    routes: Vec<RouteCount>,
    default: DefaultCount,
    dropped: Dropped,
    /// Replies that left with the port that the client spoke to.
    replies: u64,
    /// ICMP errors made to speak of that port.
    errors: u64,
    flows: Flows,
}

#[derive(Debug, Serialize)]
struct RouteCount {
    #[serde(rename = "match")]
    matches: String,
    port: u16,
    packets: u64,
}

#[derive(Debug, Serialize)]
struct DefaultCount {
    to: String,
    packets: u64,
}

/// Datagrams by why they were dropped.
#[derive(Debug, Serialize)]
struct Dropped {
    wrong_length: u64,
    no_route: u64,
    /// Their tags were not in their first fragment.
    fragment: u64,
    /// Several in one packet (UDP segmentation offload).
    segmented: u64,
}

#[derive(Debug, Serialize)]
struct Flows {
    /// How many are remembered.
    known: u64,
    /// How many can be.
    room: u32,
    /// How many were new.
    new: u64,
    /// How many could not be noted.
    lost: u64,
}

pub(super) fn show(json: bool) -> Result<()> {
    let mut attached = vec![];
    for found in MUX.found()? {
        // `underpass status` lists what is in other network namespaces, too.
        if found.is_here()? {
            attached.push(shown(&found)?);
        }
    }
    let report = Report { attached, listening: live::told("mux")? };
    let mut out = std::io::stdout().lock();
    let printed = if json { print_json(&mut out, &report) } else { print(&mut out, &report) };
    Ok(printed.context("cannot print")?)
}

fn shown(found: &Found) -> Result<Shown> {
    let table = attach::table(found)?;
    let counters: PerCpuArray<MapData, u64> =
        pinned(&found.folder, "COUNTERS")?.try_into().context("COUNTERS is no array of each CPU's")?;
    let count = |index: u32| counters.get(&index, 0).map(|values| values.iter().sum::<u64>());
    let read = |index: u32| count(index).context("cannot read a counter");
    let routes = table::routes(&table).map(|slot| {
        Ok(RouteCount {
            matches: datagram::tag(&table, slot).to_string(),
            port: slot.port,
            packets: read(slot.counter.into())?,
        })
    });
    let routes = routes.collect::<Result<_>>()?;
    let default = datagram::default(&table);
    let room =
        aya::maps::MapInfo::from_pin(found.folder.pin("FLOWS")).context("cannot open FLOWS")?.max_entries();
    let flows: HashMap<MapData, Flow, SpokenTo> =
        pinned(&found.folder, "FLOWS")?.try_into().context("FLOWS is no hash map")?;
    Ok(Shown {
        interface: found.interface(),
        hook: found.attached.hook.word(),
        why: found.attached.why.clone(),
        works: found.works()?,
        port: table.port,
        length: Lengths(table.min_length..=table.max_length).to_string(),
        routes,
        default: DefaultCount {
            to: default.to_string(),
            packets: match default {
                datagram::Default::Port(_) => read(counter::DEFAULT)?,
                datagram::Default::Drop => read(counter::NO_ROUTE)?,
                datagram::Default::Pass => read(counter::PASSED)?,
            },
        },
        dropped: Dropped {
            wrong_length: read(counter::WRONG_LENGTH)?,
            no_route: read(counter::NO_ROUTE)?,
            fragment: read(counter::FRAGMENT)?,
            segmented: read(counter::SEGMENTED)?,
        },
        replies: read(counter::REPLIES)?,
        errors: read(counter::ERRORS)?,
        flows: Flows {
            known: flows.keys().flatten().count() as u64,
            room,
            new: read(counter::NEW_FLOWS)?,
            lost: read(counter::LOST_FLOWS)?,
        },
    })
}

fn print(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    if report.attached.is_empty() {
        writeln!(out, "mux is attached to no interface")?;
    }
    for it in &report.listening {
        print_listening(out, it)?;
    }
    for it in &report.attached {
        let state = if it.works { "" } else { " (not at work)" };
        writeln!(out, "{} port {}: {}{state}: {}", it.interface, it.port, it.hook, it.why)?;
        for route in &it.routes {
            writeln!(out, "  {:<40} -> {:<5} {:>12}", route.matches, route.port, route.packets)?;
        }
        writeln!(out, "  {:<40} -> {:<5} {:>12}", "default", it.default.to, it.default.packets)?;
        for (name, count) in [
            ("dropped: not a length of ", it.dropped.wrong_length),
            ("dropped: no route", it.dropped.no_route),
            ("dropped: tags not in the first fragment", it.dropped.fragment),
            ("dropped: several datagrams in one packet", it.dropped.segmented),
            ("replies", it.replies),
            ("ICMP errors", it.errors),
        ] {
            let of = if name.ends_with(' ') { it.length.as_str() } else { "" };
            writeln!(out, "  {:<49} {count:>12}", format!("{name}{of}"))?;
        }
        let Flows { known, room, new, lost } = it.flows;
        writeln!(out, "  flows: {known} of {room} remembered, {new} were new, {lost} could not be noted")?;
    }
    Ok(())
}

/// One `mux listen`.
fn print_listening(out: &mut impl std::io::Write, it: &Value) -> std::io::Result<()> {
    let (listen, per, path) = (text(it, "listen"), text(it, "per"), text(it, "path"));
    writeln!(out, "{listen} by {per}: pid {}, path {path}", it["pid"])?;
    let counted = ["connections", "messages"];
    for route in it["routes"].as_array().into_iter().flatten() {
        let count = counted.iter().find_map(|what| route[what].as_u64()).unwrap_or_default();
        writeln!(out, "  {:<40} -> {:<21} {count:>12}", text(route, "match"), text(route, "to"))?;
    }
    let of = |part: &Value| part.as_object().cloned().unwrap_or_default();
    let numbers = of(&it["counts"]).into_iter().chain(of(&it["messages"])).chain(of(it));
    for (name, count) in numbers.filter(|(name, count)| name != "pid" && count.is_u64()) {
        writeln!(out, "  {:<65} {count:>12}", name.replace('_', " "))?;
    }
    Ok(())
}

fn print_json(out: &mut impl std::io::Write, report: &Report) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    writeln!(out)
}
