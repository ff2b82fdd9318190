//! A rules file of dnsguard, whatever is in it: it makes settings within their
//! bounds, or is refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| underpass::fuzzing::rules(text));
