//! The JSON of the API and of the page's stream. The API's names are those of `watch --json`.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use axum::body::Bytes;
use serde::Serialize;
use underpass_abi::watch::{direction, flag};

use super::{
    geo::Place,
    model::{About, Changes, Model, Point, Process, Row},
};
use crate::watch::output::{self, LostJson};

/// A connection. Absent is absent.
#[derive(Debug, Serialize)]
struct Connection<'a> {
    id: u32,
    protocol: Cow<'static, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<u32>,
    rx_bytes: u64,
    tx_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rtt_us: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retransmits: Option<u32>,
    /// Milliseconds of the epoch; absent for what is older than the watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    started: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<u64>,
    attribution: &'static str,
    /// Where the counters come from.
    source: &'static str,
    /// The end was not seen: the totals are those last read.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unseen: bool,
}

impl<'a> Connection<'a> {
    fn of(model: &Model, row: &'a Row) -> Self {
        let report = &row.report;
        Self {
            id: row.id,
            protocol: output::protocol(report.protocol),
            direction: output::direction_word(report),
            local: output::address(&report.local, report.local_port, &report.remote),
            remote: output::address(&report.remote, report.remote_port, &report.local),
            remote_name: row.remote_name.as_deref(),
            netns: Some(report.netns).filter(|netns| *netns != 0),
            rx_bytes: report.rx_bytes,
            tx_bytes: report.tx_bytes,
            rtt_us: Some(report.rtt_us).filter(|rtt| *rtt != 0),
            retransmits: (report.protocol == 6).then_some(report.retransmits),
            started: (report.started != 0).then(|| model.milliseconds(report.started)),
            ended: row.ended.map(|ended| model.milliseconds(ended)),
            attribution: output::attribution(report),
            source: match (report.direction, report.protocol) {
                (direction::FORWARDED, _) => "packets",
                (_, 6) => "socket",
                _ => "calls",
            },
            unseen: report.flags & flag::UNSEEN != 0,
        }
    }
}

/// A connection in the API: with its process and place in it.
#[derive(Debug, Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    connection: Connection<'a>,
    rx_rate: u64,
    tx_rate: u64,
    #[serde(flatten)]
    process: Option<&'a Process>,
    place: Option<&'a Place>,
}

/// `/api/v1/connections`: the living ones, or those that ended in the last minute as well.
pub fn connections(model: &Model, with_ended: bool) -> serde_json::Result<String> {
    let ended = model.ended.iter().filter(|_| with_ended);
    let mut rows: Vec<&Row> = model.rows.values().chain(ended).collect();
    rows.sort_unstable_by_key(|row| row.id);
    let rows = rows.into_iter().map(|row| Whole {
        connection: Connection::of(model, row),
        rx_rate: row.rate.0 as u64,
        tx_rate: row.rate.1 as u64,
        process: row.process.and_then(|id| model.processes.get(id)),
        place: model.places.get(row.place).map(|place| &place.0),
    });
    #[derive(Serialize)]
    struct Connections<'a> {
        time: u64,
        connections: Vec<Whole<'a>>,
    }
    serde_json::to_string(&Connections { time: model.time, connections: rows.collect() })
}

/// `/api/v1/processes`: who has connections open, and how much they move.
pub fn processes(model: &Model) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Busy<'a> {
        #[serde(flatten)]
        process: &'a Process,
        connections: u32,
        rx_bytes: u64,
        tx_bytes: u64,
        rx_rate: u64,
        tx_rate: u64,
    }
    #[derive(Serialize)]
    struct Processes<'a> {
        time: u64,
        processes: Vec<Busy<'a>>,
    }
    let mut busy: HashMap<u32, Busy<'_>> = HashMap::new();
    for row in model.rows.values() {
        let Some((id, process)) = row.process.and_then(|id| Some((id, model.processes.get(id)?))) else {
            continue;
        };
        let entry = busy.entry(id).or_insert(Busy {
            process,
            connections: 0,
            rx_bytes: 0,
            tx_bytes: 0,
            rx_rate: 0,
            tx_rate: 0,
        });
        entry.connections += 1;
        entry.rx_bytes += row.report.rx_bytes;
        entry.tx_bytes += row.report.tx_bytes;
        entry.rx_rate += row.rate.0 as u64;
        entry.tx_rate += row.rate.1 as u64;
    }
    let mut processes: Vec<_> = busy.into_values().collect();
    processes.sort_unstable_by_key(|busy| busy.process.pid);
    serde_json::to_string(&Processes { time: model.time, processes })
}

/// What holds for the whole watch.
#[derive(Debug, Serialize)]
struct Status {
    time: u64,
    open: usize,
    connections: u64,
    ended: u64,
    rx_rate: u64,
    tx_rate: u64,
    lost: LostJson,
}

