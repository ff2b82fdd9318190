//! What is known of all connections. [`State::apply`] is pure: no IO, and the time
//! is handed in. The terminal view, the lines, the page and the metrics all read
//! from here.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use underpass_abi::watch::{Connection, FlowKey, direction, flag, quality};

use super::{
    event::{Event, Program, key},
    names::Names,
};

/// How long an accepted connection may wait for its first user before it is
/// announced under its listener's name, and a flow for its next datagram.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the first user.
    pub first_use: Duration,
    /// For the next datagram.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first_use: Duration::from_secs(2), idle: Duration::from_mins(1) }
    }
}

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A connection that this host opened, or was found open.
    Connect,
    /// A connection that was opened to this host.
    Accept,
    /// New totals.
    Traffic,
    /// The end, with the final totals.
    Close,
}

/// Something to be told.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    /// About one connection.
    Connection {
        /// What happened.
        what: What,
        /// The connection, as it is now.
        connection: View,
    },
    /// Something was missed; the figures are totals since the start.
    Lost(Lost),
}

/// A connection and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// What the kernel side says.
    pub report: Connection,
    /// What its process runs.
    pub program: Option<Rc<Program>>,
    /// The remote's name, from a name server's answer.
    pub remote_name: Option<Rc<str>>,
}

/// What was missed since the start. Nothing of it is in the other figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// Records that found the ring buffer full.
    pub events: u64,
    /// Datagrams that found the map of flows full.
    pub datagrams: u64,
    /// Sockets for which the kernel had no memory.
    pub sockets: u64,
    /// Connections whose process could not be told.
    pub unattributed: u64,
    /// Records that could not be decoded.
    pub undecoded: u64,
}

/// A living connection.
#[derive(Debug, Clone)]
pub struct Open {
    /// As last reported.
    pub view: View,
    /// Bytes a second, over the last interval: received and sent.
    pub rate: (f64, f64),
    /// Bytes of each of the last intervals, both ways.
    pub history: VecDeque<u32>,
    last: (u64, u64),
    announced: bool,
    mark: bool,
}

/// How many intervals [`Open::history`] reaches back.
pub const HISTORY: usize = 24;
/// How many connections that have just ended are remembered, against late reports.
const REMEMBERED: usize = 4096;
/// How many programs are remembered of which no connection is alive.
const PROGRAMS: usize = 8192;

/// All that is known.
#[derive(Debug, Default)]
pub struct State {
    open: HashMap<FlowKey, Open>,
    programs: HashMap<u32, Rc<Program>>,
    names: Names,
    released: HashSet<u64>,
    ended: VecDeque<(FlowKey, u64)>,
    ended_set: HashSet<(FlowKey, u64)>,
    forget: Vec<FlowKey>,
    lines: Vec<Line>,
    lost: Lost,
    totals: Totals,
    patience: Patience,
    ticked: u64,
}

/// Sums since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections seen.
    pub connections: u64,
    /// Those that have ended.
    pub ended: u64,
    /// Payload bytes received on connections that have ended.
    pub rx_bytes: u64,
    /// Payload bytes sent on them.
    pub tx_bytes: u64,
}

impl State {
    /// Takes an event in. `now` is in nanoseconds of the boot clock.
    pub fn apply(&mut self, event: Event, now: u64) {
        match event {
            Event::Ended(report) => self.end(report, now),
            Event::Alive(report) => self.alive(report, now),
            Event::Process(program) => self.introduce(program),
            Event::Answer(answer) => self.names.learn(&answer, now),
            Event::Released { cookie } => {
                self.released.insert(cookie);
            }
            Event::FlowsRead => self.end_flows(now),
            Event::Swept => self.sweep(now),
            Event::Name { address, name, lives } => self.names.enter(address, &name, lives, now),
            Event::Lost { events, flows, sockets } => {
                self.lose(Lost { events, datagrams: flows, sockets, ..self.lost })
            }
        }
    }

    /// A record came that could not be decoded.
    pub fn undecoded(&mut self) {
        self.lose(Lost { undecoded: self.lost.undecoded + 1, ..self.lost });
    }

    /// The interval is over: rates are computed, and who has waited long enough for
    /// its first user is announced.
    pub fn tick(&mut self, now: u64) {
        let seconds = Duration::from_nanos(now.saturating_sub(self.ticked)).as_secs_f64();
        let mut late = vec![];
        for (key, open) in &mut self.open {
            let bytes = (open.view.report.rx_bytes, open.view.report.tx_bytes);
            let (rx, tx) = (bytes.0.saturating_sub(open.last.0), bytes.1.saturating_sub(open.last.1));
            open.rate =
                if self.ticked == 0 { (0.0, 0.0) } else { (rx as f64 / seconds, tx as f64 / seconds) };
            open.last = bytes;
            if open.history.len() == HISTORY {
                open.history.pop_front();
            }
            open.history.push_back(u32::try_from(rx + tx).unwrap_or(u32::MAX));
            let waited = now.saturating_sub(open.view.report.started);
            if !open.announced && waited > self.patience.first_use.as_nanos() as u64 {
                late.push(*key);
            }
        }
        for key in late {
            self.announce(&key);
        }
        self.ticked = now;
    }

