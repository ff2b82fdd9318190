//! What the page, the API and the metrics show: a copy of the state that is brought up to
//! date once an interval, and what has changed by that.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    mem,
    sync::Arc,
    time::UNIX_EPOCH,
};

use serde::Serialize;
use underpass_abi::watch::{Connection, FlowKey, quality};

use super::geo::{Databases, Kind, Place};
use crate::watch::{
    event::{Program, key},
    output::{self, Clock},
    place,
    state::{Lost, Open, State, Totals, View},
};

/// How many ended connections are kept, and for how long (nanoseconds).
const ENDED: usize = 500;
const ENDED_FOR: u64 = 60_000_000_000;
/// How many connections that were never seen alive get a row of their own in one
/// interval; the others are in the sums only.
const BRIEF: usize = 200;
/// How many intervals the history of the throughput reaches back.
const HISTORY: usize = 300;
/// How many names of processes have sums of their own; the others share one.
const NAMES: usize = 64;

/// A connection.
pub struct Row {
    /// Its number here: never used again.
    pub id: u32,
    /// As last reported.
    pub report: Connection,
    /// Bytes a second, received and sent.
    pub rate: (f64, f64),
    /// By which name this host asked for the remote address.
    pub remote_name: Option<Arc<str>>,
    /// Whose it is: in [`Model::processes`].
    pub process: Option<u32>,
    /// Where the remote is: in [`Model::places`].
    pub place: u32,
    /// When it ended, nanoseconds of the boot clock.
    pub ended: Option<u64>,
    program: bool,
    look: u64,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Process {
    /// Thread group.
    pub pid: u32,
    /// The name, threads of the kernel in brackets.
    pub comm: String,
    /// The program's path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// Its user.
    pub uid: u32,
    /// Its path in the unified hierarchy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The container that the cgroup names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// systemd's unit that the cgroup names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

impl Process {
    fn of(report: &Connection, program: Option<&Program>) -> Option<Self> {
        if report.owner.quality == quality::NONE {
            return None;
        }
        let place = program.map(|program| place::of(&program.cgroup_path)).unwrap_or_default();
        let filled = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        Some(Self {
            pid: report.owner.tgid,
            comm: output::comm(report).into_owned(),
            exe: program.and_then(|program| filled(&program.exe)),
            uid: report.owner.uid,
            cgroup: program.and_then(|program| filled(&program.cgroup_path)),
            container: place.container,
            unit: place.unit,
        })
    }
}

/// Values that rows share, each with a number and a count of its users.
#[derive(Debug)]
pub struct Shared<T> {
    next: u32,
    numbers: HashMap<T, u32>,
    values: HashMap<u32, (T, u32)>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { next: 0, numbers: HashMap::new(), values: HashMap::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Shared<T> {
    /// The number of a value, which gains a user, and whether it is new.
    fn take(&mut self, value: T) -> (u32, bool) {
        match self.numbers.entry(value) {
            Entry::Occupied(entry) => {
                let id = *entry.get();
                self.values.entry(id).and_modify(|(_, users)| *users += 1);
                (id, false)
            }
            Entry::Vacant(entry) => {
                let id = self.next;
                self.next += 1;
                self.values.insert(id, (entry.key().clone(), 1));
                entry.insert(id);
                (id, true)
            }
        }
    }

    fn release(&mut self, id: u32) {
        if let Entry::Occupied(mut entry) = self.values.entry(id) {
            entry.get_mut().1 -= 1;
            if entry.get().1 == 0 {
                let (value, _) = entry.remove();
                self.numbers.remove(&value);
            }
        }
    }

    /// The value of a number.
    pub fn get(&self, id: u32) -> Option<&T> {
        self.values.get(&id).map(|(value, _)| value)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.values.iter().map(|(id, (value, _))| (*id, value))
    }
}

/// A place as a key: its numbers are compared by their bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Spot(pub Place);

impl Eq for Spot {}

impl std::hash::Hash for Spot {
    fn hash<H: std::hash::Hasher>(&self, to: &mut H) {
        let Place { kind, country, city, latitude, longitude, asn, organization } = &self.0;
        (kind, country, city, asn, organization).hash(to);
        (latitude.map(f64::to_bits), longitude.map(f64::to_bits)).hash(to);
    }
}

/// Bytes and connections since the start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    /// Payload received.
    pub rx_bytes: u64,
    /// Payload sent.
    pub tx_bytes: u64,
    /// Connections begun.
    pub connections: u64,
}

/// Sums by name.
#[derive(Debug, Default)]
pub struct Sums(pub HashMap<String, Sum>);

impl Sums {
    /// The sum of a name, or where there are `most` of them the one that all others share.
    fn of(&mut self, name: &str, most: usize) -> &mut Sum {
        let name = if self.0.contains_key(name) || self.0.len() < most { name } else { "other" };
        // Most are known: no name is copied for them.
        if !self.0.contains_key(name) {
            self.0.insert(name.to_owned(), Sum::default());
        }
        self.0.get_mut(name).expect("it was just put there")
    }
}

/// What has moved since the start, and in this interval, by everything that it is asked by.
#[derive(Debug, Default)]
pub struct Books {
    /// By protocol and direction.
    pub by_protocol: HashMap<(u16, u8), Sum>,
    /// By the name of the process.
    pub by_process: Sums,
    /// By country, or by the kind of place where there is none.
    pub by_country: Sums,
    interval: (u64, u64),
}

impl Books {
    fn add(&mut self, report: &Connection, comm: Option<&str>, country: &str, bytes: (u64, u64), begun: u64) {
        let protocol = self.by_protocol.entry((report.protocol, report.direction)).or_default();
        let process = self.by_process.of(comm.unwrap_or(""), NAMES);
        // There are only so many codes of two letters.
        let country = self.by_country.of(country, usize::MAX);
        for sum in [protocol, process, country] {
            sum.rx_bytes += bytes.0;
            sum.tx_bytes += bytes.1;
            sum.connections += begun;
        }
        self.interval.0 += bytes.0;
        self.interval.1 += bytes.1;
    }
}

/// Totals of an interval: when it ended (milliseconds of the epoch), bytes received and
/// sent a second, open connections.
pub type Point = (u64, u64, u64, u32);

/// All that is shown.
pub struct Model {
    /// The living connections.
    pub rows: HashMap<FlowKey, Row>,
    /// Those that have just ended, oldest first.
    pub ended: VecDeque<Row>,
    /// Processes that rows are of.
    pub processes: Shared<Process>,
    /// Places that rows lead to.
    pub places: Shared<Spot>,
    /// What has moved.
    pub books: Books,
    /// What was missed.
    pub lost: Lost,
    /// How many connections there were.
    pub totals: Totals,
    /// Throughput of the last intervals.
    pub history: VecDeque<Point>,
    /// What does not change: of the start.
    pub about: About,
    /// Counts the looks.
    pub look: u64,
    /// When the last look was, milliseconds of the epoch.
    pub time: u64,
    clock: Clock,
    databases: Databases,
    next: u32,
    looked: u64,
    brief: usize,
    changes: Changes,
}

/// What does not change while the watch runs.
#[derive(Debug, Clone, Default, Serialize)]
pub struct About {
    /// Of underpass.
    pub version: &'static str,
    /// The host's name.
    pub host: String,
    /// The kernel's release.
    pub kernel: String,
    /// When the watch began, milliseconds of the epoch.
    pub started: u64,
    /// How often there are new figures, milliseconds.
    pub interval: u64,
    /// What could not be attached, and what it takes.
    pub missing: Vec<String>,
    /// The databases that places come from.
    pub geo: Vec<String>,
    /// The interface of which forwarded flows are shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Where this host is, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home: Option<(f64, f64)>,
}

/// What changed since the last message to the pages.
#[derive(Debug, Default)]
pub struct Changes {
    /// Rows that are new, or of which more than the counters changed.
    pub rows: Vec<u32>,
    /// What was received and sent on others: number, bytes.
    pub moved: Vec<(u32, u64, u64)>,
    /// Round-trip time and retransmits.
    pub timed: Vec<(u32, u32, u32)>,
    /// Rows that are no more.
    pub gone: Vec<u32>,
    /// Processes that are new.
    pub processes: Vec<u32>,
    /// Places that are new.
    pub places: Vec<u32>,
}

impl Model {
    /// An empty one.
    pub fn new(about: About, clock: Clock, databases: Databases) -> Self {
        Self {
            rows: HashMap::new(),
            ended: VecDeque::new(),
            processes: Shared::default(),
            places: Shared::default(),
            books: Books::default(),
            lost: Lost::default(),
            totals: Totals::default(),
            history: VecDeque::new(),
            about,
            look: 0,
            time: 0,
            clock,
            databases,
            next: 0,
            looked: 0,
            brief: 0,
            changes: Changes::default(),
        }
    }

    /// Takes in a connection that has ended.
    pub fn end(&mut self, view: &View) {
        let key = key(&view.report);
        let known = self.rows.get(&key).is_some_and(|row| row.report.started == view.report.started);
        if !known {
            if self.brief >= BRIEF {
                let (report, place) = (&view.report, self.find(&view.report));
                let comm = (report.owner.quality != quality::NONE).then(|| output::comm(report));
                let bytes = (report.rx_bytes, report.tx_bytes);
                self.books.add(report, comm.as_deref(), name_of(&place), bytes, 1);
                return;
            }
            self.brief += 1;
            self.rows_end(key);
        }
        self.update(key, view, (0.0, 0.0));
        self.rows_end(key);
    }

    /// Takes in the state: what is open, what was missed. `now` is of the boot clock.
    pub fn look(&mut self, state: &State, now: u64) {
        self.look += 1;
        for (key, Open { view, rate, .. }) in state.open() {
            self.update(*key, view, *rate);
        }
        let gone: Vec<_> =
            self.rows.iter().filter(|(_, row)| row.look != self.look).map(|(key, _)| *key).collect();
        for key in gone {
            self.rows_end(key);
        }
        while self.ended.len() > ENDED
            || self.ended.front().is_some_and(|row| row.ended.is_some_and(|ended| ended + ENDED_FOR < now))
        {
            let Some(row) = self.ended.pop_front() else { break };
            self.places.release(row.place);
            if let Some(process) = row.process {
                self.processes.release(process);
            }
            self.changes.gone.push(row.id);
        }
        (self.lost, self.totals, self.brief) = (state.lost(), state.totals(), 0);
        self.note(now);
    }

    /// Notes the throughput of the interval that ends now.
    fn note(&mut self, now: u64) {
        self.time = self.milliseconds(now);
        let (rx, tx) = mem::take(&mut self.books.interval);
        if self.looked != 0 {
            let span = now.saturating_sub(self.looked).max(1) as f64 / 1e9;
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            let rate = |bytes: u64| (bytes as f64 / span) as u64;
            self.history.push_back((self.time, rate(rx), rate(tx), self.rows.len() as u32));
        }
        self.looked = now;
    }

    /// Brings a row up to date, or makes it.
    fn update(&mut self, key: FlowKey, view: &View, rate: (f64, f64)) {
        let report = &view.report;
        let Some(row) = self.rows.get_mut(&key).filter(|row| row.report.started == report.started) else {
            // The socket has begun another life.
            self.rows_end(key);
            self.open(key, view, rate);
            return;
        };
        row.look = self.look;
        row.rate = rate;
        let old = mem::replace(&mut row.report, *report);
        if old == *report && row.program == view.program.is_some() && same(row, view) {
            return;
        }
        let (id, before) = (row.id, (old.rx_bytes, old.tx_bytes));
        if old.owner != report.owner
            || row.program != view.program.is_some()
            || !same(row, view)
            || (old.local, old.direction, old.flags) != (report.local, report.direction, report.flags)
        {
            row.remote_name = view.remote_name.as_deref().map(Into::into);
            row.program = view.program.is_some();
            let old_process = row.process;
            let process = self.process(view);
            if let Some(row) = self.rows.get_mut(&key) {
                row.process = process;
            }
            if let Some(old) = old_process {
                self.processes.release(old);
            }
            self.changes.rows.push(id);
        } else {
            let (rx, tx) = (report.rx_bytes.wrapping_sub(before.0), report.tx_bytes.wrapping_sub(before.1));
            if (rx, tx) != (0, 0) {
                self.changes.moved.push((id, rx, tx));
            }
            if (old.rtt_us, old.retransmits) != (report.rtt_us, report.retransmits) {
                self.changes.timed.push((id, report.rtt_us, report.retransmits));
            }
        }
        if before != (report.rx_bytes, report.tx_bytes) {
            self.count(&key, before, 0);
        }
    }

    fn open(&mut self, key: FlowKey, view: &View, rate: (f64, f64)) {
        let report = view.report;
        let place = self.find(&report);
        self.settle(&report, &place);
        // What went before the watch is in no sum.
        let before = if report.started == 0 { (report.rx_bytes, report.tx_bytes) } else { (0, 0) };
        let process = self.process(view);
        let (place, new) = self.places.take(Spot(place));
        if new {
            self.changes.places.push(place);
        }
        let row = Row {
            id: self.next,
            report,
            rate,
            remote_name: view.remote_name.as_deref().map(Into::into),
            process,
            place,
            ended: None,
            program: view.program.is_some(),
            look: self.look,
        };
        self.next += 1;
        self.changes.rows.push(row.id);
        self.rows.insert(key, row);
        self.count(&key, before, 1);
    }

    /// The host is where its public address is.
    fn settle(&mut self, report: &Connection, remote: &Place) {
        if self.about.home.is_some() || remote.kind != Kind::Located {
            return;
        }
        let home = self.databases.find(output::ip(&report.local));
        if let (Some(latitude), Some(longitude)) = (home.latitude, home.longitude) {
            self.about.home = Some((latitude, longitude));
        }
    }

    fn find(&self, report: &Connection) -> Place {
        self.databases.find(output::ip(&report.remote))
    }

    fn process(&mut self, view: &View) -> Option<u32> {
        let (id, new) = self.processes.take(Process::of(&view.report, view.program.as_deref())?);
        if new {
            self.changes.processes.push(id);
        }
        Some(id)
    }

    fn rows_end(&mut self, key: FlowKey) {
        let Some(mut row) = self.rows.remove(&key) else { return };
        (row.ended, row.rate) = (Some(output::boot_time()), (0.0, 0.0));
        self.changes.rows.push(row.id);
        self.ended.push_back(row);
    }

    /// Adds to the sums what has come since there were `before` bytes.
    fn count(&mut self, key: &FlowKey, before: (u64, u64), begun: u64) {
        let Some(row) = self.rows.get(key) else { return };
        let comm = row.process.and_then(|id| self.processes.get(id)).map(|process| process.comm.as_str());
        let country = self.places.get(row.place).map_or("", |place| name_of(&place.0));
        let report = &row.report;
        let rx = report.rx_bytes.saturating_sub(before.0);
        let tx = report.tx_bytes.saturating_sub(before.1);
        self.books.add(report, comm, country, (rx, tx), begun);
    }

    /// What has changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        mem::take(&mut self.changes)
    }

    /// Milliseconds of the epoch.
    pub fn milliseconds(&self, boot: u64) -> u64 {
        self.clock.wall(boot).duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
    }
}

/// Whether a row has the name that the view has.
fn same(row: &Row, view: &View) -> bool {
    row.remote_name.as_deref() == view.remote_name.as_deref()
}

/// What a place is counted under.
pub fn name_of(place: &Place) -> &str {
    place.country.as_deref().unwrap_or(place.kind.word())
}