impl Status {
    fn of(model: &Model) -> Self {
        let last = model.history.back();
        Self {
            time: model.time,
            open: model.rows.len(),
            connections: model.totals.connections,
            ended: model.totals.ended,
            rx_rate: last.map_or(0, |point| point.1),
            tx_rate: last.map_or(0, |point| point.2),
            lost: model.lost.into(),
        }
    }
}

/// `/api/v1/status`: the watch itself.
pub fn status(model: &Model) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Whole<'a> {
        #[serde(flatten)]
        about: &'a About,
        #[serde(flatten)]
        status: Status,
    }
    serde_json::to_string(&Whole { about: &model.about, status: Status::of(model) })
}

/// A message of the page's stream.
#[derive(Debug, Serialize)]
struct Message<'a> {
    look: u64,
    /// In the first message: everything before it is to be forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    about: Option<&'a About>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    history: Vec<Point>,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    home: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    processes: Vec<(u32, &'a Process)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    places: Vec<(u32, &'a Place)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rows: Vec<(Connection<'a>, Option<u32>, u32)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gone: Vec<u32>,
    moved: Moved,
    timed: Timed,
}

/// Increments of counters, a column each: their keys would be most of the message. A
/// row's number is told as its distance from the one before.
#[derive(Debug, Default, Serialize)]
struct Moved {
    id: Vec<u32>,
    rx: Vec<u64>,
    tx: Vec<u64>,
}

/// Round-trip times in microseconds, and retransmits, likewise.
#[derive(Debug, Default, Serialize)]
struct Timed {
    id: Vec<u32>,
    rtt: Vec<u32>,
    retransmits: Vec<u32>,
}

/// The first message: all there is.
pub fn everything(model: &Model) -> serde_json::Result<Bytes> {
    let rows = model.rows.values().chain(&model.ended);
    frame(&Message {
        about: Some(&model.about),
        history: model.history.iter().copied().collect(),
        processes: model.processes.iter().collect(),
        places: model.places.iter().map(|(id, spot)| (id, &spot.0)).collect(),
        rows: rows.map(|row| (Connection::of(model, row), row.process, row.place)).collect(),
        gone: vec![],
        moved: Moved::default(),
        timed: Timed::default(),
        look: model.look,
        status: Status::of(model),
        home: model.about.home,
    })
}

/// The next messages: only what has changed.
pub fn changes(model: &Model, mut changes: Changes) -> serde_json::Result<Bytes> {
    let told: HashSet<u32> = changes.rows.drain(..).collect();
    // What is told whole needs no increments.
    changes.moved.retain(|(id, ..)| !told.contains(id));
    changes.timed.retain(|(id, ..)| !told.contains(id));
    changes.moved.sort_unstable();
    changes.timed.sort_unstable();
    let rows = model.rows.values().chain(&model.ended).filter(|row| told.contains(&row.id));
    let (mut moved, mut timed) = (Moved::default(), Timed::default());
    let mut before = 0;
    for (id, rx, tx) in changes.moved {
        moved.id.push(id - before);
        moved.rx.push(rx);
        moved.tx.push(tx);
        before = id;
    }
    before = 0;
    for (id, rtt, retransmits) in changes.timed {
        timed.id.push(id - before);
        timed.rtt.push(rtt);
        timed.retransmits.push(retransmits);
        before = id;
    }
    let processes = changes.processes.into_iter();
    let places = changes.places.into_iter();
    frame(&Message {
        look: model.look,
        about: None,
        history: vec![],
        status: Status::of(model),
        home: model.about.home,
        processes: processes.filter_map(|id| Some((id, model.processes.get(id)?))).collect(),
        places: places.filter_map(|id| Some((id, &model.places.get(id)?.0))).collect(),
        rows: if told.is_empty() {
            vec![]
        } else {
            rows.map(|row| (Connection::of(model, row), row.process, row.place)).collect()
        },
        gone: changes.gone,
        moved,
        timed,
    })
}

