//! What the relay's program and its user side tell each other without a lock, in every order
//! in which two CPUs can see it.

use loom::{
    model,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
            fence,
        },
    },
    thread,
};
use underpass_abi::relay::{Credit, Progress};
use underpass_logic::relay::{News, news};

/// A direction's words: one side writes the first two, the other the third.
#[derive(Default)]
struct Words {
    redirected: AtomicU64,
    passed: AtomicU64,
    consumed: AtomicU64,
}

/// The program has decided to pass a byte, as one was owed, while the user side writes that
/// one and looks whether it owes more: it sees the new byte, or is told of it.
#[test]
fn nobody_sleeps_on_a_passed_byte() {
    model(|| {
        let words = Arc::new(Words { passed: AtomicU64::new(1), ..Words::default() });
        let program = {
            let words = Arc::clone(&words);
            thread::spawn(move || {
                let passed = words.passed.fetch_add(1, Relaxed) + 1;
                fence(SeqCst);
                let credit = Credit { consumed: words.consumed.load(Relaxed), ..Credit::default() };
                news(&Progress { passed, ..Progress::default() }, &credit, 1)
            })
        };
        let consumed = words.consumed.fetch_add(1, Relaxed) + 1;
        fence(SeqCst);
        let sees_it = words.passed.load(Relaxed) != consumed;
        let is_told = program.join().unwrap() == News::Arrived;
        assert!(sees_it || is_told, "a byte is passed to somebody who sleeps");
    });
}

/// Who sees that a byte was passed sees all that was redirected before it.
#[test]
fn what_was_redirected_before_is_seen() {
    model(|| {
        let words = Arc::new(Words::default());
        let program = {
            let words = Arc::clone(&words);
            thread::spawn(move || {
                words.redirected.store(1, Relaxed);
                words.passed.store(1, Release);
            })
        };
        let passed = words.passed.load(Acquire);
        let redirected = words.redirected.load(Relaxed);
        assert!(redirected >= passed, "passed bytes would overtake redirected ones");
        program.join().unwrap();
    });
}