    /// What there is to tell since the last call.
    pub fn take_lines(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.lines)
    }

    /// The flows whose entries the kernel side should free.
    pub fn take_forgotten(&mut self) -> Vec<FlowKey> {
        std::mem::take(&mut self.forget)
    }

    /// The living connections, in no order.
    pub fn open(&self) -> impl Iterator<Item = (&FlowKey, &Open)> {
        self.open.iter()
    }

    /// What was missed.
    pub fn lost(&self) -> Lost {
        self.lost
    }

    /// Sums over what has ended, and how many there were.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn alive(&mut self, report: Connection, now: u64) {
        let key = key(&report);
        if self.ended_set.contains(&(key, report.started)) {
            return;
        }
        if let Some(open) = self.open.get_mut(&key)
            && open.view.report.started == report.started
        {
            open.mark = true;
            // Reports may come late: the counters only ever grow.
            let old = &open.view.report;
            if report.rx_bytes < old.rx_bytes || report.tx_bytes < old.tx_bytes || report.at < old.at {
                return;
            }
            let moved = report.rx_bytes != old.rx_bytes || report.tx_bytes != old.tx_bytes;
            let owned = report.owner != old.owner;
            open.view.report = report;
            if open.view.remote_name.is_none() {
                open.view.remote_name = self.names.of(&report.remote, now);
            }
            if owned {
                open.view.program = self.programs.get(&report.owner.tgid).cloned();
            }
            if !open.announced && report.owner.quality > quality::LISTENER {
                self.announce(&key);
            } else if moved && open.announced {
                let connection = open.view.clone();
                self.lines.push(Line::Connection { what: What::Traffic, connection });
            }
            return;
        }
        let view = self.view(report, now);
        let waits = report.direction == direction::INBOUND && report.owner.quality <= quality::LISTENER;
        let open = Open {
            view,
            rate: (0.0, 0.0),
            history: VecDeque::new(),
            last: (0, 0),
            announced: false,
            mark: true,
        };
        self.totals.connections += 1;
        if let Some(old) = self.open.insert(key, open) {
            // The socket was connected anew, and the end of its old life was missed.
            self.totals.ended += 1;
            self.lines.push(Line::Connection { what: What::Close, connection: old.view });
        }
        if !waits {
            self.announce(&key);
        }
    }

    fn announce(&mut self, key: &FlowKey) {
        if let Some(open) = self.open.get_mut(key)
            && !open.announced
        {
            open.announced = true;
            let connection = open.view.clone();
            let moved = connection.report.rx_bytes + connection.report.tx_bytes > 0;
            self.lines
                .push(Line::Connection { what: opening(&connection.report), connection: connection.clone() });
            if moved {
                self.lines.push(Line::Connection { what: What::Traffic, connection });
            }
        }
    }

    fn end(&mut self, report: Connection, now: u64) {
        let key = key(&report);
        if !self.remember((key, report.started)) {
            return;
        }
        let mut view = self.view(report, now);
        let announced = match self.open.remove(&key) {
            Some(open) => {
                // The name it was opened by counts, however long ago that was.
                view.remote_name = open.view.remote_name.or(view.remote_name);
                open.announced
            }
            None => {
                self.totals.connections += 1;
                false
            }
        };
        self.totals.ended += 1;
        self.totals.rx_bytes += report.rx_bytes;
        self.totals.tx_bytes += report.tx_bytes;
        if report.owner.quality == quality::NONE && report.flags & flag::KERNEL == 0 {
            self.lost.unattributed += 1;
        }
        if !announced {
            self.lines.push(Line::Connection { what: opening(&report), connection: view.clone() });
        }
        self.lines.push(Line::Connection { what: What::Close, connection: view });
    }

    /// Notes that a connection has ended; `false` if that was known.
    fn remember(&mut self, life: (FlowKey, u64)) -> bool {
        if !self.ended_set.insert(life) {
            return false;
        }
        self.ended.push_back(life);
        if self.ended.len() > REMEMBERED
            && let Some(old) = self.ended.pop_front()
        {
            self.ended_set.remove(&old);
        }
        true
    }

    fn end_flows(&mut self, now: u64) {
        let idle = self.patience.idle.as_nanos() as u64;
        let over: Vec<_> = self
            .open
            .iter()
            .filter(|(key, open)| {
                open.view.report.protocol != 6
                    && (self.released.contains(&key.cookie) || open.view.report.at + idle < now)
            })
            .map(|(key, open)| (*key, open.view.report))
            .collect();
        for (key, report) in over {
            self.forget.push(key);
            self.end(report, now);
        }
        self.released.clear();
    }

    fn sweep(&mut self, now: u64) {
        let gone: Vec<_> =
            self.open.values().filter(|open| !open.mark).map(|open| open.view.report).collect();
        for report in gone {
            self.end(report, now);
        }
        self.open.values_mut().for_each(|open| open.mark = false);
    }

    fn introduce(&mut self, program: Program) {
        if self.programs.len() >= PROGRAMS {
            self.programs.retain(|_, program| Rc::strong_count(program) > 1);
        }
        let program = Rc::new(program);
        self.programs.insert(program.pid, program);
    }

    fn lose(&mut self, lost: Lost) {
        if lost != self.lost {
            self.lost = lost;
            self.lines.push(Line::Lost(lost));
        }
    }

    fn view(&self, report: Connection, now: u64) -> View {
        View {
            program: self.programs.get(&report.owner.tgid).cloned(),
            remote_name: self.names.of(&report.remote, now),
            report,
        }
    }
}

fn opening(report: &Connection) -> What {
    if report.direction == direction::INBOUND { What::Accept } else { What::Connect }
}