/// An event of the stream (WHATWG HTML, server-sent events). JSON has no line breaks.
fn frame(message: &Message<'_>) -> serde_json::Result<Bytes> {
    let mut frame = b"data: ".to_vec();
    serde_json::to_writer(&mut frame, message)?;
    frame.extend_from_slice(b"\n\n");
    Ok(frame.into())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::watch::{
        event::Event,
        output::Clock,
        state::{
            Line, State, What,
            tests::{SECOND, report},
        },
        web::geo::Databases,
    };

    /// A state and what is shown of it.
    struct Watch {
        state: State,
        model: Model,
        now: u64,
    }

    impl Watch {
        fn new() -> Self {
            let model = Model::new(About::default(), Clock::now(), Databases::default());
            Self { state: State::default(), model, now: SECOND }
        }

        /// Takes events in, looks, and returns what the pages are told.
        fn look(&mut self, events: impl IntoIterator<Item = Event>) -> Value {
            self.now += SECOND;
            for event in events {
                self.state.apply(event, self.now);
            }
            for line in self.state.take_lines() {
                if let Line::Connection { what: What::Close, connection } = line {
                    self.model.end(&connection);
                }
            }
            self.model.look(&self.state, self.now);
            let news = self.model.take_changes();
            parsed(&changes(&self.model, news).unwrap())
        }
    }

    fn parsed(frame: &[u8]) -> Value {
        let text = std::str::from_utf8(frame).unwrap();
        let data = text.strip_prefix("data: ").and_then(|text| text.strip_suffix("\n\n")).unwrap();
        assert!(!data.contains('\n'));
        serde_json::from_str(data).unwrap()
    }

    #[test]
    fn only_what_has_changed_travels() {
        let mut watch = Watch::new();
        let open = [1, 2, 3].map(|cookie| Event::Alive(report(cookie, 100, b"curl", 0, 0)));
        let told = watch.look(open);
        assert_eq!(told["rows"].as_array().unwrap().len(), 3);
        assert_eq!(told["processes"].as_array().unwrap().len(), 1, "{told}");
        let id = |cookie: u64| watch.model.rows.values().find(|row| row.report.cookie == cookie).unwrap().id;
        let (second, third) = (id(2), id(3));
        let moved =
            [Event::Alive(report(2, 100, b"curl", 500, 7)), Event::Alive(report(3, 100, b"curl", 0, 1))];
        let told = watch.look(moved);
        assert_eq!(told.get("rows"), None, "{told}");
        let mut lines = [(second, 500, 7), (third, 0, 1)];
        lines.sort_unstable();
        let [(a, rx, tx), (b, more_rx, more_tx)] = lines;
        assert_eq!(told["moved"], json!({"id": [a, b - a], "rx": [rx, more_rx], "tx": [tx, more_tx]}));
        let told = watch.look([]);
        assert_eq!((&told["moved"]["id"], told.get("rows")), (&json!([]), None), "{told}");
    }

    #[test]
    fn the_ended_stay_for_a_minute() {
        let mut watch = Watch::new();
        watch.look([Event::Alive(report(1, 100, b"curl", 5, 5))]);
        let told = watch.look([Event::Ended(report(1, 100, b"curl", 9, 9))]);
        let row = &told["rows"][0][0];
        assert_eq!(
            (&row["rx_bytes"], row["ended"].is_u64(), &told["status"]["open"]),
            (&json!(9), true, &json!(0))
        );
        let listed = |watch: &Watch, ended| {
            let text = connections(&watch.model, ended).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()["connections"].as_array().unwrap().len()
        };
        assert_eq!((listed(&watch, false), listed(&watch, true)), (0, 1));
        watch.now = output::boot_time() + 61 * SECOND;
        assert_eq!(watch.look([])["gone"], json!([0]));
        assert_eq!(listed(&watch, true), 0);
        assert_eq!((watch.model.processes.iter().count(), watch.model.places.iter().count()), (0, 0));
    }

    #[test]
    fn thousands_of_short_connections_are_counted_and_few_are_listed() {
        let mut watch = Watch::new();
        let short = (0..3000).map(|cookie| Event::Ended(report(cookie, 100, b"ab", 10, 1)));
        watch.look(short);
        assert_eq!(watch.model.ended.len(), 200);
        let sum = watch.model.books.by_process.0["ab"];
        assert_eq!((sum.connections, sum.rx_bytes, sum.tx_bytes), (3000, 30_000, 3000));
        let text = super::super::metrics::encode(&watch.model).unwrap();
        for line in [
            "underpass_watch_process_received_bytes_total{process=\"ab\"} 30000",
            "underpass_watch_country_sent_bytes_total{country=\"unlocated\"} 3000",
            "underpass_watch_connections_total{protocol=\"tcp\",direction=\"outbound\"} 3000",
            "underpass_watch_connections_seen_total 3000",
            "underpass_watch_lost_total{kind=\"events\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn names_of_processes_are_bounded_in_the_metrics() {
        let mut watch = Watch::new();
        for n in 0..500_u64 {
            watch.look([Event::Ended(report(n, n as u32 + 1, format!("p{n}").as_bytes(), 1, 1))]);
        }
        let sums = &watch.model.books.by_process.0;
        assert_eq!((sums.len(), sums["other"].connections), (65, 436));
    }
}
