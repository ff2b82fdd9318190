//! `dnsguard check` on any file: it is judged, or refused with a message that says
//! why; every line about an answer is JSON, and the summary is the last.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| underpass::fuzzing::capture(bytes));
