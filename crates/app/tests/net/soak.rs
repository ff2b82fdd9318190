//! `./dev soak`: every function at once under mixed load, with faults: peers that reset,
//! stall, leave or send rubbish, links that go down and up, interfaces that are removed,
//! processes that are killed, a disk that is full, descriptors that run out. Never may a
//! wrong byte arrive; what no fault has met has to succeed; afterwards nothing is left.
//!
//! - `load`: what runs all the time;
//! - `faults`: what is done to it;
//! - `usage`: what processes hold, before and after.

mod faults;
mod load;
mod usage;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use self::{faults::Faults, load::Place, usage::Usage};
use crate::kit::{PATIENCE, eventually};

/// What came of it.
#[derive(Default)]
struct Tally {
    /// By what each load calls its work.
    done: [AtomicU64; load::KINDS.len()],
    /// Payload bytes, there and back, all checked.
    bytes: AtomicU64,
    /// Of those that no fault should have met.
    failed: AtomicU64,
    /// Bytes that were not those that were sent, messages that came twice.
    wrong: AtomicU64,
    /// Counts up before and after each fault that touches all: odd while it lasts.
    faults: AtomicU64,
    stop: AtomicBool,
}

impl Tally {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Does a piece of work; it may fail if a fault meets it.
    fn work(&self, kind: usize, f: impl FnOnce() -> std::io::Result<u64>) {
        let before = self.faults.load(Ordering::SeqCst);
        match f() {
            Ok(bytes) => {
                self.done[kind].fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(_) if before % 2 == 1 || self.faults.load(Ordering::SeqCst) != before => {}
            Err(error) => {
                println!("{}: {error}", load::KINDS[kind]);
                self.failed.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// While this lives, what fails may have failed by it.
    fn fault(&self) -> impl Drop + '_ {
        struct Over<'a>(&'a AtomicU64);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.faults.fetch_add(1, Ordering::SeqCst);
        Over(&self.faults)
    }
}

/// A thread that panics has seen what must not be.
struct Witness<'a>(&'a Tally);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.wrong.fetch_add(1, Ordering::SeqCst);
            self.0.stop.store(true, Ordering::SeqCst);
        }
    }
}

#[test]
#[ignore = "for ./dev soak: it takes as long as it is told to, and namespaces of its own"]
fn everything_at_once() {
    let minutes: u64 = std::env::var("UNDERPASS_SOAK_MINUTES").map_or(1, |text| text.parse().unwrap());
    let mut place = Place::new();
    let tally: &Tally = Box::leak(Box::default());
    load::serve(&place, tally);
    let (baseline, attached) = (place.usage(), place.attached());
    assert!(!attached.is_empty(), "nothing is attached");
    let mut most = baseline.clone();
    let mut faults = Faults::default();
    let shared = Arc::clone(&place.shared);
    thread::scope(|scope| {
        // A fault that fails ends the load as well.
        let _witness = Witness(tally);
        load::start(scope, &shared, tally);
        let until = Instant::now() + Duration::from_secs(60 * minutes);
        while Instant::now() < until && !tally.stopped() {
            thread::sleep(Duration::from_secs(3));
            faults.next(&mut place, tally);
            most.iter_mut().zip(place.usage()).for_each(|(most, now)| *most = most.max(now));
        }
        tally.stop.store(true, Ordering::SeqCst);
    });
    report(minutes, tally, &faults);
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    assert_eq!(count(&tally.wrong), 0, "wrong bytes arrived");
    assert_eq!(count(&tally.failed), 0, "work failed that no fault had met");
    settle(&place, &baseline, &most);
    eventually("no local connection is accelerated any more", || place.accelerated() == 0);
    assert_eq!(place.attached(), attached, "other things are attached than in the beginning");
    drop(shared);
    let programs = place.programs();
    assert!(!programs.is_empty(), "nothing held a program");
    let lost = place.end();
    println!("watch: {lost}");
    usage::nothing_pinned();
    eventually("every program is gone", || usage::still_loaded(&programs).is_empty());
}

fn report(minutes: u64, tally: &Tally, faults: &Faults) {
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    let done = load::KINDS.iter().zip(&tally.done).map(|(kind, done)| format!("{} {kind}", count(done)));
    println!("{minutes} min: {}", done.collect::<Vec<_>>().join(", "));
    println!("{} MiB of payload checked; faults: {faults}", count(&tally.bytes) >> 20);
}

/// Everything goes back to where it began.
fn settle(place: &Place, baseline: &[Usage], most: &[Usage]) {
    let settled = || {
        place.usage().iter().zip(baseline).all(|(now, before)| {
            now.descriptors <= before.descriptors && now.entries <= before.entries && now.few_pipes()
        })
    };
    let until = Instant::now() + PATIENCE;
    while !settled() && Instant::now() < until {
        thread::sleep(Duration::from_millis(100));
    }
    for ((now, before), most) in place.usage().iter().zip(baseline).zip(most) {
        println!("{:<14} before {before}; at most {most}; after {now}", now.name);
        assert!(now.memory < before.memory + (24 << 20), "{} grew", now.name);
    }
    assert!(settled(), "descriptors or map entries are left");
}
