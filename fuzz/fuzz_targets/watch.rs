//! Whatever comes out of the ring buffer and out of name servers' answers: it is
//! decoded or counted, the state keeps its sums, and every line can be printed.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use underpass::watch::{
    event::{Answer, Event, Missed, Program},
    output::{self, Clock},
    state::State,
};
use underpass_abi::watch::{Connection, event};

#[derive(Debug, Arbitrary)]
enum Step {
    /// Any record.
    Record(Vec<u8>),
    /// A connection's record, of a few connections, so that they meet.
    Connection {
        cookie: u8,
        started: u8,
        rx: u8,
        tx: u8,
        at: u8,
        protocol: bool,
        closed: bool,
        inbound: bool,
        quality: u8,
    },
    Answer {
        cookie: u8,
        stream: bool,
        more: u8,
        bytes: Vec<u8>,
    },
    Process(u8),
    Name {
        cookie: u8,
        name: String,
        lives: u16,
    },
    Released(u8),
    FlowsRead,
    Swept,
    Lost(u8),
    Tick,
}

fuzz_target!(|steps: Vec<(u32, Step)>| {
    let clock = Clock::now();
    let mut state = State::default();
    let (mut now, mut out) = (1, vec![]);
    for (passed, step) in steps {
        now += u64::from(passed) << 4;
        match step {
            Step::Record(record) => match Event::decode(&record) {
                Some(event) => state.apply(event, now),
                None => state.undecoded(),
            },
            Step::Connection { cookie, started, rx, tx, at, protocol, closed, inbound, quality } => {
                let mut report = empty();
                report.cookie = cookie.into();
                report.started = started.into();
                (report.rx_bytes, report.tx_bytes) = (rx.into(), tx.into());
                report.at = at.into();
                report.protocol = if protocol { 6 } else { 17 };
                report.direction = inbound.into();
                report.owner.tgid = (cookie % 4).into();
                report.owner.quality = quality.into();
                state.apply(if closed { Event::Ended(report) } else { Event::Alive(report) }, now);
            }
            Step::Answer { cookie, stream, more, bytes } => {
                let received = bytes.len() as u32 + u32::from(more);
                state.apply(Event::Answer(Answer { cookie: cookie.into(), stream, received, bytes }), now);
            }
            Step::Process(pid) => {
                let exe = format!("/bin/{pid}");
                let program =
                    Program { pid: (pid % 4).into(), exe, cgroup: pid.into(), cgroup_path: String::new() };
                state.apply(Event::Process(program), now);
            }
            Step::Name { cookie, name, lives } => {
                let lives = Duration::from_secs(lives.into());
                state.apply(Event::Name { address: [cookie; 16], name, lives }, now);
            }
            Step::Released(cookie) => state.apply(Event::Released { cookie: cookie.into() }, now),
            Step::FlowsRead => state.apply(Event::FlowsRead, now),
            Step::Swept => state.apply(Event::Swept, now),
            Step::Lost(count) => {
                let events = count.into();
                let lost = Event::Lost(Missed { events, packets: events, ..Missed::default() });
                state.apply(lost, now);
            }
            Step::Tick => state.tick(now),
        }
        let totals = state.totals();
        assert_eq!(totals.connections, totals.ended + state.open().count() as u64);
        for line in state.take_lines() {
            out.clear();
            output::json(&mut out, &line, clock);
            assert!(out.ends_with(b"\n") && out.iter().filter(|byte| **byte == b'\n').count() == 1);
            output::text(&mut out, &line, clock).unwrap();
        }
        drop(state.take_forgotten());
    }
});

/// The report of a connection of which nothing is known.
fn empty() -> Connection {
    let mut record = vec![0; size_of::<Connection>()];
    record[..4].copy_from_slice(&event::CLOSED.to_ne_bytes());
    match Event::decode(&record) {
        Some(Event::Ended(report)) => report,
        other => panic!("not a connection: {other:?}"),
    }
}
