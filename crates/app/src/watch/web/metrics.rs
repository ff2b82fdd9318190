//! `/metrics`: the sums in Prometheus' OpenMetrics text. Labels are bounded: protocols and
//! directions, countries, and the first 64 names of processes.

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};
use underpass_abi::watch::direction;

use super::model::{Model, Sum};
use crate::watch::output;

/// The type of what [`encode`] returns.
pub const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByProtocol {
    protocol: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByProcess {
    process: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCountry {
    country: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

/// All metrics, as of the last look.
///
/// # Errors
/// None in practice: the text grows in memory.
pub fn encode(model: &Model) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("underpass_watch");
    let about = [("version", model.about.version), ("kernel", &*model.about.kernel)];
    let about = Info::new(about.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec());
    registry.register("build", "The running underpass and kernel", about);

    let open: Family<ByProtocol, Gauge> = Family::default();
    for row in model.rows.values() {
        open.get_or_create(&by_protocol((row.report.protocol, row.report.direction))).inc();
    }
    registry.register("connections_open", "Connections that are open", open);
    let sums = model.books.by_protocol.iter().map(|(key, sum)| (by_protocol(*key), *sum));
    register(&mut registry, "", "by protocol and direction", sums);
    let sums = model.books.by_process.0.iter();
    let sums = sums.map(|(name, sum)| (ByProcess { process: name.clone() }, *sum));
    register(&mut registry, "process_", "by the name of the process, the first 64 names", sums);
    let sums = model.books.by_country.0.iter();
    let sums = sums.map(|(name, sum)| (ByCountry { country: name.clone() }, *sum));
    register(&mut registry, "country_", "by the country of the remote address, or why there is none", sums);

    let lost: Family<ByKind, Counter> = Family::default();
    let was = model.lost;
    for (kind, count) in [
        ("events", was.events),
        ("names", was.names),
        ("changes", was.changes),
        ("datagrams", was.datagrams),
        ("sockets", was.sockets),
        ("passages", was.passages),
        ("packets", was.packets),
        ("unattributed", was.unattributed),
        ("undecoded", was.undecoded),
    ] {
        lost.get_or_create(&ByKind { kind }).inc_by(count);
    }
    registry.register("lost", "What was missed, and connections whose process is not known", lost);
    let seen: Counter = Counter::default();
    seen.inc_by(model.totals.connections);
    registry.register("connections_seen", "Connections seen, with those open at the start", seen);

    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

/// Three counters: bytes received and sent, connections.
fn register<L>(registry: &mut Registry, by: &str, help: &str, sums: impl Iterator<Item = (L, Sum)>)
where
    L: Clone + std::hash::Hash + Eq + std::fmt::Debug + EncodeLabelSet + Send + Sync + 'static,
{
    let [rx, tx, begun] = [(); 3].map(|()| Family::<L, Counter>::default());
    for (labels, sum) in sums {
        rx.get_or_create(&labels).inc_by(sum.rx_bytes);
        tx.get_or_create(&labels).inc_by(sum.tx_bytes);
        begun.get_or_create(&labels).inc_by(sum.connections);
    }
    registry.register_with_unit(
        format!("{by}received"),
        format!("Payload received, {help}"),
        Unit::Bytes,
        rx,
    );
    registry.register_with_unit(format!("{by}sent"), format!("Payload sent, {help}"), Unit::Bytes, tx);
    registry.register(format!("{by}connections"), format!("Connections, {help}"), begun);
}

fn by_protocol((protocol, direction): (u16, u8)) -> ByProtocol {
    let direction = match direction {
        direction::OUTBOUND => "outbound",
        direction::INBOUND => "inbound",
        direction::FORWARDED => "forwarded",
        _ => "unknown",
    };
    ByProtocol { protocol: output::protocol(protocol).into_owned(), direction }
}
