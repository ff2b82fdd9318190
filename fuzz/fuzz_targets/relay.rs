//! The rules of the relay's kernel path under any sequence of events: every byte
//! once and in order, at most the cap waits, and nothing is stuck in the end.
#![no_main]

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use underpass_logic::relay::model::{Model, Step};

#[derive(Debug, Arbitrary)]
enum Event {
    Arrive { new: u16 },
    ArriveAgain { old: u32, new: u16 },
    Judge { room: u32, owed: bool, meanwhile: u8 },
    Queue(u16),
    Carry { read: u16, write: u16 },
}

#[derive(Debug, Arbitrary)]
struct Input {
    first_seq: u32,
    cap: u32,
    events: Vec<Event>,
}

fuzz_target!(|input: Input| {
    let mut model = Model::new(input.first_seq, u64::from(input.cap) % (16 << 20));
    for event in &input.events {
        model.step(&match *event {
            Event::Arrive { new } => Step::Arrive { old: 0, new: u32::from(new).max(1) },
            // As far back as receive queues reach.
            Event::ArriveAgain { old, new } => Step::Arrive { old: old % (1 << 20), new: new.into() },
            Event::Judge { room, owed, meanwhile } => {
                Step::Judge { room, owed, meanwhile: (meanwhile % 8).into() }
            }
            Event::Queue(most) => Step::Queue(most.into()),
            Event::Carry { read, write } => Step::Carry { read: read.into(), write: write.into() },
        });
    }
    model.settle(input.events.len() * 20 + 1);
});
