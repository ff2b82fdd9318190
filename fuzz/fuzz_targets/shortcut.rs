//! The shortcut's policy under any sequence of events: bytes stay in order, the
//! reader's queue stays bounded, and what leaves the map has nothing to lose; and its
//! count of a pair's turns never grants what was not earned.
#![no_main]

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use underpass_abi::shortcut::Rhythm;
use underpass_logic::shortcut::{
    LIMITS, earned, lost,
    model::{Model, Step},
    read,
};

#[derive(Debug, Arbitrary)]
enum Event {
    Send(u8),
    Read(u8),
    Count,
    Leave,
    Enter,
}

#[derive(Debug, Arbitrary)]
struct Input {
    before: u64,
    events: Vec<Event>,
    reads: Vec<(bool, u32, bool)>,
}

fuzz_target!(|input: Input| {
    let mut model = Model::new(input.before >> 16);
    for event in &input.events {
        model.step(match *event {
            Event::Send(bytes) => Step::Send(bytes.max(1).into()),
            Event::Read(bytes) => Step::Read(bytes.into()),
            Event::Count => Step::Count,
            Event::Leave => Step::Leave,
            Event::Enter => Step::Enter,
        });
    }
    model.settle();
    rhythm(&input.reads);
});

fn rhythm(reads: &[(bool, u32, bool)]) {
    let mut rhythm = Rhythm { needed: LIMITS.turns, ..Rhythm::default() };
    let (mut turns, mut last) = (0, None);
    for (end, bytes, loses) in reads {
        if *loses {
            let needed = rhythm.needed;
            rhythm = lost(rhythm);
            assert!(rhythm.needed >= needed && !earned(&rhythm));
            turns = 0;
        }
        rhythm = read(rhythm, u32::from(*end), *bytes, &LIMITS);
        turns += u32::from(last != Some(*end));
        last = Some(*end);
        assert!(rhythm.turns <= turns && (!earned(&rhythm) || turns >= rhythm.needed));
    }
}
