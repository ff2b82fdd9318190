//! Messages by their tags: a lookup in a table finds what asking route after route
//! finds, a table gives back what it was built from, and a message's length does not
//! depend on what follows its header.
#![no_main]

use libfuzzer_sys::{arbitrary, arbitrary::Arbitrary, fuzz_target};
use underpass_logic::mux::{
    frame::Frame,
    table::{EMPTY, Route, build, find_in, routes, tag},
};

#[derive(Debug, Arbitrary)]
struct Input {
    /// Offsets near each other, so that payloads of a few hundred bytes have them.
    routes: Vec<(u8, Vec<u8>)>,
    wide: bool,
    offset: u8,
    plus: u16,
    message: Vec<u8>,
}

fuzz_target!(|input: Input| {
    by_tag(&input);
    let frame = Frame::Length {
        width: if input.wide { 4 } else { 2 },
        offset: input.offset.into(),
        plus: input.plus,
    };
    let length = frame.length(&input.message);
    match input.message.get(..frame.header()) {
        Some(header) => assert_eq!(frame.length(header), length),
        None => assert_eq!(length, Ok(None)),
    }
    if let Ok(Some(length)) = length {
        assert!(length >= frame.header() as u64);
    }
});

fn by_tag(input: &Input) {
    let list = input.routes.iter().enumerate().map(|(index, (offset, tag))| Route {
        offset: u16::from(*offset),
        tag,
        port: index as u16,
        counter: index as u16,
    });
    let mut table = Box::new(EMPTY);
    if build(&mut table, list.clone()).is_err() {
        return;
    }
    let first = list.clone().find(|route| {
        let at = usize::from(route.offset);
        input.message.get(at..at + route.tag.len()) == Some(route.tag)
    });
    assert_eq!(find_in(&table, &input.message).map(|slot| slot.port), first.map(|route| route.port));
    for (slot, route) in routes(&table).zip(list) {
        let (offset, bytes, length) = tag(&table, slot);
        assert_eq!((offset, &bytes[bytes.len() - length..]), (route.offset, route.tag));
    }
}
