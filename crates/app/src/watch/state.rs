//! What is known of all connections. [`State::apply`] is pure: no IO, and the time
//! is handed in. The terminal view, the lines, the page and the metrics all read
//! from here.

use std::{collections::VecDeque, rc::Rc, time::Duration};

use foldhash::{HashMap, HashSet};
use underpass_abi::watch::{Address, Connection, FlowKey, direction, flag, quality};

use super::{
    event::{Event, Missed, Program, key},
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
    /// Ends of connections that found the ring buffer full.
    pub events: u64,
    /// Descriptions of programs and answers of name servers that found it full.
    pub names: u64,
    /// State changes that came on a CPU while it was looking at another one, and that
    /// the kernel did not hand over.
    pub changes: u64,
    /// Datagrams that found the map of flows full.
    pub datagrams: u64,
    /// Sockets for which the kernel had no memory.
    pub sockets: u64,
    /// Forwarded flows that made room for others before they were read.
    pub passages: u64,
    /// Packets that were to be told one by one and were not.
    pub packets: u64,
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
    /// Bytes of each of the last intervals, both ways; none if nothing has moved.
    pub history: VecDeque<u32>,
    last: (u64, u64),
    announced: bool,
    mark: bool,
}

impl Open {
    /// Notes what has moved in an interval. What rests needs no memory for that.
    fn remember(&mut self, bytes: u32) {
        if bytes == 0 && self.history.iter().all(|bytes| *bytes == 0) {
            self.history = VecDeque::new();
            return;
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(bytes);
    }
}

/// How many intervals [`Open::history`] reaches back.
pub const HISTORY: usize = 24;
/// How many connections that have just ended are remembered, against late reports.
const REMEMBERED: usize = 4096;
/// For how many lines there is room beforehand, if there were as many the last time.
const LINES: usize = 8192;
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
            Event::Name { address, name, lives } => self.name(address, &name, lives, now),
            Event::Lost(Missed { events, names, changes, flows, sockets, passages, packets }) => {
                let datagrams = flows;
                self.lose(Lost {
                    events,
                    names,
                    changes,
                    datagrams,
                    sockets,
                    passages,
                    packets,
                    ..self.lost
                });
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
            open.remember(u32::try_from(rx + tx).unwrap_or(u32::MAX));
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
        // As many again are likely: they need not grow by steps.
        let room = Vec::with_capacity(self.lines.len().min(LINES));
        std::mem::replace(&mut self.lines, room)
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
            // What went before the watch is no rate.
            last: if report.started == 0 { (report.rx_bytes, report.tx_bytes) } else { (0, 0) },
            announced: false,
            mark: true,
        };
        self.totals.connections += 1;
        if let Some(old) = self.open.insert(key, open) {
            // The socket was connected anew, and the end of its old life was missed.
            self.totals.ended += 1;
            let mut connection = old.view;
            connection.report.flags |= flag::UNSEEN;
            self.lines.push(Line::Connection { what: What::Close, connection });
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
        if report.owner.quality == quality::NONE
            && report.flags & flag::KERNEL == 0
            && report.direction != direction::FORWARDED
        {
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
                let report = &open.view.report;
                (report.protocol != 6 || report.direction == direction::FORWARDED)
                    && (self.released.contains(&key.cookie) || report.at + idle < now)
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
        // What is forwarded has no end of its own that could be lost.
        let gone = self.open.values().map(|open| (open.mark, open.view.report));
        let gone = gone.filter(|(mark, report)| !mark && report.direction != direction::FORWARDED);
        let gone: Vec<_> = gone.map(|(_, report)| report).collect();
        for mut report in gone {
            report.flags |= flag::UNSEEN;
            self.end(report, now);
        }
        self.open.values_mut().for_each(|open| open.mark = false);
    }

    fn name(&mut self, address: Address, name: &str, lives: Duration, now: u64) {
        self.names.enter(address, name, lives, now);
        for open in self.open.values_mut().filter(|open| open.view.report.remote == address) {
            open.view.remote_name = self.names.of(&address, now);
        }
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

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use underpass_abi::watch::{Owner, event};

    use super::*;

    pub const SECOND: u64 = 1_000_000_000;

    /// A connection to 192.0.2.7:443 as the kernel side reports it.
    pub fn report(cookie: u64, pid: u32, comm: &[u8], rx_bytes: u64, tx_bytes: u64) -> Connection {
        let mut owner =
            Owner { cgroup: 1, tgid: pid, uid: 0, comm: [0; 16], quality: quality::SEEN, kernel: 0 };
        owner.comm[..comm.len()].copy_from_slice(comm);
        Connection {
            kind: event::LIVE,
            netns: 1,
            cookie,
            started: 1,
            at: 2 + rx_bytes + tx_bytes,
            rx_bytes,
            tx_bytes,
            local: std::net::Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets(),
            remote: std::net::Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped().octets(),
            local_port: 40000 + cookie as u16,
            remote_port: 443,
            protocol: 6,
            direction: direction::OUTBOUND,
            flags: 0,
            rtt_us: 12_345,
            retransmits: 1,
            owner,
        }
    }

    fn told(state: &mut State) -> Vec<(What, u64, u64)> {
        let lines = state.take_lines().into_iter().filter_map(|line| match line {
            Line::Connection { what, connection } => {
                Some((what, connection.report.cookie, connection.report.tx_bytes))
            }
            Line::Lost(_) => None,
        });
        lines.collect()
    }

    #[test]
    fn a_life_is_told_in_order() {
        let mut state = State::default();
        state.apply(Event::Alive(report(1, 5, b"a", 0, 0)), 1);
        state.apply(Event::Alive(report(1, 5, b"a", 10, 20)), 2);
        state.apply(Event::Ended(report(1, 5, b"a", 10, 30)), 3);
        assert_eq!(told(&mut state), [(What::Connect, 1, 0), (What::Traffic, 1, 20), (What::Close, 1, 30)]);
        assert_eq!(state.open().count(), 0);
        let totals = Totals { connections: 1, ended: 1, rx_bytes: 10, tx_bytes: 30 };
        assert_eq!(state.totals(), totals);
    }

    #[test]
    fn an_end_alone_tells_the_beginning_too() {
        let mut state = State::default();
        state.apply(Event::Ended(report(1, 5, b"a", 10, 30)), 3);
        assert_eq!(told(&mut state), [(What::Connect, 1, 30), (What::Close, 1, 30)]);
    }

    #[test]
    fn late_and_double_reports_change_nothing() {
        let mut state = State::default();
        state.apply(Event::Alive(report(1, 5, b"a", 10, 20)), 1);
        state.apply(Event::Alive(report(1, 5, b"a", 5, 5)), 2);
        state.apply(Event::Ended(report(1, 5, b"a", 10, 30)), 3);
        told(&mut state);
        state.apply(Event::Ended(report(1, 5, b"a", 10, 30)), 4);
        state.apply(Event::Alive(report(1, 5, b"a", 10, 25)), 5);
        assert_eq!(told(&mut state), []);
        assert_eq!((state.totals().connections, state.totals().ended, state.open().count()), (1, 1, 0));
    }

    #[test]
    fn an_accepted_connection_waits_for_its_first_user() {
        let mut state = State::default();
        let mut early = report(1, 5, b"parent", 0, 0);
        (early.direction, early.owner.quality) = (direction::INBOUND, quality::LISTENER);
        state.apply(Event::Alive(early), 1);
        assert_eq!(told(&mut state), []);
        let worker = Connection { direction: direction::INBOUND, ..report(1, 6, b"worker", 1, 1) };
        state.apply(Event::Alive(worker), 2);
        let lines = state.take_lines();
        assert!(
            matches!(&lines[0], Line::Connection { what: What::Accept, connection } if connection.report.owner.tgid == 6)
        );
        // One that nobody uses is announced in the end, too.
        state.apply(Event::Alive(Connection { cookie: 2, ..early }), 3);
        state.tick(10 * SECOND);
        assert_eq!(told(&mut state), [(What::Accept, 2, 0)]);
    }

    #[test]
    fn flows_end_by_release_and_by_idleness() {
        let mut state = State::default();
        let flow = |cookie, at| Connection { protocol: 17, at, ..report(cookie, 5, b"u", 1, 1) };
        state.apply(Event::Alive(flow(1, 5)), 5);
        state.apply(Event::Alive(flow(2, 5)), 5);
        state.apply(Event::Released { cookie: 1 }, 6);
        state.apply(Event::FlowsRead, 6);
        assert_eq!(state.take_forgotten().iter().map(|key| key.cookie).collect::<Vec<_>>(), [1]);
        state.apply(Event::FlowsRead, 61 * SECOND);
        assert_eq!(state.take_forgotten().iter().map(|key| key.cookie).collect::<Vec<_>>(), [2]);
        assert_eq!(state.totals().ended, 2);
    }

    #[test]
    fn what_ended_unseen_is_swept_away() {
        let mut state = State::default();
        for cookie in [1, 2] {
            state.apply(Event::Alive(report(cookie, 5, b"a", 1, 1)), 1);
        }
        state.apply(Event::Swept, 2);
        state.apply(Event::Alive(report(2, 5, b"a", 1, 1)), 3);
        state.apply(Event::Swept, 3);
        assert_eq!(state.open().map(|(key, _)| key.cookie).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn an_end_that_was_not_seen_says_so_and_what_is_forwarded_goes_on() {
        let mut state = State::default();
        let forwarded = Connection { direction: direction::FORWARDED, ..report(1, 0, b"", 1, 1) };
        state.apply(Event::Alive(forwarded), 1);
        state.apply(Event::Alive(report(2, 5, b"a", 7, 9)), 1);
        state.take_lines();
        state.apply(Event::Swept, 2);
        state.apply(Event::Swept, 3);
        assert_eq!(state.open().map(|(key, _)| key.cookie).collect::<Vec<_>>(), [1]);
        let [Line::Connection { what: What::Close, connection }] = &state.take_lines()[..] else {
            panic!("one end")
        };
        assert_eq!((connection.report.flags, connection.report.rx_bytes), (flag::UNSEEN, 7));
    }

    #[test]
    fn losses_are_told_once() {
        let mut state = State::default();
        for _ in 0..2 {
            state.apply(Event::Lost(Missed { events: 3, sockets: 1, ..Missed::default() }), 1);
        }
        state.undecoded();
        let lines = state.take_lines();
        assert_eq!(lines.len(), 2);
        assert_eq!(state.lost(), Lost { events: 3, sockets: 1, undecoded: 1, ..Lost::default() });
    }

    proptest! {
        /// Whatever order, repetition or gaps: every connection is told to begin once
        /// and to end at most once, and the totals are those of the ends.
        #[test]
        fn any_stream_keeps_the_books(stream in prop::collection::vec((1u64..6, 0u64..50, any::<bool>()), 0..200)) {
            let mut state = State::default();
            for (now, (cookie, count, ends)) in stream.iter().enumerate() {
                let report = report(*cookie, 1, b"x", *count, *count);
                state.apply(if *ends { Event::Ended(report) } else { Event::Alive(report) }, now as u64);
            }
            let told = told(&mut state);
            for cookie in 1..6 {
                let of = |wanted: What| told.iter().filter(|(what, id, _)| *id == cookie && *what == wanted).count();
                let mentioned = stream.iter().any(|(id, ..)| *id == cookie);
                prop_assert_eq!(of(What::Connect), usize::from(mentioned));
                prop_assert_eq!(of(What::Close), usize::from(stream.iter().any(|(id, _, ends)| *id == cookie && *ends)));
            }
            let sent: u64 = told.iter().filter(|(what, ..)| *what == What::Close).map(|(_, _, sent)| sent).sum();
            prop_assert_eq!(state.totals().tx_bytes, sent);
            prop_assert_eq!(state.totals().connections, state.totals().ended + state.open().count() as u64);
        }

        /// Records that are cut short or rubbish are refused, never misread.
        #[test]
        fn any_bytes_decode_or_do_not(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            if let Some(event) = Event::decode(&bytes) {
                State::default().apply(event, 1);
            }
        }
    }
}
